"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

Keys and values of all heads are projected from one narrow vector a token, the latent, and one
rotated key that the heads share. These two are all that a cache holds.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from t5x_like.errors import UserError
from t5x_like.kernels import attention as kernel
from t5x_like.kernels.position_bias import RelativeBias
from t5x_like.layers.cache import CacheShape, DecodingStep, KeyValues
from t5x_like.layers.checks import check_instance, check_number, check_positive_ints
from t5x_like.layers.dropout import dropout_mask
from t5x_like.layers.linear import Linear
from t5x_like.layers.norms import Norm, NormConfig
from t5x_like.layers.parameter import Initializer, attention_kernel_init, in_use
from t5x_like.layers.rope import RopeConfig, Rotation, YarnScaling
from t5x_like.parallel.logical import constrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentAttentionConfig:
    """Attributes:
    num_heads: heads.
    head_dim: of the part of a query and key head that is not rotated.
    rotary_dim: of the rotated part, whose key is one for all heads.
    value_dim: of a value head.
    latent_dim: of the vector that keys and values are projected from.
    query_dim: of the vector that queries are projected from; None for the block's input itself.
    positions: of the rotated part.
    mscale: of YaRN positions: logits are also multiplied by (0.1 mscale log(factor) + 1)^2
      (`mscale_all_dim` of DeepSeek's configurations); 0 for none.
    norm: of the latent and of the vector of `query_dim`.
    """

    num_heads: int
    head_dim: int
    rotary_dim: int
    value_dim: int
    latent_dim: int
    query_dim: int | None = None
    positions: RopeConfig = RopeConfig(interleaved=True)
    mscale: float = 0.0
    norm: NormConfig = NormConfig()

    # Of `AttentionConfig`, for those who ask what attention sees.
    window = global_block_size = None

    def __post_init__(self) -> None:
        dims = ("num_heads", "head_dim", "rotary_dim", "value_dim", "latent_dim")
        check_positive_ints(self, *dims, *(["query_dim"] if self.query_dim is not None else []))
        check_instance(self, "positions", RopeConfig)
        check_instance(self, "norm", NormConfig)
        check_number(self, "mscale", low=0.0)
        self.positions.rotated_dims(self.rotary_dim)
        if self.mscale and not isinstance(self.positions.scaling, YarnScaling):
            raise UserError(
                f"LatentAttentionConfig.mscale is {self.mscale:g} and positions.scaling "
                f"{self.positions.scaling}; it goes with a YarnScaling, else it must be 0"
            )

    @property
    def scale(self) -> float:
        """The factor of the logits."""
        scaling, scale = self.positions.scaling, (self.head_dim + self.rotary_dim) ** -0.5
        if isinstance(scaling, YarnScaling):
            scale *= (0.1 * self.mscale * math.log(scaling.factor) + 1.0) ** 2
        return scale


