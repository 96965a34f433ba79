"""LongT5's transient-global tokens (Guo et al. 2022, arXiv:2112.07916, section 3.2).

Every layer sums its input over blocks of consecutive tokens and normalises the sums; keys and
values of these blocks join those of the window. They live for one layer only, hence the name.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from t5x_like.errors import UserError
from t5x_like.kernels.attention import AttentionMask
from t5x_like.kernels.position_bias import RelativeBias
from t5x_like.layers.norms import Norm, NormConfig


def block_ids(valid: Bool[Array, "batch length"], *, block_size: int) -> Int[Array, "batch length"]:
    """The block of every token, -1 for padding and in sequences shorter than one block.

    The tokens after the last whole block belong to that block.
    """
    last = jnp.sum(valid, axis=-1, keepdims=True) // block_size - 1
    ids = jnp.minimum(jnp.arange(valid.shape[1])[None] // block_size, last)
    return jnp.where(valid, ids, -1)


class GlobalTokens(nnx.Module):
    """Holds the norm of the block sums."""

    def __init__(
        self, block_size: int, *, embed_dim: int, norm: NormConfig, dtype: jnp.dtype
    ) -> None:
        self.block_size = block_size
        self.layer_norm = Norm(norm, embed_dim=embed_dim, dtype=dtype)

    def __call__(
        self, x: Float[Array, "batch length embed"], *, mask: AttentionMask, bias: RelativeBias
    ) -> tuple[
        Float[Array, "batch blocks embed"],
        Bool[Array, "batch length blocks"],
        Float[Array, "batch heads length blocks"],
    ]:
        """The blocks' embeddings, which queries may see which blocks, and their bias.

        Raises:
          UserError: the batch is packed; a block of fixed size would mix examples.
        """
        if mask.query_segments is not None:
            raise UserError(
                "transient-global attention (AttentionConfig.global_block_size "
                f"{self.block_size}) cannot take packed examples; set DatasetConfig.pack = False"
            )
        length = x.shape[1]
        num_blocks = length // self.block_size
        valid = mask.key_valid
        valid = jnp.ones(x.shape[:2], bool) if valid is None else valid
        ids = block_ids(valid, block_size=self.block_size)
        member = ids[:, :, None] == jnp.arange(num_blocks)
        sums = jnp.einsum("bld,blg->bgd", x, member.astype(x.dtype))
        exists = jnp.arange(num_blocks) <= jnp.max(ids, axis=-1, keepdims=True)
        allowed = valid[:, :, None] & exists[:, None, :]
        # Distances block - own block lie in [-num_blocks, num_blocks]; all buckets are tabulated.
        buckets = jnp.asarray(bias.buckets(np.arange(-num_blocks, num_blocks + 1)))
        distance = jnp.arange(num_blocks) - ids[:, :, None]
        dense = bias.table[:, buckets[distance + num_blocks]].swapaxes(0, 1)
        return self.layer_norm(sums), allowed, dense
