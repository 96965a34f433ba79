"""Every router with every dispatcher against one token at a time in float64."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.layers.mlp import MlpConfig
from t5x_like.layers.moe.dispatch import DispatcherConfig
from t5x_like.layers.moe.routers import (
    ExpertChoiceRouter,
    HashRouter,
    SigmoidRouter,
    TopKRouter,
)

from . import reference
from .conftest import call, layer, random_input, random_params

CASES: dict[str, dict[str, Any]] = {
    "switch": {"router": TopKRouter(k=1, z_loss=0.1)},
    "groups_of_tokens": {"router": TopKRouter(k=1, z_loss=0.1), "group_size": 4},
    "gshard": {"router": TopKRouter(k=2, renormalize=True)},
    "mixtral": {"router": TopKRouter(k=2, scoring="selected")},
    "qwen_raw": {"router": TopKRouter(k=3, scale=2.0), "expert": MlpConfig(mlp_dim=16)},
    "prioritized": {"router": TopKRouter(k=2, prioritized=True)},
    "deepseek_v2": {"router": TopKRouter(k=2, num_groups=4, top_groups=2, scale=3.0)},
    "deepseek_v3": {
        "router": SigmoidRouter(k=3, num_groups=4, top_groups=2, scale=2.5, z_loss=0.1),
        "shared_expert": MlpConfig(mlp_dim=12),
    },
    "expert_choice": {"router": ExpertChoiceRouter(capacity_factor=2.0, z_loss=0.1)},
    "hash": {"router": HashRouter(seed=3)},
}
DISPATCHERS = {
    "dense": DispatcherConfig(kind="dense"),
    "dropless_blocked": DispatcherConfig(matmul="blocked"),
    "dropless_ragged": DispatcherConfig(matmul="ragged"),
    "capacity_with_room": DispatcherConfig(kind="capacity", capacity_factor=8.0),
    "capacity_dropping": DispatcherConfig(kind="capacity", capacity_factor=1.0, min_capacity=1),
}
RAGGED_TOO = ("switch", "deepseek_v3", "expert_choice")


def losses(y: Any, means: Any) -> Any:
    """One number whose gradient has a part from every output and every auxiliary value."""
    probe = np.random.default_rng(9).normal(size=y.shape)
    return jnp.sum(y * probe.astype(y.dtype)) + sum(
        (3 + i) * means[name] for i, name in enumerate(sorted(means))
    )


def means_of(auxiliary: Any, names: Any) -> Any:
    return {name: auxiliary.sums[name][0] / auxiliary.sums[name][1] for name in names}


@pytest.mark.parametrize("case", CASES)
def test_every_dispatcher_is_the_loop(case):
    # XLA's own product needs no test with every router; compiling it takes long.
    kinds = [n for n in DISPATCHERS if n != "dropless_ragged" or case in RAGGED_TOO]
    models = {n: layer(**CASES[case], dispatcher=DISPATCHERS[n]) for n in kinds}
    params = random_params(models["dense"])
    x, real, ids = random_input()

    with jax.enable_x64(True):
        wide = reference.as_float64(params)
        wide_x = jnp.asarray(x, jnp.float64)
        expected = {}
        for name in ("dense", "capacity_dropping"):
            config = models[name].config.moe
            decisions = reference.decide(config, wide, wide_x, real, ids)

            def loss(params: Any, x: Any, config=config, decisions=decisions) -> Any:
                y, means = reference.run(config, params, x, real, decisions)
                return losses(y, means), (y, means)

            (_, values), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(wide, wide_x)
            lost = 1 - len(decisions["kept"]) / len(decisions["chosen"])
            expected[name] = jax.tree.map(np.asarray, (values, grads, lost))
        aux_names = expected["dense"][0][1].keys()

    @jax.jit
    def run(params: Any, x: Any) -> Any:
        results = {}
        for name, model in models.items():

            def loss(params: Any, x: Any, model=model) -> Any:
                y, auxiliary = call(model, params, x, real, ids)
                means = means_of(auxiliary, aux_names)
                lost = means_of(auxiliary, ["dropped_fraction"])["dropped_fraction"]
                return losses(y, means), (y, means, lost)

            (_, values), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
            results[name] = (values[:2], grads, values[2])
        return results

    for name, actual in run(params, x).items():
        wanted = expected["capacity_dropping" if name == "capacity_dropping" else "dense"]
        jax.tree.map(functools.partial(close, name), actual, wanted)
    # An expert that chooses twice its share of tokens loses half of them to a capacity of one.
    assert expected["capacity_dropping"][2] > 0


def close(name: str, actual: Any, expected: Any) -> None:
    """1e-6 of the largest element, as float32 has it."""
    bound = 1e-6 * max(1.0, float(np.max(np.abs(expected))))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=bound, err_msg=name)