class LatentAttention(nnx.Module):
    """Self-attention whose keys and values come from a latent.

    Kernels are 2-D, with heads and their dims joined: query_down (embed, query_dim), query
    (query_dim or embed, heads), whose heads end with their rotated part; latent (embed,
    latent_dim), rotary_key (embed, rotary_dim), key and value (latent_dim, heads), out (heads,
    embed).
    """

    def __init__(
        self,
        config: LatentAttentionConfig,
        *,
        embed_dim: int,
        dtype: jnp.dtype,
        kernel_init: Initializer | None = None,
        out_init: Initializer | None = None,
    ) -> None:
        self.config, self.dtype = config, dtype
        init = kernel_init or attention_kernel_init

        def linear(inputs: tuple[str, int], outputs: tuple[str, int]) -> Linear:
            return Linear(
                (inputs[1], outputs[1]),
                logical_axes=(inputs[0], outputs[0]),
                initializer=(out_init or init) if outputs[0] == "embed" else init,
                use_bias=False,
                dtype=dtype,
            )

        def norm(dim: int) -> Norm:
            return Norm(config.norm, embed_dim=dim, dtype=dtype, logical_axis="latent")

        def heads(dim: int) -> tuple[str, int]:
            return "heads", config.num_heads * dim

        embed, latent = ("embed", embed_dim), ("latent", config.latent_dim)
        queries_from = embed
        if config.query_dim is not None:
            queries_from = ("latent", config.query_dim)
            self.query_down, self.query_norm = linear(embed, queries_from), norm(config.query_dim)
        self.query = linear(queries_from, heads(config.head_dim + config.rotary_dim))
        self.latent, self.latent_norm = linear(embed, latent), norm(config.latent_dim)
        self.rotary_key = linear(embed, ("head_dim", config.rotary_dim))
        self.key = linear(latent, heads(config.head_dim))
        self.value = linear(latent, heads(config.value_dim))
        self.out = linear(heads(config.value_dim), embed)

    @property
    def flops_per_pair(self) -> int:
        """Multiplications and additions of one query with one key and its value, all heads."""
        config = self.config
        dims = config.head_dim + config.rotary_dim + config.value_dim
        return 2 * config.num_heads * dims

    def _queries(self, x: jax.Array, rotate: Rotation) -> tuple[jax.Array, jax.Array]:
        """[B, L, embed] -> the plain and the rotated part, [B, L, heads, dim]."""
        if self.config.query_dim is not None:
            x = self.query_norm(self.query_down(x))
        plain, turned = jnp.split(self._heads("query", x), [self.config.head_dim], axis=-1)
        return plain, rotate(turned)

    def _latents(self, x: jax.Array, rotate: Rotation) -> tuple[jax.Array, jax.Array]:
        """[B, L, embed] -> latents [B, L, latent_dim] and shared keys [B, L, 1, rotary_dim]."""
        latent = self.latent_norm(checkpoint_name(self.latent(x), "latent"))
        latent = constrain(latent, ("batch", "length", "latent"))
        return latent, rotate(self.rotary_key(x)[:, :, None])

    def _heads(self, name: str, x: jax.Array) -> jax.Array:
        """The projection of that name, [B, L, heads, dim]."""
        y = checkpoint_name(getattr(self, name)(x), name)
        y = y.reshape(*x.shape[:2], self.config.num_heads, -1)
        return constrain(y, ("batch", "length", "heads", "head_dim"))

    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        *,
        mask: kernel.AttentionMask,
        positions: Int[Array, "batch length"] | None = None,
        relative_bias: RelativeBias | None = None,
        global_bias: RelativeBias | None = None,
        dropout_rate: float,
        dropout_key: jax.Array | None,
        broadcast_dims: tuple[int, ...],
    ) -> Float[Array, "batch length embed"]:
        """As `Attention`; `global_bias` is for layers with global tokens."""
        return self.attend(
            x,
            mask=mask,
            positions=positions,
            relative_bias=relative_bias,
            dropout_rate=dropout_rate,
            dropout_key=dropout_key,
            broadcast_dims=broadcast_dims,
        )[0]

    def attend(
        self,
        x: Float[Array, "batch length embed"],
        *,
        mask: kernel.AttentionMask,
        positions: Int[Array, "batch length"] | None = None,
        lengths: Int[Array, " batch"] | None = None,
        relative_bias: RelativeBias | None = None,
        dropout_rate: float = 0.0,
        dropout_key: jax.Array | None = None,
        broadcast_dims: tuple[int, ...] = (),
    ) -> tuple[
        Float[Array, "batch length embed"],
        Float[Array, "batch length latent"],
        Float[Array, "batch length 1 rotary"],
    ]:
        """What a call gives, and the latents and shared keys.

        `lengths` are those of the whole sequences where `x` holds only their beginnings.
        """
        config = self.config
        at = jnp.arange(x.shape[1])[None] if positions is None else positions
        rotate = self._rotation(at, x.shape[1] if lengths is None else lengths)
        query = jnp.concatenate(self._queries(x, rotate), axis=-1)
        latent, shared = self._latents(x, rotate)
        key, value = self._heads("key", latent), self._heads("value", latent)
        for_all = jnp.broadcast_to(shared, (*key.shape[:3], config.rotary_dim))
        dropout = None
        if dropout_key is not None and dropout_rate > 0:
            dropout = functools.partial(
                dropout_mask, rate=dropout_rate, key=dropout_key, broadcast_dims=broadcast_dims
            )
        out = kernel.attention(
            query,
            jnp.concatenate([key, for_all], axis=-1),
            value,
            mask=mask,
            bias=relative_bias,
            scale=config.scale,
            dropout=dropout,
        )
        out = checkpoint_name(out.reshape(*x.shape[:2], -1), "attention")
        return checkpoint_name(self.out(out), "attention_out"), latent, shared

    def _rotation(self, at: jax.Array, length: int | jax.Array) -> Rotation:
        dim = self.config.rotary_dim
        return self.config.positions.rotation(at, head_dim=dim, max_length=length)

    def prefill(
        self,
        x: Float[Array, "batch prompt embed"],
        *,
        mask: kernel.AttentionMask,
        positions: Int[Array, "batch prompt"],
        lengths: Int[Array, " batch"],
        relative_bias: RelativeBias | None,
        shape: CacheShape,
    ) -> tuple[Float[Array, "batch prompt embed"], KeyValues]:
        """Self-attention over prompts, and the cache: shared keys, and latents as values."""
        out, latent, shared = self.attend(
            x, mask=mask, positions=positions, lengths=lengths, relative_bias=relative_bias
        )
        return out, KeyValues.of_prompt(shared, latent[:, :, None], shape=shape, window=None)

    def step(
        self,
        x: Float[Array, "rows beams embed"],
        cache: KeyValues,
        *,
        layer: Int[Array, ""] | None,
        at: DecodingStep,
        relative_bias: RelativeBias | None,
    ) -> tuple[Float[Array, "rows beams embed"], KeyValues]:
        """As `Attention.step`; queries meet latents, no key or value is ever expanded.

        A query head is multiplied with the projection of its keys, and what it takes of the
        latents with that of its values.
        """
        config, beams = self.config, x.shape[1]
        rotate = self._rotation(at.positions, at.lengths)
        query, turned = self._queries(x, rotate)
        latent, shared = self._latents(x, rotate)
        cache = cache.write(shared, latent[:, :, None], layer=layer, slot=at.slot)
        own = cache.layer(layer)
        size = own.key.shape[2] // beams
        key_up, value_up = (
            in_use(up.kernel, self.dtype).reshape(config.latent_dim, config.num_heads, -1)
            for up in (self.key, self.value)
        )
        by_position = jnp.einsum(
            "nbhd,nkd->nhbk", turned, own.key[:, 0], preferred_element_type=jnp.float32
        )
        bias = config.scale * by_position
        if relative_bias is not None:
            of_slots = relative_bias.behind(at.distances(size))
            bias += jnp.repeat(of_slots, beams, axis=-1)[None, :, None]
        taken = kernel.cached_attention(
            jnp.einsum("nbhd,chd->nbhc", query, key_up),
            own.value,
            own.value,
            allowed=at.allowed(size),
            bias=bias,
            scale=config.scale,
        )
        out = jnp.einsum("nbhc,chd->nbhd", taken, value_up)
        return self.out(out.reshape(*x.shape[:2], -1)), cache
