"""Multi-head, grouped-query and multi-query attention with projections."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from t5x_like.errors import UserError
from t5x_like.kernels import attention as kernel
from t5x_like.kernels.position_bias import AlibiBias, RelativeBias
from t5x_like.layers.cache import CacheShape, DecodingStep, KeyValues
from t5x_like.layers.checks import (
    check_bools,
    check_instance,
    check_number,
    check_positive_ints,
)
from t5x_like.layers.dropout import dropout_mask
from t5x_like.layers.global_tokens import GlobalTokens
from t5x_like.layers.linear import Linear
from t5x_like.layers.norms import Norm, NormConfig
from t5x_like.layers.parameter import (
    Initializer,
    attention_kernel_init,
    in_use,
    parameter,
    scaled,
)
from t5x_like.layers.positions import (
    AlibiConfig,
    TransformerXlPositions,
    TransformerXlPositionsConfig,
)
from t5x_like.layers.rope import RopeConfig
from t5x_like.parallel.logical import constrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Attributes:
    num_heads: query heads.
    head_dim: size of one head.
    num_kv_heads: key and value heads, a divisor of `num_heads`; None for as many.
    logit_scale: what multiplies query . key: a number, `rsqrt_head_dim` for 1 / sqrt(head_dim),
      or None: T5 has no scale, and folds that factor into the initial query kernel.
    qkv_bias, out_bias: biases in the query, key and value projections, and in the output's.
    qk_norm: normalises every query and key head before they are rotated, or None.
    softcap: c in `c * tanh(logits / c)`, or None.
    window: queries see keys less than this many positions away; None for all.
    global_block_size: queries also see the means of blocks of this many tokens (LongT5's
      transient-global attention; it goes with a window and a relative bias), or None.
    sinks: a learned logit a head that takes weight and gives no value.
    positions: rotary, ALiBi or Transformer-XL positions of this layer, or None.
    """

    num_heads: int
    head_dim: int
    num_kv_heads: int | None = None
    logit_scale: float | Literal["rsqrt_head_dim"] | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: NormConfig | None = None
    softcap: float | None = None
    window: int | None = None
    global_block_size: int | None = None
    sinks: bool = False
    positions: RopeConfig | AlibiConfig | TransformerXlPositionsConfig | None = None

    def __post_init__(self) -> None:
        check_positive_ints(self, "num_heads", "head_dim")
        check_bools(self, "qkv_bias", "out_bias", "sinks")
        for name in ("num_kv_heads", "window", "global_block_size"):
            if getattr(self, name) is not None:
                check_positive_ints(self, name)
        if self.num_kv_heads == self.num_heads:
            object.__setattr__(self, "num_kv_heads", None)  # One spelling of one thing.
        if self.num_heads % (self.num_kv_heads or self.num_heads):
            raise UserError(
                f"AttentionConfig.num_kv_heads {self.num_kv_heads} does not divide "
                f"num_heads {self.num_heads}; choose a divisor"
            )
        if self.logit_scale != "rsqrt_head_dim" and self.logit_scale is not None:
            if isinstance(self.logit_scale, str):
                raise UserError(
                    f"AttentionConfig.logit_scale is {self.logit_scale!r}; give a number, "
                    "'rsqrt_head_dim' or None"
                )
            check_number(self, "logit_scale", low=0.0)
        if self.softcap is not None:
            check_number(self, "softcap", low=1e-6)
        check_instance(self, "qk_norm", NormConfig, type(None))
        kinds = (RopeConfig, AlibiConfig, TransformerXlPositionsConfig, type(None))
        check_instance(self, "positions", *kinds)
        if isinstance(self.positions, RopeConfig):
            self.positions.rotated_dims(self.head_dim)
        if self.global_block_size is not None and self.window is None:
            raise UserError(
                f"AttentionConfig.global_block_size is {self.global_block_size} and window None; "
                "global tokens go with a window"
            )

    @property
    def scale(self) -> float:
        """The factor of the logits as a number."""
        if isinstance(self.logit_scale, str):
            return self.head_dim**-0.5
        return 1.0 if self.logit_scale is None else self.logit_scale

    def for_context(self) -> AttentionConfig:
        """The same projections over another sequence, where no distance is defined."""
        return dataclasses.replace(self, window=None, global_block_size=None, positions=None)


