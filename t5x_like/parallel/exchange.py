"""Work on tokens device by device, with experts spread over the `expert` axis of the mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Shaped

from t5x_like.errors import UserError
from t5x_like.parallel.logical import active_mesh

EXPERT = "expert"


def over_tokens(
    function: Callable[..., Shaped[Array, "groups ..."]],
    tokens: Any,
    experts: Any,
    shared: Any,
    *,
    num_experts: int,
) -> Shaped[Array, "groups ..."]:
    """`function(tokens, experts, shared, degree)` on each device's groups of tokens.

    The mesh axes that shard the batch, and `expert`, are the function's own (`jax.shard_map`,
    replication checked); the others, such as `tensor`, stay the partitioner's. Where there is no
    mesh, or one device holds all groups, the function sees everything at once.

    Args:
      function: `degree` is the size of the expert axis, over which it may communicate.
      tokens: pytree of arrays [groups, ...], sharded over the batch's axes.
      experts: pytree of arrays [experts, ...], sharded over the expert axis.
      shared: pytree of arrays that all devices have.
      num_experts: leading dim of `experts`.

    Raises:
      UserError: the expert axis does not divide the experts, or does not shard the batch.
    """
    active = active_mesh()
    if active is None:
        return function(tokens, experts, shared, 1)
    mesh, rules = active
    batch_axes = tuple(a for a in rules.axes_of("batch", table="compute") if mesh.shape[a] > 1)
    degree = mesh.shape[EXPERT]
    if degree > 1:
        check_expert_axis(num_experts, degree, batch_axes)
    if not batch_axes:
        return function(tokens, experts, shared, 1)
    by_group = PartitionSpec(batch_axes)
    by_expert = PartitionSpec(EXPERT if degree > 1 else None)
    return jax.shard_map(
        lambda *args: function(*args, degree),
        mesh=mesh,
        in_specs=(by_group, by_expert, PartitionSpec()),
        out_specs=by_group,
        axis_names=set(batch_axes),
        check_vma=True,
    )(tokens, experts, shared)


def check_expert_axis(num_experts: int, degree: int, batch_axes: tuple[str, ...]) -> None:
    """Raises UserError unless `degree` devices can share the experts and exchange tokens."""
    if num_experts % degree:
        raise UserError(
            f"MoeConfig.num_experts {num_experts} is not divisible by the expert axis of the "
            f"mesh, {degree}: choose a degree in MESH that divides {num_experts}"
        )
    if EXPERT not in batch_axes:
        raise UserError(
            f"The mesh has an expert axis of {degree}, and Rules.compute['batch'] is "
            f"{batch_axes}: add 'expert', so that devices have tokens to exchange"
        )


def all_to_all(x: Shaped[Array, "..."], *, split: int, concat: int) -> Shaped[Array, "..."]:
    """Sends part i of dim `split` to device i of the expert axis; joins what comes on `concat`."""
    return jax.lax.all_to_all(x, EXPERT, split_axis=split, concat_axis=concat, tiled=True)


def all_gather(x: Shaped[Array, "groups ..."]) -> Shaped[Array, "more_groups ..."]:
    """The groups of all devices of the expert axis."""
    return jax.lax.all_gather(x, EXPERT, axis=0, tiled=True)


def reduce_scatter(x: Shaped[Array, "more_groups ..."]) -> Shaped[Array, "groups ..."]:
    """Sums over the devices of the expert axis; each keeps its own groups."""
    return jax.lax.psum_scatter(x, EXPERT, scatter_dimension=0, tiled=True)


def expert_index() -> Array:
    """Which part of the experts this device has."""
    return jax.lax.axis_index(EXPERT)
