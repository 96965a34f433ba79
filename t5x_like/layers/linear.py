"""A projection of the last dim."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from t5x_like.kernels.matmul import project
from t5x_like.layers.parameter import Initializer, in_use, parameter


class Linear(nnx.Module):
    """`x @ kernel (+ bias)`; parameters are float32 and cast to `dtype` for the product."""

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        logical_axes: tuple[str, str | None],
        initializer: Initializer,
        use_bias: bool,
        dtype: jnp.dtype,
    ) -> None:
        self.use_bias, self.dtype = use_bias, dtype
        self.kernel = parameter(shape, logical_axes=logical_axes, initializer=initializer)
        if use_bias:
            self.bias = parameter(
                shape[1:], logical_axes=logical_axes[1:], initializer=jax.nn.initializers.zeros
            )

    def __call__(
        self, x: Float[Array, "batch length inputs"]
    ) -> Float[Array, "batch length outputs"]:
        y = project(x.astype(self.dtype), in_use(self.kernel, self.dtype))
        return y + in_use(self.bias, self.dtype) if self.use_bias else y