class Attention(nnx.Module):
    """Attention of `x` over itself or over `context`.

    Kernels are 2-D, with heads and head_dim joined: query (embed, heads), key and value
    (embed, kv_heads), out (heads, embed).
    """

    def __init__(
        self,
        config: AttentionConfig,
        *,
        embed_dim: int,
        norm: NormConfig,
        dtype: jnp.dtype,
        kernel_init: Initializer | None = None,
        out_init: Initializer | None = None,
    ) -> None:
        self.config, self.dtype = config, dtype
        self.num_kv_heads = config.num_kv_heads or config.num_heads
        heads, kv_heads = (n * config.head_dim for n in (config.num_heads, self.num_kv_heads))
        init = kernel_init or attention_kernel_init
        fold_scale = kernel_init is None and config.logit_scale is None
        query_init = scaled(init, config.head_dim**-0.5) if fold_scale else init
        linear = functools.partial(Linear, dtype=dtype)
        self.query = linear(
            (embed_dim, heads),
            logical_axes=("embed", "heads"),
            initializer=query_init,
            use_bias=config.qkv_bias,
        )
        self.key, self.value = (
            linear(
                (embed_dim, kv_heads),
                logical_axes=("embed", "kv_heads"),
                initializer=init,
                use_bias=config.qkv_bias,
            )
            for _ in range(2)
        )
        self.out = linear(
            (heads, embed_dim),
            logical_axes=("heads", "embed"),
            initializer=out_init or init,
            use_bias=config.out_bias,
        )
        self._add_options(embed_dim=embed_dim, norm=norm, kernel_init=init)

    def _add_options(self, *, embed_dim: int, norm: NormConfig, kernel_init: Initializer) -> None:
        config, dtype = self.config, self.dtype
        if config.qk_norm is not None:
            self.query_norm, self.key_norm = (
                Norm(
                    config.qk_norm, embed_dim=config.head_dim, dtype=dtype, logical_axis="head_dim"
                )
                for _ in range(2)
            )
        if config.sinks:
            self.sinks = parameter(
                (config.num_heads,),
                logical_axes=("heads",),
                initializer=jax.nn.initializers.zeros,
            )
        if config.global_block_size is not None:
            self.global_tokens = GlobalTokens(
                config.global_block_size, embed_dim=embed_dim, norm=norm, dtype=dtype
            )
        if isinstance(config.positions, TransformerXlPositionsConfig):
            self.xl_positions = TransformerXlPositions(
                config.positions,
                embed_dim=embed_dim,
                num_heads=config.num_heads,
                head_dim=config.head_dim,
                kernel_init=kernel_init,
                dtype=dtype,
            )

    @property
    def flops_per_pair(self) -> int:
        """Multiplications and additions of one query with one key and its value, all heads."""
        products = 3 if hasattr(self, "xl_positions") else 2  # scores, values, distances
        return 2 * products * self.config.num_heads * self.config.head_dim

    def _project(self, name: str, x: jax.Array) -> jax.Array:
        """[B, L, embed] -> [B, L, heads of that projection, head_dim]."""
        y = checkpoint_name(getattr(self, name)(x), name)
        y = y.reshape(*x.shape[:2], -1, self.config.head_dim)
        heads = "heads" if name == "query" else "kv_heads"
        y = constrain(y, ("batch", "length", heads, "head_dim"))
        normalise = getattr(self, f"{name}_norm", None)
        return y if normalise is None else normalise(y)

    def __call__(
        self,
        x: Float[Array, "batch query embed"],
        context: Float[Array, "batch key embed"] | None = None,
        *,
        mask: kernel.AttentionMask,
        positions: Int[Array, "batch query"] | None = None,
        relative_bias: RelativeBias | None = None,
        global_bias: RelativeBias | None = None,
        dropout_rate: float,
        dropout_key: jax.Array | None,
        broadcast_dims: tuple[int, ...],
    ) -> Float[Array, "batch query embed"]:
        """`positions` count from 0 within each packed example; None means one example a row."""
        return self.attend(
            x,
            context,
            mask=mask,
            positions=positions,
            relative_bias=relative_bias,
            global_bias=global_bias,
            dropout_rate=dropout_rate,
            dropout_key=dropout_key,
            broadcast_dims=broadcast_dims,
        )[0]

    def attend(
        self,
        x: Float[Array, "batch query embed"],
        context: Float[Array, "batch key embed"] | None = None,
        *,
        mask: kernel.AttentionMask,
        positions: Int[Array, "batch query"] | None = None,
        lengths: Int[Array, " batch"] | None = None,
        relative_bias: RelativeBias | None = None,
        global_bias: RelativeBias | None = None,
        dropout_rate: float = 0.0,
        dropout_key: jax.Array | None = None,
        broadcast_dims: tuple[int, ...] = (),
    ) -> tuple[
        Float[Array, "batch query embed"],
        Float[Array, "batch key kv_heads head_dim"],
        Float[Array, "batch key kv_heads head_dim"],
    ]:
        """What a call gives, and the keys and values as they were used.

        `lengths` are those of the whole sequences where `x` holds only their beginnings.
        """
        config, scale = self.config, self.config.scale
        source = x if context is None else context
        query, key = self._project("query", x), self._project("key", source)
        value = self._project("value", source)
        bias: RelativeBias | AlibiBias | jax.Array | None = relative_bias
        if isinstance(config.positions, RopeConfig):
            at = jnp.arange(x.shape[1])[None] if positions is None else positions
            length = x.shape[1] if lengths is None else lengths
            rotate = config.positions.rotation(at, head_dim=config.head_dim, max_length=length)
            query, key = rotate(query), rotate(key)
        elif isinstance(config.positions, AlibiConfig):
            bias = AlibiBias(num_heads=config.num_heads, scale=config.positions.scale)
        elif isinstance(config.positions, TransformerXlPositionsConfig):
            query, bias = self.xl_positions(query, scale=scale, key_length=key.shape[1])
        dropout = None
        if dropout_key is not None and dropout_rate > 0:
            dropout = functools.partial(
                dropout_mask, rate=dropout_rate, key=dropout_key, broadcast_dims=broadcast_dims
            )
        global_keys = None
        if config.global_block_size is not None and x.shape[1] >= config.global_block_size:
            assert global_bias is not None
            blocks, allowed, dense_bias = self.global_tokens(x, mask=mask, bias=global_bias)
            global_keys = kernel.GlobalKeys(
                key=self._project("key", blocks),
                value=self._project("value", blocks),
                bias=dense_bias,
                allowed=allowed,
            )
        out = kernel.attention(
            query,
            key,
            value,
            mask=dataclasses.replace(mask, window=config.window),
            bias=bias,
            scale=scale,
            softcap=config.softcap,
            sinks=self._sinks(),
            global_keys=global_keys,
            dropout=dropout,
        )
        out = checkpoint_name(out.reshape(*x.shape[:2], -1), "attention")
        return checkpoint_name(self.out(out), "attention_out"), key, value

    def _sinks(self) -> jax.Array | None:
        return in_use(self.sinks, jnp.dtype("float32")) if self.config.sinks else None

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
        """Self-attention over prompts, and the cache with their keys and values."""
        if self.config.global_block_size is not None:
            raise UserError(
                f"AttentionConfig.global_block_size is {self.config.global_block_size} in a "
                "decoder; blocks that grow token by token cannot be decoded, set it to None"
            )
        out, key, value = self.attend(
            x, mask=mask, positions=positions, lengths=lengths, relative_bias=relative_bias
        )
        window, relative = self.config.window, None
        if isinstance(self.config.positions, TransformerXlPositionsConfig):
            relative = self.xl_positions.keys(np.arange(shape.slots_of(window)))
        cache = KeyValues.of_prompt(key, value, shape=shape, window=window, relative=relative)
        return out, cache

    def step(
        self,
        x: Float[Array, "rows beams embed"],
        cache: KeyValues,
        *,
        layer: Int[Array, ""] | None,
        at: DecodingStep,
        relative_bias: RelativeBias | None,
    ) -> tuple[Float[Array, "rows beams embed"], KeyValues]:
        """Self-attention of one token of every beam to itself and the cached ones before it.

        `cache` is that of the layer's stack, in which it is number `layer`, or (None) its own.
        """
        config, beams = self.config, x.shape[1]
        query, key = self._project("query", x), self._project("key", x)
        value = self._project("value", x)
        if isinstance(config.positions, RopeConfig):
            rotate = config.positions.rotation(
                at.positions, head_dim=config.head_dim, max_length=at.lengths
            )
            query, key = rotate(query), rotate(key)
        cache = cache.write(key, value, layer=layer, slot=at.slot)
        own = cache.layer(layer)
        size = own.key.shape[2] // beams
        distances = at.distances(size)
        bias: jax.Array | None = None
        if relative_bias is not None:
            bias = relative_bias.behind(distances)[None, :, None]
        elif isinstance(config.positions, AlibiConfig):
            alibi = AlibiBias(num_heads=config.num_heads, scale=config.positions.scale)
            bias = alibi.behind(distances)[None, :, None]
        elif own.relative is not None:
            query, by_distance = self.xl_positions.behind(query, own.relative, scale=config.scale)
            bias = by_distance[..., distances]
        if bias is not None and beams > 1:
            bias = jnp.repeat(bias, beams, axis=-1)
        out = kernel.cached_attention(
            query,
            own.key,
            own.value,
            allowed=at.allowed(size),
            bias=bias,
            scale=config.scale,
            softcap=config.softcap,
            sinks=self._sinks(),
        )
        return self.out(out.reshape(*x.shape[:2], -1)), cache

    def prefill_context(
        self,
        x: Float[Array, "batch prompt embed"],
        context: Float[Array, "batch key embed"],
        *,
        mask: kernel.AttentionMask,
    ) -> tuple[Float[Array, "batch prompt embed"], KeyValues]:
        """Attention of prompts over the context, and the keys and values of the context."""
        if self.config != self.config.for_context():
            raise UserError(
                "BlockConfig.cross_attention has a window, global_block_size or positions, with "
                "which nothing can be decoded; set them to None"
            )
        out, key, value = self.attend(x, context, mask=mask)
        return out, KeyValues(key=key.swapaxes(1, 2), value=value.swapaxes(1, 2))

    def step_context(
        self,
        x: Float[Array, "rows beams embed"],
        cache: KeyValues,
        *,
        valid: Bool[Array, "batch key"],
    ) -> Float[Array, "rows beams embed"]:
        """Attention of one token of every beam over the context of its prompt.

        All samples and beams of a prompt look at one copy of the context's keys and values.
        """
        query = self._project("query", x)
        query = query.reshape(len(valid), -1, *query.shape[2:])
        out = kernel.cached_attention(
            query,
            cache.key,
            cache.value,
            allowed=valid[:, None],
            scale=self.config.scale,
            softcap=self.config.softcap,
            sinks=self._sinks(),
        )
        return self.out(out.reshape(*x.shape[:2], -1))
