"""Logical axis names -> mesh axes: one table for what is stored, one for what is computed.

Models name the dims of their arrays ("embed", "heads", "batch"); only the two tables here, bound
in gin, know how these are laid out on a mesh.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from t5x_like.errors import UserError, did_you_mean
from t5x_like.parallel.mesh import AXES

MeshAxes = str | Sequence[str] | None


class ArrayInfo(Protocol):
    """What sharding needs to know of a parameter; `models.base.ParamInfo` is one."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> Any: ...
    @property
    def logical_axes(self) -> tuple[str | None, ...]: ...


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Which mesh axes shard each logical axis.

    In one array a mesh axis is used at most once: the first dim that names it has it.

    Attributes:
      storage: logical axis -> mesh axis, several of them (major first), or None for a dim that
        stays whole; for parameters and optimizer state, as they lie between steps.
      compute: the same for activations, and for parameters while they are used.
      replicate_if_indivisible: logical axes whose dims stay whole where their mesh axes do not
        divide them. For every other axis that is an error.

    Raises:
      UserError: a rule names an unknown mesh axis, or one twice.
    """

    storage: Mapping[str, MeshAxes]
    compute: Mapping[str, MeshAxes]
    replicate_if_indivisible: Sequence[str] = ()

    def __post_init__(self) -> None:
        for table in ("storage", "compute"):
            for name, mesh_axes in getattr(self, table).items():
                self._check_rule(table, name, _as_tuple(mesh_axes))
        for name in self.replicate_if_indivisible:
            if name not in self.storage and name not in self.compute:
                known = sorted({*self.storage, *self.compute})
                raise UserError(
                    f"Rules.replicate_if_indivisible names '{name}', which has no rule."
                    f"{did_you_mean(name, known)}"
                )

    def _check_rule(self, table: str, name: str, mesh_axes: tuple[str, ...]) -> None:
        for axis in mesh_axes:
            if axis not in AXES:
                raise UserError(
                    f"Rules.{table}['{name}'] names an unknown mesh axis '{axis}'."
                    f"{did_you_mean(axis, AXES)} The axes are {', '.join(AXES)}."
                )
        if len(set(mesh_axes)) < len(mesh_axes):
            raise UserError(f"Rules.{table}['{name}'] names a mesh axis twice: {mesh_axes}.")

    def spec(
        self,
        shape: Sequence[int],
        logical_axes: Sequence[str | None],
        *,
        mesh: Mesh,
        table: Literal["storage", "compute"],
        name: str,
    ) -> PartitionSpec:
        """Returns the partition of one array. Mesh axes of size 1 are left out.

        Args:
          shape: of the whole array.
          logical_axes: one name for each dim; None for a dim that stays whole.
          mesh: the mesh.
          table: which rules to use.
          name: what the error message calls the array.

        Raises:
          UserError: a logical axis without a rule, or a dim that its mesh axes do not divide.
        """
        if len(shape) != len(logical_axes):
            raise ValueError(f"{name}: shape {tuple(shape)} and axes {tuple(logical_axes)} differ")
        used: set[str] = set()
        entries: list[str | tuple[str, ...] | None] = []
        for dim, (size, logical) in enumerate(zip(shape, logical_axes, strict=True)):
            free = [
                axis
                for axis in self._mesh_axes(logical, table=table, name=name)
                if mesh.shape[axis] > 1 and axis not in used
            ]
            if size % math.prod(mesh.shape[axis] for axis in free):
                degrees = {axis: mesh.shape[axis] for axis in free}
                self._check_may_replicate(name, dim, size, logical, degrees)
                free = []
            used.update(free)
            entries.append(free[0] if len(free) == 1 else tuple(free) or None)
        return PartitionSpec(*entries)

    def axes_of(self, logical: str, *, table: Literal["storage", "compute"]) -> tuple[str, ...]:
        """Returns the mesh axes that the rule of a logical axis names, major first."""
        return self._mesh_axes(logical, table=table, name="an array")

    def _mesh_axes(self, logical: str | None, *, table: str, name: str) -> tuple[str, ...]:
        if logical is None:
            return ()
        rules = getattr(self, table)
        if logical not in rules:
            raise UserError(
                f"{name} has the logical axis '{logical}', for which Rules.{table} has no rule."
                f"{did_you_mean(logical, rules)} Add '{logical}': None to keep it whole."
            )
        return _as_tuple(rules[logical])

    def _check_may_replicate(
        self, name: str, dim: int, size: int, logical: str | None, degrees: Mapping[str, int]
    ) -> None:
        if logical in self.replicate_if_indivisible:
            return
        product = math.prod(degrees.values())
        axes = " x ".join(f"{axis} {degree}" for axis, degree in degrees.items())
        remedy = (
            f"choose a multiple of {product} for BATCH_SIZE / MICROBATCHES"
            if logical == "batch"
            else f"choose degrees in MESH that divide {size}, "
            f"or add '{logical}' to Rules.replicate_if_indivisible"
        )
        raise UserError(
            f"{name}: dim {dim} ('{logical}') of size {size} is not divisible "
            f"by the mesh axes {axes}: {remedy}."
        )


_ACTIVE: contextvars.ContextVar[tuple[Mesh, Rules] | None] = contextvars.ContextVar(
    "active mesh and rules", default=None
)


@contextlib.contextmanager
def use_rules(mesh: Mesh, rules: Rules) -> Iterator[None]:
    """Within it (while a function is traced), `constrain` lays arrays out on `mesh` by `rules`."""
    token = _ACTIVE.set((mesh, rules))
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def active_mesh() -> tuple[Mesh, Rules] | None:
    """The mesh and rules of the enclosing `use_rules`, if any."""
    return _ACTIVE.get()


def constrain(
    x: Shaped[Array, "*shape"],
    logical_axes: Sequence[str | None],
    *,
    table: Literal["storage", "compute"] = "compute",
) -> Shaped[Array, "*shape"]:
    """Tells the partitioner how `x` lies on the mesh; returns `x` itself outside of `use_rules`.

    Args:
      x: any traced array.
      logical_axes: one name for each dim; None for a dim that stays whole.
      table: "compute" for activations and for parameters in use, "storage" for what has the
        layout of stored parameters, such as gradients.

    Raises:
      UserError: see `Rules.spec`.
    """
    if (active := _ACTIVE.get()) is None:
        return x
    mesh, rules = active
    named = ", ".join(str(axis) for axis in logical_axes)
    spec = rules.spec(x.shape, logical_axes, mesh=mesh, table=table, name=f"array [{named}]")
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def param_shardings(mesh: Mesh, rules: Rules, param_info: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the storage sharding of every parameter, as nested dicts like `param_info`."""

    def sharding(path: tuple[Any, ...], info: ArrayInfo) -> NamedSharding:
        name = f"parameter {path_name(path)}"
        spec = rules.spec(info.shape, info.logical_axes, mesh=mesh, table="storage", name=name)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, dict(param_info))


