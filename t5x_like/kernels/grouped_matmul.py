"""Products of rows, grouped by expert, with each group's own matrix: `y[r] = x[r] @ w[group(r)]`.

Two backends. `ragged` is XLA's own `ragged_dot`. `blocked` multiplies a block of rows of one group
after the other: on a CPU `ragged_dot` multiplies all rows with all matrices.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Backend = Literal["auto", "ragged", "blocked"]
BACKENDS = ("auto", "ragged", "blocked")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("starts", "sizes"),
    meta_fields=("num_rows", "block"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Groups:
    """Where each group's rows lie: `sizes[e]` rows from `starts[e]`, in the order of the groups.

    Rows between the end of a group and the start of the next are no group's. `block` is the number
    of rows that are multiplied at once, 0 for `ragged`; so many rows more lie after the last group.
    """

    starts: Int[Array, " groups"]
    sizes: Int[Array, " groups"]
    num_rows: int
    block: int

    @classmethod
    def of(cls, sizes: Int[Array, " groups"], *, total: int, block: int) -> Groups:
        """Groups of these sizes one after another; `total` bounds the sum of the sizes."""
        starts = jnp.cumsum(sizes) - sizes
        return cls(starts=starts, sizes=sizes, num_rows=total + block, block=block)

    def of_rows(self, rows: Int[Array, " rows"]) -> Int[Array, " rows"]:
        """The group of each row; a row after the last group's start is the last group's."""
        return jnp.sum(rows[:, None] >= self.starts[None, 1:], axis=1, dtype=jnp.int32)


def choose_backend(name: Backend, platform: str) -> tuple[Literal["ragged", "blocked"], str]:
    """The backend that runs on `platform`, and why."""
    if name != "auto":
        return name, "as configured"
    if platform == "cpu":
        return "blocked", "on a CPU ragged_dot multiplies with every matrix"
    return "ragged", f"jax.lax.ragged_dot is made for {platform}"


def block_rows(backend: Literal["ragged", "blocked"], *, rows: int, groups: int) -> int:
    """Rows in a block: a quarter more than a mean group, so that most groups are one block.

    A processor reorders a matrix before it multiplies, as long as it takes for some 30 rows: so
    the fewer blocks the better.
    """
    if backend == "ragged":
        return 0
    return min(512, -(-5 * rows // (4 * groups * 16)) * 16)


def grouped_matmul(
    x: Float[Array, "rows inputs"], w: Float[Array, "groups inputs outputs"], groups: Groups
) -> Float[Array, "rows outputs"]:
    """`x[r] @ w[group of r]`; unspecified, but finite, in rows of no group.

    `ragged_dot` where `groups.block` is 0, else block by block.
    """
    w = like_varying(w, x)
    if not groups.block:
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


class _Blocks(NamedTuple):
    """Blocks in the order of their rows: each one's group, first row, rows; and their number.

    A block is read and written at its full size. What it writes beyond its own rows, the blocks
    after it write again.
    """

    group: Int[Array, " blocks"]
    start: Int[Array, " blocks"]
    rows: Int[Array, " blocks"]
    used: Int[Array, ""]

    @classmethod
    def of(cls, groups: Groups) -> _Blocks:
        size, num_groups = groups.block, len(groups.sizes)
        ends = jnp.cumsum(-(-groups.sizes // size))
        index = jnp.arange(groups.num_rows // size + num_groups, dtype=jnp.int32)
        group = jnp.sum(index[:, None] >= ends[None, :-1], axis=1, dtype=jnp.int32)
        before = (index - jnp.where(group > 0, ends[group - 1], 0)) * size
        rows = jnp.minimum(groups.sizes[group] - before, size)
        return cls(group=group, start=groups.starts[group] + before, rows=rows, used=ends[-1])


def _rows_of(x: jax.Array, start: jax.Array, count: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, count)


def _set_rows(x: jax.Array, rows: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, rows, start, 0)


@jax.custom_vjp
def _blocked(x: jax.Array, w: jax.Array, groups: Groups) -> jax.Array:
    blocks = _Blocks.of(groups)

    def multiply(i: Any, y: jax.Array) -> jax.Array:
        rows = _rows_of(x, blocks.start[i], groups.block)
        return _set_rows(y, rows @ w[blocks.group[i]], blocks.start[i])

    y = like_varying(jnp.zeros((len(x), w.shape[2]), x.dtype), x)
    return jax.lax.fori_loop(0, blocks.used, multiply, y)


def _forward(x: jax.Array, w: jax.Array, groups: Groups) -> tuple[jax.Array, Any]:
    return _blocked(x, w, groups), (x, w, groups)


def _backward(saved: Any, grad: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x, w, groups = saved
    blocks = _Blocks.of(groups)
    wide = jnp.promote_types(w.dtype, jnp.float32)

    def multiply(i: Any, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        (dx, dw), start, group = sums, blocks.start[i], blocks.group[i]
        dy = _rows_of(grad, start, groups.block)
        own = (jnp.arange(groups.block) < blocks.rows[i])[:, None]
        inputs = jnp.where(own, _rows_of(x, start, groups.block), 0)
        product = jnp.matmul(inputs.T, dy, preferred_element_type=wide)
        return _set_rows(dx, dy @ w[group].T, start), dw.at[group].add(product)

    zeros = (jnp.zeros_like(x), jnp.zeros(w.shape, wide))
    varying = tuple(like_varying(z, grad) for z in zeros)
    dx, dw = jax.lax.fori_loop(0, blocks.used, multiply, varying)
    return dx, dw.astype(w.dtype), None


_blocked.defvjp(_forward, _backward)
