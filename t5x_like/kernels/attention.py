"""Scaled dot-product attention with structured masks, on XLA.

JAX's cuDNN attention is not used: it silently drops the gradient of a relative bias under a
padding or segment mask, and its dropout follows no key of ours.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from t5x_like.kernels.matmul import transposed_product
from t5x_like.kernels.position_bias import PositionBias

# Gives, for the shape [B, H, T, S] of the weights, what broadcasts to it: 0 or 1 / (1 - rate).
DropoutMask = Callable[[tuple[int, ...]], jax.Array]
_MASKED = -1e30  # Finite: a row without any key to see gives the mean of all values, not NaN.


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("query_segments", "key_segments", "key_valid", "prefix"),
    meta_fields=("causal", "window"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionMask:
    """Who may attend to whom; every part that is given must allow a pair.

    Attributes:
      causal: a query sees keys at its own and at earlier positions only.
      window: a query sees keys less than `window` positions away.
      query_segments, key_segments: i32 [B, T] and [B, S], ids of the packed examples; a query
        sees keys of its own segment only.
      key_valid: bool [B, S], False where the key is padding.
      prefix: i32 [B, T], positive where a token of a causal decoder belongs to a prefix whose
        tokens see each other in both directions (prefix LM); only with `causal`.
    """

    causal: bool = False
    window: int | None = None
    query_segments: Int[Array, "batch query"] | None = None
    key_segments: Int[Array, "batch key"] | None = None
    key_valid: Bool[Array, "batch key"] | None = None
    prefix: Int[Array, "batch query"] | None = None

    def allowed(
        self, query_length: int, key_length: int, *, first_key: int = 0
    ) -> Bool[Array, "#batch #query key"] | None:
        """The mask as booleans that broadcast to [B, T, S]; None if everything is allowed.

        Key 0 stands `first_key` positions after query 0.
        """
        parts = []
        distance = jnp.arange(query_length)[:, None] - jnp.arange(key_length) - first_key
        if self.causal:
            order = distance >= 0
            if self.prefix is None:
                parts.append(order[None])
            else:
                inside = self.prefix > 0
                parts.append(order | (inside[:, :, None] & inside[:, None, :]))
        if self.window is not None:
            parts.append((abs(distance) < self.window)[None])
        if self.query_segments is not None and self.key_segments is not None:
            parts.append(self.query_segments[:, :, None] == self.key_segments[:, None, :])
        if self.key_valid is not None:
            parts.append(self.key_valid[:, None, :])
        return functools.reduce(jnp.logical_and, parts) if parts else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class GlobalKeys:
    """Keys that stand for whole blocks of a sequence, seen by every query (LongT5)."""

    key: Float[Array, "batch blocks kv_heads head_dim"]
    value: Float[Array, "batch blocks kv_heads head_dim"]
    bias: Float[Array, "batch heads query blocks"]
    allowed: Bool[Array, "batch query blocks"]


def attention(
    query: Float[Array, "batch query heads head_dim"],
    key: Float[Array, "batch key kv_heads head_dim"],
    value: Float[Array, "batch key kv_heads value_dim"],
    *,
    mask: AttentionMask,
    bias: PositionBias | Float[Array, "#batch heads query key"] | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    sinks: Float[Array, " heads"] | None = None,
    global_keys: GlobalKeys | None = None,
    dropout: DropoutMask | None = None,
) -> Float[Array, "batch query heads value_dim"]:
    """`softmax(cap(scale * query . key + bias), masked) . value`, softmax in float32.

    `heads` is a multiple of `kv_heads`; consecutive query heads share a key and value head
    (grouped-query attention, Ainslie et al. 2023, arXiv:2305.13245). A window that is shorter
    than half of the sequence is computed block by block, in memory linear in the length.

    Args:
      query, key, value: the dtype of the result and of the matrix products.
      mask: see `AttentionMask`.
      bias: added to the logits: a `PositionBias`, or any array; None for nothing.
      scale: multiplies the logits before the bias.
      softcap: c in `c * tanh(logits / c)` (Gemma 2), or None.
      sinks: one more logit a head, that takes weight and gives nothing (gpt-oss), or None.
      global_keys: further keys and values, or None.
      dropout: makes the factors that the weights are multiplied with, or None.
    """
    length = query.shape[1]
    if scale != 1.0:
        query = query * scale
    window = mask.window
    blocked = window is not None and mask.prefix is None and length > 2 * window
    if blocked and not isinstance(bias, jax.Array):
        rows = _in_blocks(query, key, value, mask=mask, bias=bias)
    else:
        if bias is not None and not isinstance(bias, jax.Array):
            bias = bias.dense(length, key.shape[1])[None]
        rows = _Rows(query, key, value, bias, mask.allowed(length, key.shape[1]))
    if global_keys is not None:
        rows = _append(rows, global_keys)
    # Heads before positions: every product is then a batched matmul without further transposes.
    q, k, v = (x.swapaxes(1, 2) for x in (rows.query, rows.key, rows.value))
    keep = None if dropout is None else dropout((*q.shape[:3], k.shape[2]))
    allowed = None if rows.allowed is None else rows.allowed[:, None]
    out = _softmax_average(q, k, v, rows.bias, allowed, keep, sinks, softcap).swapaxes(1, 2)
    return out.reshape(len(query), -1, *out.shape[2:])[:, :length]


def cached_attention(
    query: Float[Array, "rows query heads head_dim"],
    key: Float[Array, "rows kv_heads key head_dim"],
    value: Float[Array, "rows kv_heads key value_dim"],
    *,
    allowed: Bool[Array, "#rows #query key"],
    bias: Float[Array, "#rows heads #query key"] | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    sinks: Float[Array, " heads"] | None = None,
) -> Float[Array, "rows query heads value_dim"]:
    """`attention` over keys and values that lie heads first, as a cache holds them."""
    query = (query * scale if scale != 1.0 else query).swapaxes(1, 2)
    out = _softmax_average(query, key, value, bias, allowed[:, None], None, sinks, softcap)
    return out.swapaxes(1, 2)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Independent attentions: of whole sequences, or of the blocks of sequences."""

    query: Float[Array, "rows query heads head_dim"]
    key: Float[Array, "rows key kv_heads head_dim"]
    value: Float[Array, "rows key kv_heads head_dim"]
    bias: Float[Array, "#rows heads query key"] | None
    allowed: Bool[Array, "#rows query key"] | None


