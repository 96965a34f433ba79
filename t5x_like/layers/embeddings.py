"""Tables of tokens and token types: look-up, and logits when the output is tied to one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from t5x_like.kernels.matmul import project
from t5x_like.layers.parameter import in_use, parameter


class TokenEmbedder(nnx.Module):
    """A table [vocab, embed] in float32, used in `dtype`; `rows` is its first logical axis."""

    def __init__(
        self,
        vocab_size: int,
        *,
        embed_dim: int,
        init_stddev: float,
        dtype: jnp.dtype,
        rows: str = "vocab",
    ) -> None:
        self.dtype = dtype
        self.embedding = parameter(
            (vocab_size, embed_dim),
            logical_axes=(rows, "embed"),
            initializer=jax.nn.initializers.normal(init_stddev),
        )

    def __call__(self, tokens: Int[Array, "batch length"]) -> Float[Array, "batch length embed"]:
        """Rows of the table, without a scale.

        A gather, cast afterwards: its gradient is a scatter-add in float32.
        """
        table = in_use(self.embedding, jnp.dtype("float32"))
        return jnp.take(table, tokens, axis=0).astype(self.dtype)

    def attend(self, x: Float[Array, "batch length embed"]) -> Float[Array, "batch length vocab"]:
        """float32 logits: the product of `x` with every row."""
        table = in_use(self.embedding, self.dtype)
        return project(x.astype(self.dtype), table.T, float32=True)
