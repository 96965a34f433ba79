"""Products of rows, grouped by expert, with each group's own matrix: `y[r] = x[r] @ w[group(r)]`.

Two backends. `ragged` is XLA's own `ragged_dot`. `blocked` lays every group out in whole blocks of
rows and multiplies block by block: on a CPU `ragged_dot` multiplies all rows with all matrices.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

logger = logging.getLogger(__name__)

Backend = Literal["auto", "ragged", "blocked"]
BACKENDS = ("auto", "ragged", "blocked")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("starts", "sizes"),
    meta_fields=("num_rows", "align"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Groups:
    """Where each group's rows lie: `sizes[e]` rows from `starts[e]`, a multiple of `align`.

    Rows between the end of a group and the start of the next are no group's.
    """

    starts: Int[Array, " groups"]
    sizes: Int[Array, " groups"]
    num_rows: int
    align: int

    @classmethod
    def of(cls, sizes: Int[Array, " groups"], *, total: int, align: int) -> Groups:
        """Groups of these sizes one after another; `total` bounds the sum of the sizes."""
        aligned = -(-sizes // align) * align
        num_rows = -(-(total + len(sizes) * (align - 1)) // align) * align
        starts = jnp.cumsum(aligned) - aligned
        return cls(starts=starts, sizes=sizes, num_rows=num_rows, align=align)

    def of_rows(self, rows: Int[Array, " rows"]) -> Int[Array, " rows"]:
        """The group of each row; a row after the last group's start is the last group's."""
        return jnp.sum(rows[:, None] >= self.starts[None, 1:], axis=1, dtype=jnp.int32)


@functools.cache
def choose_backend(name: Backend, platform: str) -> Literal["ragged", "blocked"]:
    """The backend that runs on `platform`, and a log line that says why."""
    if name != "auto":
        logger.info("Grouped matmul: %s, as configured", name)
        return name
    if platform == "cpu":
        logger.info("Grouped matmul: blocked; on a CPU ragged_dot multiplies with every matrix")
        return "blocked"
    logger.info("Grouped matmul: ragged (jax.lax.ragged_dot) on %s", platform)
    return "ragged"


def row_alignment(backend: Literal["ragged", "blocked"], *, rows: int, groups: int) -> int:
    """Rows in a block: about half of a mean group, so that padding adds a quarter to the work."""
    if backend == "ragged":
        return 1
    half = max(1, rows // (2 * groups))
    return min(256, max(8, 1 << (half.bit_length() - 1)))


def grouped_matmul(
    x: Float[Array, "rows inputs"], w: Float[Array, "groups inputs outputs"], groups: Groups
) -> Float[Array, "rows outputs"]:
    """`x[r] @ w[group of r]`; unspecified, but finite, in rows of no group.

    `ragged_dot` where `groups.align` is 1, else block by block.
    """
    w = like_varying(w, x)
    if groups.align == 1:
        return jax.lax.ragged_dot(x, w, groups.sizes)
    return _blocked(x, w, groups)


def like_varying(x: jax.Array, other: jax.Array) -> jax.Array:
    """Under `shard_map`, marks `x` as differing between devices wherever `other` does."""
    missing = _varying(other) - _varying(x)
    return jax.lax.pcast(x, tuple(missing), to="varying") if missing else x


def _varying(x: jax.Array) -> frozenset[str]:
    """The manual mesh axes along which `x` may differ; where it is kept depends on the version."""
    kind: Any = jax.typeof(x)
    return kind.mat.varying if hasattr(kind, "mat") else kind.vma


@jax.custom_vjp
def _blocked(x: jax.Array, w: jax.Array, groups: Groups) -> jax.Array:
    blocks = x.reshape(-1, groups.align, x.shape[1])
    group, used = _used_blocks(groups)

    def multiply(i: Any, y: jax.Array) -> jax.Array:
        return y.at[i].set(blocks[i] @ w[group[i]])

    y = like_varying(jnp.zeros((*blocks.shape[:2], w.shape[2]), x.dtype), x)
    return jax.lax.fori_loop(0, used, multiply, y).reshape(x.shape[0], -1)


def _used_blocks(groups: Groups) -> tuple[jax.Array, jax.Array]:
    """The group of every block of rows, and how many blocks hold any row."""
    first_rows = jnp.arange(groups.num_rows // groups.align, dtype=jnp.int32) * groups.align
    end = groups.starts[-1] + groups.sizes[-1]
    return groups.of_rows(first_rows), -(-end // groups.align)


def _forward(x: jax.Array, w: jax.Array, groups: Groups) -> tuple[jax.Array, Any]:
    return _blocked(x, w, groups), (x, w, groups)


def _backward(saved: Any, grad: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x, w, groups = saved
    blocks = x.reshape(-1, groups.align, x.shape[1])
    grads = grad.reshape(-1, groups.align, grad.shape[1])
    group, used = _used_blocks(groups)

    def multiply(i: Any, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        dx, dw = sums
        dx = dx.at[i].set(grads[i] @ w[group[i]].T)
        product = jnp.matmul(blocks[i].T, grads[i], preferred_element_type=dw.dtype)
        return dx, dw.at[group[i]].add(product)

    dw_dtype = jnp.promote_types(w.dtype, jnp.float32)
    zeros = (jnp.zeros_like(blocks), jnp.zeros(w.shape, dw_dtype))
    dx, dw = jax.lax.fori_loop(0, used, multiply, tuple(like_varying(z, grad) for z in zeros))
    return dx.reshape(x.shape), dw.astype(w.dtype), None


_blocked.defvjp(_forward, _backward)