def check_replication(
    mesh: Mesh, rules: Rules, param_info: Mapping[str, Any], *, tolerance: float = 0.02
) -> None:
    """Guards against rules that silently leave parameters whole on every device.

    Nothing is checked on a mesh that is not sharded (one that has only the data axis).

    Raises:
      UserError: the parameters without any sharded dim are more than `tolerance` of all
        parameter bytes, naming the largest; or a mesh axis shards neither parameters nor batch.
    """
    degrees = {axis: size for axis, size in mesh.shape.items() if size > 1 and axis != "data"}
    if not degrees:
        return
    infos = jax.tree_util.tree_leaves_with_path(dict(param_info))
    shardings = jax.tree.leaves(param_shardings(mesh, rules, param_info))
    sizes = {path_name(p): math.prod(i.shape) * np.dtype(i.dtype).itemsize for p, i in infos}
    axes_of = [_spec_axes(sharding.spec) for sharding in shardings]
    whole = {n: sizes[n] for n, axes in zip(sizes, axes_of, strict=True) if not axes}
    share = sum(whole.values()) / sum(sizes.values())
    if share > tolerance:
        largest = sorted(whole, key=whole.__getitem__, reverse=True)
        more = f" and {len(largest) - 5} more" if len(largest) > 5 else ""
        raise UserError(
            f"{share:.1%} of the parameter bytes are whole on every device of the mesh {degrees} "
            f"(allowed: {tolerance:.0%}): {', '.join(largest[:5])}{more}. Give one of their "
            "logical axes a mesh axis in Rules.storage, or use the data axis in MESH."
        )
    unused = set(degrees).difference(*axes_of, _as_tuple(rules.compute.get("batch")))
    if unused:
        raise UserError(
            f"The mesh axes {', '.join(sorted(unused))} of {degrees} shard no parameter and no "
            "batch of this model: set their degree in MESH to 1."
        )


