"""From an abstract module to parameters and back."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_like.layers.moe.layer import Moe
from t5x_like.layers.parameter import ModelState

Params = Mapping[str, Any]


class ModelConfig(Protocol):
    """What `ModelDef` needs: a config that builds its module with abstract parameters."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def dtype(self) -> str: ...

    def build(self) -> nnx.Module: ...


@dataclasses.dataclass(frozen=True)
class ParamInfo:
    """Shape, dtype and one logical axis name a dimension of a parameter.

    What is not `trained` is the model's own state: it has no gradient, and only the step itself
    changes it (`layers.parameter.ModelState`).
    """

    shape: tuple[int, ...]
    dtype: jnp.dtype
    logical_axes: tuple[str | None, ...]
    trained: bool = True


def _initialise(key: jax.Array, path: Iterable[Any], variable: nnx.Variable) -> jax.Array:
    """Draws a parameter. The key depends on the path and, in a stack, on the layer: a layer's
    values do not depend on how many layers there are or on how they are run."""
    abstract = variable.get_value()
    key = jax.random.fold_in(key, zlib.crc32("/".join(map(str, path)).encode()))
    shape, initializer = abstract.shape, variable.initializer
    if variable.logical_axes[0] != "layers":
        return initializer(key, shape, abstract.dtype)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(shape[0]))
    return jax.vmap(lambda k: initializer(k, shape[1:], abstract.dtype))(keys)


class ModelDef:
    """A model without its numbers: configuration, parameter shapes, initialisation, forward.

    Parameters are a nested dict of float32 arrays with the layers of a stack on a leading axis.

    Attributes:
      config: what it was built from.
      param_info: nested dict of `ParamInfo`, of the structure of the parameters.
      num_params: number of scalars in them that are trained.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._graphdef, self._abstract = nnx.split(config.build())
        self.param_info: dict[str, Any] = self._nest(
            lambda path, variable: ParamInfo(
                variable.get_value().shape,
                jnp.dtype(variable.get_value().dtype),
                tuple(variable.logical_axes),
                trained=not isinstance(variable, ModelState),
            )
        )
        leaves = jax.tree.leaves(self.param_info, is_leaf=lambda x: isinstance(x, ParamInfo))
        self.num_params = sum(math.prod(leaf.shape) for leaf in leaves if leaf.trained)

    def _nest(self, function: Any) -> dict[str, Any]:
        """Nested dict of `function(path, variable)` over the parameters."""
        nested: dict[str, Any] = {}
        for path, variable in nnx.to_flat_state(self._abstract):
            node = nested
            for name in path[:-1]:
                node = node.setdefault(str(name), {})
            node[str(path[-1])] = function(path, variable)
        return nested

    @property
    def num_active_params(self) -> int:
        """`num_params` without the experts that a token does not go through, in the mean."""
        idle = 0.0
        for _, module in self.modules():
            if isinstance(module, Moe):
                share = 1 - module.config.active_experts / module.config.num_experts
                variables = jax.tree.leaves(nnx.state(module.experts))
                idle += share * sum(math.prod(leaf.shape) for leaf in variables)
        return round(self.num_params - idle)

    def modules(self) -> Iterator[tuple[str, nnx.Module]]:
        """Every module with its path in the parameters, as `decoder/layers/mlp`; no arrays."""
        for path, module in nnx.iter_modules(nnx.merge(self._graphdef, self._abstract)):
            yield "/".join(map(str, path)), module

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Fresh parameters, a pure function of `key`; jit it with shardings to place them."""
        return self._nest(lambda path, variable: _initialise(key, path, variable))

    def bind(self, params: Params) -> Any:
        """The module with these parameters; its call is pure, also under jit and grad."""
        return nnx.merge(self._graphdef, params)
