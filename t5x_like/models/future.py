"""Multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2).

Module k takes what module k - 1 (at first the model itself) makes of position i, joins the token
k places further to it, runs a block of its own, and so predicts the token after that one. The
token table and the output kernel are the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Shaped

from t5x_like.kernels.attention import AttentionMask
from t5x_like.kernels.position_bias import RelativeBias
from t5x_like.layers.dropout import fold_key
from t5x_like.layers.linear import Linear
from t5x_like.layers.moe.layer import Auxiliary
from t5x_like.layers.norms import Norm
from t5x_like.layers.parameter import stack_parameters
from t5x_like.models.block import Block
from t5x_like.models.padding import real_tokens
from t5x_like.models.stack import remat_policy


def ahead(x: Shaped[Array, "batch length"], places: int) -> Shaped[Array, "batch length"]:
    """What stands so many places further in every row; zeros after its end."""
    return jnp.pad(x[:, places:], ((0, 0), (0, min(places, x.shape[1]))))


def has_future(batch: Mapping[str, Array], *, depth: int) -> Bool[Array, "depth batch length"]:
    """Where a token has another one 1, 2, ..., `depth` places further in its own example."""
    segments = batch.get("decoder_segment_ids")
    if segments is None:
        real = real_tokens(batch, stack="decoder")
        tokens = batch["decoder_input_tokens"]
        segments = (jnp.ones(tokens.shape, bool) if real is None else real).astype(jnp.int32)
    places = range(1, depth + 1)
    return jnp.stack([(segments > 0) & (ahead(segments, k) == segments) for k in places])


class FutureLayer(nnx.Module):
    """One module: `norm(block(projection [norm(embedding of the token); norm(x)]))`."""

    def __init__(self, block: Block, projection: Linear, *, dtype: jnp.dtype) -> None:
        config = block.config
        self.embedding_norm, self.hidden_norm, self.norm = (
            Norm(config.norm, embed_dim=config.embed_dim, dtype=dtype) for _ in range(3)
        )
        self.projection, self.block = projection, block

    def __call__(
        self, x: Float[Array, "batch length embed"], embedded: jax.Array, **inputs: Any
    ) -> tuple[Float[Array, "batch length embed"], Auxiliary | None]:
        """`embedded` is like `x`; `inputs` are those of `Block`."""
        joined = [self.embedding_norm(embedded), self.hidden_norm(x)]
        x, auxiliary = self.block(self.projection(jnp.concatenate(joined, axis=-1)), **inputs)
        return self.norm(x), auxiliary


class Future(nnx.Module):
    """The modules, stacked on a leading axis and run one after the other by scan."""

    def __init__(self, layer: FutureLayer, *, depth: int, remat: str) -> None:
        self.layers = stack_parameters(layer, num_layers=depth)
        self.depth, self.remat = depth, remat

    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        batch: Mapping[str, jax.Array],
        *,
        embed: Callable[..., jax.Array],
        relative_bias: RelativeBias | None,
        dropout_key: jax.Array | None,
    ) -> Float[Array, "depth batch length embed"]:
        """What each module makes of every position; it means nothing where `has_future` is False.

        Experts take that for padding, and later queries of the same example are of that kind
        too. Attention is causal in a prefix as well: it would see the tokens to be predicted.
        What mixtures of experts say is left in `auxiliary`, as `Stack` does.

        Args:
          x: output of the decoder, normalised.
          batch: as `DecoderOnly` takes it.
          embed: (tokens, positions) -> embeddings.
          relative_bias: of the decoder, or None.
          dropout_key: None runs without dropout.
        """
        tokens, positions = batch["decoder_input_tokens"], batch.get("decoder_positions")
        segments = batch.get("decoder_segment_ids")
        mask = AttentionMask(causal=True, query_segments=segments, key_segments=segments)
        graphdef, params = nnx.split(self.layers)

        def run(x: jax.Array, scanned: Any) -> tuple[jax.Array, Any]:
            params, token_ids, real, index = scanned
            x, auxiliary = nnx.merge(graphdef, params)(
                x,
                embed(token_ids, positions),
                mask=mask,
                positions=positions,
                relative_bias=relative_bias,
                real=real,
                token_ids=token_ids,
                dropout_key=fold_key(dropout_key, index),
            )
            return x, (x, auxiliary)

        further = jnp.stack([ahead(tokens, k) for k in range(1, self.depth + 1)])
        real = has_future(batch, depth=self.depth)
        scanned = (params, further, real, jnp.arange(self.depth))
        _, (made, auxiliary) = jax.lax.scan(remat_policy(self.remat)(run), x, scanned)
        if auxiliary is not None:
            self.auxiliary = nnx.Intermediate({"layers/block": auxiliary})
        return made
