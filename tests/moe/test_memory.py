"""What dispatching costs in memory grows with the tokens, and not with experts times capacity."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.layers.mlp import MlpConfig
from t5x_like.layers.moe.dispatch import DispatcherConfig
from t5x_like.layers.moe.routers import TopKRouter

from .conftest import call, layer

EXPERTS = 32
DISPATCHERS = {
    "default": DispatcherConfig(),
    "capacity": DispatcherConfig(kind="capacity", capacity_factor=1.25),
}


def compiled(dispatcher: DispatcherConfig, tokens: int, *, num_experts: int = EXPERTS) -> Any:
    """Forward and backward pass of a layer on one row of so many tokens."""
    model = layer(
        num_experts=num_experts,
        expert=MlpConfig(mlp_dim=8),
        router=TopKRouter(k=1),
        dispatcher=dispatcher,
    )

    def loss(params: Any, x: Any) -> Any:
        y, _ = call(model, params, x, None, None)
        return jnp.sum(y**2)

    def shape(*dims: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, jnp.float32)

    params = jax.tree.map(lambda info: shape(*info.shape), model.param_info)
    return jax.jit(jax.grad(loss, (0, 1))).lower(params, shape(1, tokens, 8)).compile()


@pytest.mark.parametrize("name", DISPATCHERS)
def test_buffers_are_linear_in_tokens(name):
    tokens = 4096
    small = compiled(DISPATCHERS[name], tokens)
    large = compiled(DISPATCHERS[name], 4 * tokens)
    temporaries = [c.memory_analysis().temp_size_in_bytes for c in (small, large)]
    assert temporaries[1] < 4.05 * temporaries[0]
    # [tokens, experts, capacity] would be tokens * tokens of them.
    sizes = re.findall(r"(?:f32|s32|pred|u32)\[([\d,]+)\]", large.as_text())
    largest = max(int(np.prod([int(n) for n in dims.split(",")])) for dims in sizes)
    assert largest <= 2 * 4 * tokens * EXPERTS < (4 * tokens) ** 2 / 8