def _in_blocks(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: AttentionMask,
    bias: PositionBias | None,
) -> _Rows:
    """Every block of `window` queries, with the keys of its own block, the one before and, where
    attention is not causal, the one after (LongT5, Guo et al. 2022, arXiv:2112.07916)."""
    batch, length = query.shape[:2]
    assert mask.window is not None
    size = mask.window
    num_blocks = -(-length // size)
    span = 2 if mask.causal else 3

    def own(x: jax.Array) -> jax.Array:
        """[B, T, ...] -> [B * blocks, size, ...]; zeros after the end."""
        pad = [(0, 0), (0, num_blocks * size - length)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, pad).reshape(batch * num_blocks, size, *x.shape[2:])

    def around(x: jax.Array) -> jax.Array:
        """[B, T, ...] -> [B * blocks, span * size, ...]; zeros outside of the sequence."""
        blocks = own(x).reshape(batch, num_blocks, size, *x.shape[2:])
        blocks = jnp.pad(blocks, [(0, 0), (1, 1)] + [(0, 0)] * (x.ndim - 1))
        parts = [blocks[:, i : i + num_blocks] for i in range(span)]
        return jnp.concatenate(parts, axis=2).reshape(-1, span * size, *x.shape[2:])

    valid = jnp.ones((batch, length), bool) if mask.key_valid is None else mask.key_valid
    in_block = dataclasses.replace(
        mask,
        key_valid=around(valid),
        query_segments=None if mask.query_segments is None else own(mask.query_segments),
        key_segments=None if mask.key_segments is None else around(mask.key_segments),
    )
    return _Rows(
        own(query),
        around(key),
        around(value),
        None if bias is None else bias.dense(size, span * size, first_key=-size)[None],
        in_block.allowed(size, span * size, first_key=-size),
    )


def _append(rows: _Rows, extra: GlobalKeys) -> _Rows:
    """Adds keys of whole sequences to rows that may be blocks of these."""
    batch, length = extra.allowed.shape[:2]
    size, num_keys = rows.query.shape[1], rows.key.shape[1]
    repeats = len(rows.query) // batch
    pad = (0, repeats * size - length)

    def per_row(x: jax.Array) -> jax.Array:
        return jnp.repeat(x, repeats, axis=0)

    # [B, H, T, G] -> [B * blocks, H, size, G].
    heads, blocks = extra.bias.shape[1], extra.bias.shape[3]
    bias = jnp.pad(extra.bias, ((0, 0), (0, 0), pad, (0, 0)))
    bias = bias.reshape(batch, heads, repeats, size, blocks).swapaxes(1, 2)
    bias = bias.reshape(batch * repeats, heads, size, blocks)
    allowed = jnp.pad(extra.allowed, ((0, 0), pad, (0, 0))).reshape(-1, size, blocks)
    shape = (batch * repeats, heads, size, num_keys)
    own_bias = jnp.zeros((), bias.dtype) if rows.bias is None else rows.bias
    own_allowed = jnp.ones((1, 1, 1), bool) if rows.allowed is None else rows.allowed
    own_allowed = jnp.broadcast_to(own_allowed, (batch * repeats, size, num_keys))
    return _Rows(
        rows.query,
        jnp.concatenate([rows.key, per_row(extra.key)], axis=1),
        jnp.concatenate([rows.value, per_row(extra.value)], axis=1),
        jnp.concatenate([jnp.broadcast_to(own_bias, shape), bias], axis=-1),
        jnp.concatenate([own_allowed, allowed], axis=-1),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _softmax_average(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None,
    allowed: jax.Array | None,
    keep: jax.Array | None,
    sinks: jax.Array | None,
    softcap: float | None,
) -> jax.Array:
    """q [B, H, T, D]; k, v [B, K, S, D]; bias, allowed, keep as [B, H, T, S]; sinks [H].

    The backward pass keeps the weights in the dtype of `v`, once, and sums their slope from the
    output instead of from [B, H, T, S] (FlashAttention, Dao et al. 2022, arXiv:2205.14135).
    """
    return _forward(q, k, v, bias, allowed, keep, sinks, softcap)[0]


def _grouped(x: jax.Array, kv_heads: int) -> jax.Array:
    """[B, H, T, X] -> [B, K, H / K * T, X]: the rows that share a key and value head."""
    return x.reshape(x.shape[0], kv_heads, -1, x.shape[-1])


def _logits(q: jax.Array, k: jax.Array, bias: jax.Array | None, softcap: float | None) -> jax.Array:
    """float32 [B, H, T, S], before the mask."""
    logits = jnp.einsum(
        "bkrd,bksd->bkrs", _grouped(q, k.shape[1]), k, preferred_element_type=jnp.float32
    ).reshape(*q.shape[:3], -1)
    if bias is not None:
        logits += bias.astype(jnp.float32)
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def _softmax(logits: jax.Array, sinks: jax.Array | None) -> jax.Array:
    if sinks is None:
        return jax.nn.softmax(logits, axis=-1)
    sink = sinks.astype(jnp.float32)[:, None, None]
    highest = jnp.maximum(jnp.max(logits, axis=-1, keepdims=True), sink)
    weights = jnp.exp(logits - highest)
    return weights / (jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sink - highest))


def _forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None,
    allowed: jax.Array | None,
    keep: jax.Array | None,
    sinks: jax.Array | None,
    softcap: float | None,
) -> tuple[jax.Array, tuple[Any, ...]]:
    logits = _logits(q, k, bias, softcap)
    if allowed is not None:
        logits = jnp.where(allowed, logits, _MASKED)
    weights = _softmax(logits, sinks).astype(v.dtype)
    weights = checkpoint_name(weights, "attention_weights")
    dropped = weights if keep is None else weights * keep.astype(v.dtype)
    out = jnp.einsum("bkrs,bksd->bkrd", _grouped(dropped, k.shape[1]), v)
    out = out.reshape(*q.shape[:3], v.shape[-1])
    # A capped slope needs the bias itself, the others only its shape and dtype.
    like = bias if bias is None or softcap is not None else jnp.zeros((len(bias), 0), bias.dtype)
    return out, (q, k, v, like, allowed, keep, sinks, weights, out)


