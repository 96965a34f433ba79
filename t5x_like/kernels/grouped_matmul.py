"""Products of rows, grouped by expert, with each group's own matrix: `y[r] = x[r] @ w[group(r)]`.

Two backends. `ragged` is XLA's own `ragged_dot`. `blocked` multiplies a block of rows of one group
after the other: on a CPU `ragged_dot` multiplies all rows with all matrices.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

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
    """Rows in a block: a third more than a mean group, so that most groups are one block.

    A processor reorders a matrix before it multiplies, as long as it takes for some 30 rows: so
    the fewer blocks the better.
    """
    if backend == "ragged":
        return 0
    return min(512, -(-4 * rows // (3 * groups * 16)) * 16)


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
    """Blocks in the order of their rows: each one's group, first row, rows, whether it is
    the first of its group; and their number.

    A block is read and written at its full size. What it writes beyond its own rows, the blocks
    after it write again.
    """

    group: Int[Array, " blocks"]
    start: Int[Array, " blocks"]
    rows: Int[Array, " blocks"]
    is_first: Bool[Array, " blocks"]
    used: Int[Array, ""]

    @classmethod
    def of(cls, groups: Groups, *, least: int) -> _Blocks:
        """At least `least` blocks, of no rows if need be, for every group."""
        size, num_groups = groups.block, len(groups.sizes)
        ends = jnp.cumsum(jnp.maximum(-(-groups.sizes // size), least))
        index = jnp.arange(groups.num_rows // size + num_groups, dtype=jnp.int32)
        group = jnp.sum(index[:, None] >= ends[None, :-1], axis=1, dtype=jnp.int32)
        before = (index - jnp.where(group > 0, ends[group - 1], 0)) * size
        return cls(
            group=group,
            start=groups.starts[group] + before,
            rows=jnp.minimum(groups.sizes[group] - before, size),
            is_first=before == 0,
            used=ends[-1],
        )


def _at(x: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, index, keepdims=False)


def _set(x: jax.Array, part: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(x, part, index, 0)


def _rows_of(x: jax.Array, start: jax.Array, count: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, count)


def _set_rows(x: jax.Array, rows: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, rows, start, 0)


# The last block of a group is multiplied at the least of these shares that has room for its rows.
_SHARES = (0.25, 0.5, 0.75, 1.0)
_WHOLE = 64  # rows of a block for which it is not worth it


def _of_size(size: int, rows: jax.Array, function: Callable[..., Any], *args: jax.Array) -> Any:
    """`function(n, *args)` for the least share n of a block of `size` that has room for `rows`."""
    if size <= _WHOLE:
        return function(size, *args)
    sizes = [int(size * share) for share in _SHARES]
    index = jnp.sum(rows > jnp.asarray(sizes[:-1], jnp.int32), dtype=jnp.int32)
    return jax.lax.switch(index, [functools.partial(function, n) for n in sizes], *args)


def _filled(rows: jax.Array, size: int) -> jax.Array:
    return jnp.pad(rows, ((0, size - len(rows)), (0, 0)))


@jax.custom_vjp
def _blocked(x: jax.Array, w: jax.Array, groups: Groups) -> jax.Array:
    blocks, size = _Blocks.of(groups, least=0), groups.block

    def multiply(i: Any, y: jax.Array) -> jax.Array:
        def product(n: int, start: jax.Array, kernel: jax.Array) -> jax.Array:
            return _filled(_rows_of(x, start, n) @ kernel, size)

        start = blocks.start[i]
        rows = _of_size(size, blocks.rows[i], product, start, _at(w, blocks.group[i]))
        return _set_rows(y, rows, start)

    y = like_varying(jnp.zeros((len(x), w.shape[2]), x.dtype), x)
    return jax.lax.fori_loop(0, blocks.used, multiply, y)


def _forward(x: jax.Array, w: jax.Array, groups: Groups) -> tuple[jax.Array, Any]:
    return _blocked(x, w, groups), (x, w, groups)


def _backward(saved: Any, grad: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x, w, groups = saved
    blocks, size = _Blocks.of(groups, least=1), groups.block
    wide = jnp.promote_types(w.dtype, jnp.float32)

    def multiply(i: Any, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        def products(
            n: int, start: jax.Array, rows: jax.Array, kernel: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            dy = _rows_of(grad, start, n)
            own = jnp.where((jnp.arange(n) < rows)[:, None], _rows_of(x, start, n), 0)
            return _filled(dy @ kernel.T, size), jnp.matmul(own.T, dy, preferred_element_type=wide)

        (dx, dw), start, group = sums, blocks.start[i], blocks.group[i]
        rows, product = _of_size(
            size, blocks.rows[i], products, start, blocks.rows[i], _at(w, group)
        )
        before = jnp.where(blocks.is_first[i], 0, _at(dw, group))
        return _set_rows(dx, rows, start), _set(dw, before + product, group)

    # The first block of a group writes it. To fill it before would take as long again.
    sums = (jnp.zeros_like(x), jax.lax.empty(w.shape, wide))
    varying = tuple(like_varying(s, grad) for s in sums)
    dx, dw = jax.lax.fori_loop(0, blocks.used, multiply, varying)
    return dx, dw.astype(w.dtype), None


_blocked.defvjp(_forward, _backward)
