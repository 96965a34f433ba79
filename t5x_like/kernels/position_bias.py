"""Biases that depend on the distance between query and key: T5's buckets, and ALiBi.

A bias is expanded inside the attention kernel, for the pairs that the kernel looks at. It depends
on key - query only, so it is a Toeplitz matrix.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def relative_position_bucket(
    distance: Int[np.ndarray, "..."], *, bidirectional: bool, num_buckets: int, max_distance: int
) -> Int[np.ndarray, "..."]:
    """Bucket of each distance (key position - query position), in [0, num_buckets).

    Half of the buckets of a direction are exact, the others grow logarithmically up to
    `max_distance` and saturate (T5, Raffel et al. 2020, arXiv:1910.10683, section 2.1).
    Bidirectional tables give each direction half of the buckets; others put all of the future
    into bucket 0.
    """
    past = -np.asarray(distance, np.int32)
    offset = np.zeros_like(past)
    if bidirectional:
        num_buckets //= 2
        offset, past = np.where(past < 0, num_buckets, 0), np.abs(past)
    past = np.maximum(past, 0)
    exact = num_buckets // 2
    # float32 as in T5X, whose epsilon keeps exact powers from rounding down.
    ratio = past.astype(np.float32) / exact + np.finfo(np.float32).eps
    growth = np.log(ratio) / np.log(max_distance / exact) * (num_buckets - exact)
    far = np.minimum(exact + growth.astype(np.int32), num_buckets - 1)
    return (offset + np.where(past < exact, past, far)).astype(np.int32)


def toeplitz(
    values: Float[Array, "heads period"], *, num_rows: int
) -> Float[Array, "heads rows columns"]:
    """Row i, column j holds `values[:, j - i + num_rows - 1]`; the last value is not used.

    The values are laid out row after row, one element short of their period, which shifts each
    row by one. The gradient is a padded sum; no gather or scatter over [rows, columns] is made.
    """
    heads, period = values.shape
    rows = jnp.broadcast_to(values[:, None], (heads, num_rows, period))
    rows = rows.reshape(heads, -1)[:, : num_rows * (period - 1)]
    return rows.reshape(heads, num_rows, period - 1)[:, :, num_rows - 1 :]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("table",),
    meta_fields=("bidirectional", "max_distance"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class RelativeBias:
    """A relative-position table [heads, buckets] and how distances map to its buckets."""

    table: Float[Array, "heads buckets"]
    bidirectional: bool
    max_distance: int

    def buckets(self, distances: Int[np.ndarray, "..."]) -> Int[np.ndarray, "..."]:
        """The bucket of every distance, key position - query position."""
        return relative_position_bucket(
            distances,
            bidirectional=self.bidirectional,
            num_buckets=self.table.shape[-1],
            max_distance=self.max_distance,
        )

    def dense(
        self, query_length: int, key_length: int, *, first_key: int = 0
    ) -> Float[Array, "heads query key"]:
        """The bias of every pair, in the table's dtype; keys start at position `first_key`."""
        distances = np.arange(1 - query_length, key_length + 1) + first_key
        return toeplitz(self.table[:, self.buckets(distances)], num_rows=query_length)

    def behind(self, distances: Int[Array, " key"]) -> Float[Array, "heads key"]:
        """The bias of keys that stand `distances` >= 0 positions before their query."""
        buckets = self.buckets(-np.arange(self.max_distance + 1))  # Saturated at the last one.
        return self.table[:, jnp.asarray(buckets)[jnp.minimum(distances, self.max_distance)]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlibiBias:
    """Minus the distance times a slope a head, which is not learned.

    Attention with linear biases (Press et al. 2022, arXiv:2108.12409).
    """

    num_heads: int
    scale: float

    def slopes(self) -> Float[np.ndarray, " heads"]:
        """Powers of 2 ** (-8 / n); above the largest power of two, every other one of 2 n."""

        def powers(n: int) -> np.ndarray:
            return 2.0 ** (-8.0 / n * np.arange(1, n + 1))

        n = 2 ** int(np.log2(self.num_heads))
        return np.concatenate([powers(n), powers(2 * n)[::2][: self.num_heads - n]]) * self.scale

    def dense(
        self, query_length: int, key_length: int, *, first_key: int = 0
    ) -> Float[Array, "heads query key"]:
        """The bias of every pair, in float32; keys start at position `first_key`."""
        distances = np.arange(1 - query_length, key_length + 1) + first_key
        values = -np.abs(distances) * self.slopes()[:, None]
        return toeplitz(jnp.asarray(values, jnp.float32), num_rows=query_length)

    def behind(self, distances: Int[Array, " key"]) -> Float[Array, "heads key"]:
        """The bias of keys that stand `distances` >= 0 positions before their query."""
        return -distances.astype(jnp.float32) * self.slopes()[:, None].astype(np.float32)


PositionBias = RelativeBias | AlibiBias