def batch_sharding(mesh: Mesh, rules: Rules) -> NamedSharding:
    """Returns the sharding of every array of a batch: its rows, by the compute rule of "batch"."""
    axes = [a for a in _as_tuple(rules.compute["batch"]) if mesh.shape[a] > 1]
    return NamedSharding(mesh, PartitionSpec(tuple(axes) or None))


def local_rows(mesh: Mesh, rules: Rules, batch_size: int) -> np.ndarray:
    """Returns the rows of the global batch that this process must deliver, ascending.

    Every row is delivered by at least one process; by several where they hold the same rows (for
    instance when the tensor axis crosses processes).

    Raises:
      UserError: the mesh does not divide the batch.
    """
    rules.spec((batch_size,), ("batch",), mesh=mesh, table="compute", name="the global batch")
    sharding = batch_sharding(mesh, rules)
    slices = sharding.addressable_devices_indices_map((batch_size,)).values()
    rows = [np.arange(batch_size)[index] for index in slices if index is not None]
    return np.unique(np.concatenate(rows))


def to_global(
    mesh: Mesh, rules: Rules, local_batch: Mapping[str, np.ndarray], batch_size: int
) -> dict[str, jax.Array]:
    """Makes the global batch of what each process delivers; row r of it lies at row r.

    Args:
      mesh: the mesh.
      rules: the rules.
      local_batch: arrays [len(local_rows(...)), ...]: the rows of `local_rows`, in that order.
      batch_size: rows of the global batch.

    Returns:
      Arrays [batch_size, ...], sharded by `batch_sharding`.
    """
    rows = local_rows(mesh, rules, batch_size)
    sharding = batch_sharding(mesh, rules)

    def place(name: str, array: np.ndarray) -> jax.Array:
        if len(array) != len(rows):
            raise ValueError(f"'{name}' has {len(array)} rows; this process delivers {len(rows)}")

        def part(index: Any) -> np.ndarray:  # a slice for each dim
            start, stop, _ = index[0].indices(batch_size)
            first = int(np.searchsorted(rows, start))
            return array[first : first + stop - start]

        return jax.make_array_from_callback((batch_size, *array.shape[1:]), sharding, part)

    return {name: place(name, np.asarray(array)) for name, array in local_batch.items()}


def path_name(path: Sequence[Any]) -> str:
    """Returns the pytree path of a parameter as "encoder/layers/mlp/wo/kernel"."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def _as_tuple(mesh_axes: MeshAxes) -> tuple[str, ...]:
    if mesh_axes is None:
        return ()
    return (mesh_axes,) if isinstance(mesh_axes, str) else tuple(mesh_axes)


def _spec_axes(spec: PartitionSpec) -> set[str]:
    return {axis for entry in spec for axis in _as_tuple(entry)}
