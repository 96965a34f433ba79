"""What every optimizer shares: parameter groups, clipping, weight decay, the learning rate.

An optimizer here is a direction (an optax transformation) and four rules about it. The learning
rate is an argument of `update`, not a counter inside: what the step logs is what was applied.
"""

from __future__ import annotations

import abc
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jaxtyping import Array, Float

from t5x_like.errors import UserError
from t5x_like.models.base import ParamInfo
from t5x_like.parallel.logical import path_name

PyTree = Any

# Axes along which one array holds many parameters; each is updated as if it stood alone.
STACKING_AXES = ("layers", "stage", "experts")


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Settings for the parameters whose whole path matches a regular expression.

    Attributes:
      pattern: matched against all of a path such as "encoder/layers/mlp/wi_0/kernel".
      weight_decay: instead of the optimizer's; None keeps that.
      learning_rate_scale: multiplies the schedule's rate.
      frozen: the parameters keep their values, and have no gradient and no optimizer state.

    Raises:
      UserError: the pattern is no regular expression.
    """

    pattern: str
    weight_decay: float | None = None
    learning_rate_scale: float = 1.0
    frozen: bool = False

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UserError(
                f"ParameterGroup.pattern '{self.pattern}' is no regular expression: {error}."
            ) from error


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """A built optimizer: the interface of `optax.GradientTransformation` with the rate explicit.

    `init` and `update` see the trainable parameters only (see `split`). Arrays in the state lie
    under the path of their parameter; each of their dims is the parameter's or 1.

    Attributes:
      init: parameters -> state.
      update: (gradients, state, parameters, learning_rate=float32[]) -> (what to add to the
        parameters, new state).
      trainable: paths ("a/b/c") of the parameters that are trained.
      param_info: nested dict of `ParamInfo`, of all parameters.
    """

    init: Callable[[PyTree], PyTree]
    update: Callable[..., tuple[PyTree, PyTree]]
    trainable: frozenset[str]
    param_info: Mapping[str, Any]

    def split(self, params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns (trainable, frozen): two nested dicts that `merge` joins again."""
        flat = traverse_util.flatten_dict(dict(params), sep="/")
        trained = {path: leaf for path, leaf in flat.items() if path in self.trainable}
        frozen = {path: leaf for path, leaf in flat.items() if path not in self.trainable}
        return (
            traverse_util.unflatten_dict(trained, sep="/"),
            traverse_util.unflatten_dict(frozen, sep="/"),
        )

    def merge(self, trained: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
        """Joins the two parts that `split` made."""
        if not frozen:
            return dict(trained)
        parts = [traverse_util.flatten_dict(dict(part)) for part in (trained, frozen)]
        return traverse_util.unflatten_dict({**parts[0], **parts[1]})

    def state_logical_axes(self) -> PyTree:
        """Returns the logical axes of every leaf of the state, as a tree like the state.

        A leaf under a parameter's path has that parameter's axes, None where its dim was reduced
        to 1 (Adafactor's factored moments). Every other leaf stays whole.
        """
        abstract = jax.tree.map(lambda i: jax.ShapeDtypeStruct(i.shape, i.dtype), self.param_info)
        state = jax.eval_shape(self.init, self.split(abstract)[0])
        infos = traverse_util.flatten_dict(dict(self.param_info), sep="/")

        def axes(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> LogicalAxes:
            names = path_name(path).split("/")
            tails = ("/".join(names[start:]) for start in range(len(names)))
            info = next((infos[tail] for tail in tails if tail in infos), None)
            if info is None or len(info.shape) != leaf.ndim:
                return LogicalAxes((None,) * leaf.ndim)
            named = zip(info.logical_axes, info.shape, leaf.shape, strict=True)
            return LogicalAxes(axis if size == kept else None for axis, size, kept in named)

        return jax.tree_util.tree_map_with_path(axes, state)


class LogicalAxes(tuple[str | None, ...]):
    """Logical axis names of one array; a leaf of a pytree, which a plain tuple is not."""

    __slots__ = ()


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(abc.ABC):
    """Settings that every optimizer has.

    Attributes:
      weight_decay: decoupled from the gradient (Loshchilov and Hutter, 2019): each update takes
        learning_rate * weight_decay * parameter away.
      clip_global_norm: gradients of a larger global L2 norm are scaled down to it; None for no
        clipping. Frozen parameters do not count.
      groups: the first whose pattern matches a parameter's path holds for it.

    Raises:
      UserError: a setting out of its range.
    """

    weight_decay: float = 0.0
    clip_global_norm: float | None = None
    groups: Sequence[ParameterGroup] = field(default=())

    def __post_init__(self) -> None:
        if self.clip_global_norm is not None and self.clip_global_norm <= 0:
            raise UserError(
                f"{type(self).__name__}.clip_global_norm is {self.clip_global_norm}: "
                "give a positive norm, or None for no clipping."
            )

    @abc.abstractmethod
    def direction(self, param_info: Mapping[str, Any]) -> optax.GradientTransformationExtraArgs:
        """Returns gradients -> what to subtract from the parameters, learning rate included.

        Its `update` gets the keyword `learning_rate`; see `times_learning_rate`.
        """

    def decay_rate(self, learning_rate: Float[Array, ""]) -> Float[Array, ""]:
        """Returns what `weight_decay` is multiplied by."""
        return learning_rate

    def build(self, param_info: Mapping[str, Any]) -> Optimizer:
        """Builds the optimizer of these parameters.

        Args:
          param_info: nested dict of `ParamInfo`, of all parameters.

        Raises:
          UserError: a group that no parameter belongs to, or nothing left to train.
        """
        infos = traverse_util.flatten_dict(dict(param_info), sep="/")
        group_of = assign_groups(self.groups, list(infos))
        trained = {
            path: info for path, info in infos.items() if info.trained and not group_of[path].frozen
        }
        if not trained:
            raise UserError("The parameter groups freeze every parameter: nothing is trained.")
        direction = self.direction(traverse_util.unflatten_dict(trained, sep="/"))

        def update(
            grads: PyTree, state: PyTree, params: PyTree, *, learning_rate: Float[Array, ""]
        ) -> tuple[PyTree, PyTree]:
            grads = clip_by_global_norm(grads, self.clip_global_norm)
            steps, state = direction.update(grads, state, params, learning_rate=learning_rate)

            def delta(path: tuple[Any, ...], step: Array, param: Array) -> Array:
                group = group_of[path_name(path)]
                rate = learning_rate * group.learning_rate_scale
                decay = self.weight_decay if group.weight_decay is None else group.weight_decay
                step = group.learning_rate_scale * step
                return -(step + self.decay_rate(rate) * decay * param) if decay else -step

            return jax.tree_util.tree_map_with_path(delta, steps, params), state

        return Optimizer(
            init=direction.init,
            update=update,
            trainable=frozenset(trained),
            param_info=param_info,
        )


def assign_groups(
    groups: Sequence[ParameterGroup], paths: Sequence[str]
) -> dict[str, ParameterGroup]:
    """Returns the group of every path: the first whose pattern matches all of it.

    Raises:
      UserError: a group is nobody's first match.
    """
    rest = ParameterGroup(pattern=".*")
    group_of = {
        path: next((g for g in groups if re.fullmatch(g.pattern, path)), rest) for path in paths
    }
    for group in groups:
        if any(chosen is group for chosen in group_of.values()):
            continue
        taken = [path for path in paths if re.fullmatch(group.pattern, path)]
        reason = (
            f"only parameters that earlier groups take (such as {taken[0]}): move it up"
            if taken
            else f"none of the {len(paths)} parameters: it must match a whole path such as "
            f"'{paths[0]}'."
        )
        raise UserError(f"ParameterGroup.pattern '{group.pattern}' matches {reason}")
    return group_of


def times_learning_rate(
    transformation: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Returns `transformation` with its updates multiplied by the keyword `learning_rate`."""

    def update(
        grads: PyTree, state: PyTree, params: PyTree, *, learning_rate: Float[Array, ""]
    ) -> tuple[PyTree, PyTree]:
        updates, state = transformation.update(grads, state, params)
        return jax.tree.map(lambda u: learning_rate * u, updates), state

    return optax.GradientTransformationExtraArgs(transformation.init, update)


def clip_by_global_norm(grads: PyTree, max_norm: float | None) -> PyTree:
    """Scales gradients down to a global L2 norm of `max_norm`; None leaves them alone."""
    if max_norm is None:
        return grads
    scale = jnp.minimum(1.0, max_norm / optax.tree.norm(grads))
    return jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)


def num_stacked(info: ParamInfo) -> int:
    """Returns how many leading dims of a parameter are stacking axes."""
    stacked = [axis in STACKING_AXES for axis in info.logical_axes]
    count = stacked.index(False) if False in stacked else len(stacked)
    if any(stacked[count:]):
        raise ValueError(f"stacking axes must come first, not as in {info.logical_axes}")
    return count


def per_layer(function: Callable[..., Any], *, num_stacked: int) -> Callable[..., Any]:
    """Returns `function` mapped over that many leading dims of all of its arguments."""
    for _ in range(num_stacked):
        function = jax.vmap(function)
    return function
