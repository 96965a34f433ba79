"""The parameters of many feed-forward layers of one shape, and their work on sorted rows."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from t5x_like.layers.mlp import ACTIVATIONS, MlpConfig
from t5x_like.layers.parameter import Initializer, in_use, parameter

# Product of rows with the kernel of each row's expert.
Multiply = Callable[
    [Float[Array, "rows inputs"], Float[Array, "experts inputs outputs"]], jax.Array
]


class ExpertLinear(nnx.Module):
    """A kernel, and a bias where there is one, for every expert."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        logical_axes: tuple[str, str, str],
        initializer: Initializer,
        use_bias: bool,
    ) -> None:
        def each(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(shape[0]))
            return jax.vmap(lambda k: initializer(k, shape[1:], dtype))(keys)

        self.kernel = parameter(shape, logical_axes=logical_axes, initializer=each)
        self.use_bias = use_bias
        if use_bias:
            self.bias = parameter(
                (shape[0], shape[2]),
                logical_axes=(logical_axes[0], logical_axes[2]),
                initializer=jax.nn.initializers.zeros,
            )


class Experts(nnx.Module):
    """`num_experts` layers like `layers.mlp.Mlp`, named like it, stacked on a leading axis."""

    def __init__(
        self,
        config: MlpConfig,
        *,
        num_experts: int,
        embed_dim: int,
        dtype: jnp.dtype,
        kernel_init: Initializer,
        out_init: Initializer,
    ) -> None:
        self.config, self.dtype = config, dtype
        for name in input_names(config):
            linear = ExpertLinear(
                (num_experts, embed_dim, config.mlp_dim),
                logical_axes=("experts", "embed", "mlp"),
                initializer=kernel_init,
                use_bias=config.use_bias,
            )
            setattr(self, name, linear)
        self.wo = ExpertLinear(
            (num_experts, config.mlp_dim, embed_dim),
            logical_axes=("experts", "mlp", "embed"),
            initializer=out_init,
            use_bias=config.use_bias,
        )

    def linears(self) -> dict[str, ExpertLinear]:
        """The projections by name."""
        return {name: getattr(self, name) for name in (*input_names(self.config), "wo")}

    def arrays(self) -> dict[str, tuple[jax.Array, jax.Array | None]]:
        """Kernel and bias of every projection, laid out and cast for use."""
        return {
            name: (
                in_use(linear.kernel, self.dtype),
                in_use(linear.bias, self.dtype) if linear.use_bias else None,
            )
            for name, linear in self.linears().items()
        }


def input_names(config: MlpConfig) -> list[str]:
    """The projections into the hidden layer: `wi`, or `wi_0`, `wi_1` of a gated layer."""
    count = len(config.activations)
    return ["wi"] if count == 1 else [f"wi_{i}" for i in range(count)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dropout:
    """Dropout of the experts' hidden layer: a draw for every pair of token and expert.

    It depends on these two alone, not on where the row lies or which device has it.
    """

    rate: float
    key: jax.Array

    def __call__(
        self, x: Float[Array, "rows mlp"], token: Int[Array, " rows"], expert: Int[Array, " rows"]
    ) -> Float[Array, "rows mlp"]:
        def draw(token: jax.Array, expert: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.fold_in(self.key, expert), token)
            return jax.random.bernoulli(key, 1.0 - self.rate, x.shape[1:])

        kept = checkpoint_name(jax.vmap(draw)(token, expert), "dropout_mask")
        return x * (kept / jnp.float32(1.0 - self.rate)).astype(x.dtype)


def apply_experts(
    config: MlpConfig,
    arrays: dict[str, Any],
    x: Float[Array, "rows embed"],
    *,
    multiply: Multiply,
    expert: Int[Array, " rows"],
    drop: Callable[[jax.Array], jax.Array],
) -> Float[Array, "rows embed"]:
    """Every row through its expert; `expert` is the row's index into `arrays`."""

    def project(name: str, y: jax.Array) -> jax.Array:
        kernel, bias = arrays[name]
        product = checkpoint_name(multiply(y, kernel), "grouped_product")
        return product if bias is None else product + bias[expert]

    branches = [
        ACTIVATIONS[activation](project(name, x))
        for name, activation in zip(input_names(config), config.activations, strict=True)
    ]
    return project("wo", drop(functools.reduce(operator.mul, branches)))
