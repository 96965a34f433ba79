"""Declaring parameters without allocating them, and the initialisers that T5X uses.

A module is built abstract: every `nnx.Param` holds a shape and a dtype, and carries its logical
axis names and its initialiser as metadata. `models.base.ModelDef` turns that into arrays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from t5x_like.parallel.logical import constrain

Initializer = Callable[..., jax.Array]
ModuleT = TypeVar("ModuleT", bound=nnx.Module)

attention_kernel_init: Initializer = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal")
mlp_kernel_init: Initializer = jax.nn.initializers.variance_scaling(
    1.0, "fan_in", "truncated_normal"
)
relative_bias_init: Initializer = jax.nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")


def scaled(initializer: Initializer, scale: float) -> Initializer:
    """Returns an initialiser whose draws are those of `initializer` times `scale`."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        return initializer(key, shape, dtype) * scale

    return init


class ModelState(nnx.Variable):
    """What a model keeps from step to step and no optimizer touches, such as a balance bias."""


def parameter(
    shape: tuple[int, ...],
    *,
    logical_axes: tuple[str | None, ...],
    initializer: Initializer,
    kind: type[nnx.Variable] = nnx.Param,
) -> Any:
    """Declares a float32 parameter of the given shape, one logical axis name a dimension.

    `kind` is `ModelState` for an array that is not trained.
    """
    assert len(shape) == len(logical_axes), (shape, logical_axes)
    abstract = jax.ShapeDtypeStruct(shape, jnp.float32)
    return kind(abstract, logical_axes=logical_axes, initializer=initializer)


def in_use(param: nnx.Param, dtype: jnp.dtype) -> Float[Array, "..."]:
    """The value of a parameter in `dtype`, laid out by the compute rules of the mesh.

    Inside a layer, so that a sharded parameter is gathered one layer at a time, in the narrow
    dtype. Its gradient is laid out by the storage rules before it is stacked or summed.
    """
    value = param[...]
    # In a stack that is being scanned, the leading `layers` axis of the metadata is gone.
    return _in_use(value, param.logical_axes[-value.ndim :], dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _in_use(x: jax.Array, logical_axes: tuple[str, ...], dtype: jnp.dtype) -> jax.Array:
    return constrain(x.astype(dtype), logical_axes)


def _in_use_forward(
    x: jax.Array, logical_axes: tuple[str, ...], dtype: jnp.dtype
) -> tuple[jax.Array, None]:
    return constrain(x.astype(dtype), logical_axes), None


def _in_use_backward(
    logical_axes: tuple[str, ...], dtype: jnp.dtype, _: None, grad: jax.Array
) -> tuple[jax.Array]:
    return (constrain(grad, logical_axes, table="storage").astype(jnp.float32),)


_in_use.defvjp(_in_use_forward, _in_use_backward)


def stack_parameters(module: ModuleT, *, num_layers: int) -> ModuleT:
    """Gives every parameter of `module` a leading `layers` axis, initialised layer by layer."""
    for _, variable in nnx.iter_graph(module):
        if isinstance(variable, nnx.Param | ModelState):
            info = variable.get_value()
            variable.set_value(jax.ShapeDtypeStruct((num_layers, *info.shape), info.dtype))
            variable.set_metadata(logical_axes=("layers", *variable.logical_axes))
    return module


def activation_dtype(name: str) -> jnp.dtype:
    """The dtype of activations: `auto` is float32 on a CPU and bfloat16 on accelerators."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)