def _backward(
    softcap: float | None, residuals: tuple[Any, ...], grad: jax.Array
) -> tuple[jax.Array | None, ...]:
    q, k, v, bias, allowed, keep, sinks, weights, out = residuals
    kv_heads = k.shape[1]
    rows = _grouped(grad, kv_heads)
    slope = jnp.einsum("bkrd,bksd->bkrs", rows, v, preferred_element_type=jnp.float32)
    slope = slope.reshape(weights.shape)
    slope = slope if keep is None else slope * keep.astype(jnp.float32)
    mean = jnp.sum((grad * out).astype(jnp.float32), axis=-1, keepdims=True)
    slope = weights.astype(jnp.float32) * (slope - mean)
    if allowed is not None:
        slope = jnp.where(allowed, slope, 0.0)
    if softcap is not None:
        slope *= 1 - jnp.square(_logits(q, k, bias, softcap) / softcap)
    narrow = _grouped(slope.astype(q.dtype), kv_heads)
    dq = jnp.einsum("bkrs,bksd->bkrd", narrow, k).reshape(q.shape)
    dk = transposed_product(narrow, _grouped(q, kv_heads))
    dropped = weights if keep is None else weights * keep.astype(v.dtype)
    dv = transposed_product(_grouped(dropped, kv_heads), rows)
    dbias = None
    if bias is not None:
        dbias = (_sum_rows(slope)[None] if len(bias) == 1 else slope).astype(bias.dtype)
    dsinks = None
    if sinks is not None:
        taken = 1 - jnp.sum(weights.astype(jnp.float32), axis=-1, keepdims=True)
        dsinks = -_sum_rows(taken * mean).sum((1, 2)).astype(sinks.dtype)
    return dq, dk, dv, dbias, None, None, dsinks


def _sum_rows(x: jax.Array) -> jax.Array:
    """Sum over the leading dim, as a product: XLA's CPU compiler sums over it 50 times slower."""
    return jnp.einsum("b,bhts->hts", jnp.ones(len(x), x.dtype), x)


_softmax_average.defvjp(_forward, _backward)
