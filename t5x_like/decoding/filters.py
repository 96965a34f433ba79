"""What sampling does to logits before it draws: penalty, temperature and truncations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

EXCLUDED = -1e30  # Finite, so that differences of logits are never NaN.


def penalise_repetition(
    logits: Float[Array, "rows vocab"], seen: Bool[Array, "rows vocab"], penalty: float
) -> Float[Array, "rows vocab"]:
    """Divides positive logits of tokens that were seen by `penalty` and multiplies negative ones
    (CTRL, Keskar et al. 2019, arXiv:1909.05858)."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Float[Array, "rows vocab"], k: int) -> Float[Array, "rows vocab"]:
    """Excludes all but the k highest logits."""
    if k >= logits.shape[-1]:
        return logits
    lowest = jax.lax.top_k(logits, k)[0][..., -1:]
    return jnp.where(logits >= lowest, logits, EXCLUDED)


def keep_top_p(logits: Float[Array, "rows vocab"], p: float) -> Float[Array, "rows vocab"]:
    """Excludes all but the most likely tokens whose probabilities together reach p, the one that
    reaches it included (nucleus sampling, Holtzman et al. 2020, arXiv:1904.09751).

    Instead of sorting the vocabulary, finds the lowest probability to keep bit by bit: floats
    that are not negative order as their bits do.
    """
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)

    def try_bit(i: int | jax.Array, bits: jax.Array) -> jax.Array:
        raised = bits | (jnp.uint32(1) << (30 - jnp.asarray(i, jnp.uint32)))
        lowest = jax.lax.bitcast_convert_type(raised, jnp.float32)
        kept = jnp.sum(jnp.where(probabilities >= lowest, probabilities, 0.0), -1, keepdims=True)
        return jnp.where(kept >= p, raised, bits)

    start = jnp.zeros((*logits.shape[:-1], 1), jnp.uint32)
    bits = jax.lax.fori_loop(0, 31, try_bit, start)
    lowest = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(probabilities >= lowest, logits, EXCLUDED)


def keep_min_p(logits: Float[Array, "rows vocab"], p: float) -> Float[Array, "rows vocab"]:
    """Excludes tokens less than p times as likely as the most likely one (Nguyen et al. 2024,
    arXiv:2407.01082)."""
    highest = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.where(logits >= highest + jnp.log(p), logits, EXCLUDED)
