"""A layer laid out over eight simulated devices gives what it gives on one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from t5x_like.errors import UserError
from t5x_like.layers.mlp import MlpConfig
from t5x_like.layers.moe.dispatch import DispatcherConfig
from t5x_like.layers.moe.routers import ExpertChoiceRouter, SigmoidRouter, TopKRouter
from t5x_like.parallel.logical import param_shardings, use_rules
from t5x_like.parallel.mesh import MeshConfig

from .conftest import MESHES, RULES, call, layer, random_input, random_params

SHARED = MlpConfig(mlp_dim=12)
DROPPING: dict[str, Any] = {"kind": "capacity", "capacity_factor": 1.0, "min_capacity": 1}
CASES: dict[str, dict[str, Any]] = {
    "dropless, gathered": {"router": SigmoidRouter(k=3), "shared_expert": SHARED},
    "dropless, sent": {
        "router": TopKRouter(k=2),
        "dispatcher": DispatcherConfig(exchange="all_to_all"),
        "expert_dropout_rate": 0.2,
    },
    "capacity, sent": {
        "router": TopKRouter(k=2, jitter=0.1, random_second=True, prioritized=True),
        "dispatcher": DispatcherConfig(**DROPPING),
        "group_size": 4,
        "expert_dropout_rate": 0.2,
    },
    "capacity, gathered": {
        "router": TopKRouter(k=1),
        "dispatcher": DispatcherConfig(**DROPPING, exchange="all_gather"),
    },
    "experts choose": {"router": ExpertChoiceRouter(capacity_factor=2.0)},
}
MODELS = {name: layer(**settings) for name, settings in CASES.items()}
PARAMS = {name: random_params(model) for name, model in MODELS.items()}


def all_cases(params: Any, x: jax.Array, real: jax.Array, ids: jax.Array) -> Any:
    """Outputs, auxiliary values and gradients of every case, with its randomness."""

    def loss(params: Any, x: jax.Array) -> Any:
        total, outputs = jnp.float32(0), {}
        for i, (name, model) in enumerate(MODELS.items()):
            key = jax.random.key(i)
            y, auxiliary = call(model, params[name], x, real, ids, dropout_key=key)
            outputs[name] = y, auxiliary
            total += jnp.sum(y**2) + auxiliary.sums["auxiliary_loss"][0]
        return total, outputs

    (_, outputs), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
    return outputs, grads


@pytest.fixture(scope="module")
def one_device() -> Any:
    return jax.device_get(jax.jit(all_cases)(PARAMS, *random_input(rows=8)))


@pytest.mark.parametrize("degrees", MESHES, ids=str)
def test_like_one_device(one_device, degrees):
    mesh = MeshConfig(ici=degrees).build()
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp", "expert")))
    shardings = {n: param_shardings(mesh, RULES, m.param_info) for n, m in MODELS.items()}
    with use_rules(mesh, RULES):
        run = jax.jit(all_cases, in_shardings=(shardings, rows, rows, rows))
        actual = jax.device_get(run(PARAMS, *random_input(rows=8)))
    for path, expected in jax.tree.leaves_with_path(one_device):
        value: Any = actual
        for key in path:
            value = (
                getattr(value, key.name)
                if hasattr(key, "name")
                else value[key.idx if hasattr(key, "idx") else key.key]
            )
        bound = 1e-5 * max(1.0, float(np.max(np.abs(expected))))
        message = jax.tree_util.keystr(path)
        np.testing.assert_allclose(value, expected, rtol=0, atol=bound, err_msg=message)


def test_expert_axis_must_divide_the_experts():
    model = layer(num_experts=6, router=TopKRouter(k=1))
    mesh = MeshConfig(ici={"data": 2, "expert": 4}).build()
    with use_rules(mesh, RULES), pytest.raises(UserError, match=r"6 .*expert 4.*degrees in MESH"):
        call(model, random_params(model), *random_input(rows=8))
