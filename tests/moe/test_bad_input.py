"""Configurations that cannot work are refused, with both values and what to do; the rest counts."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.errors import UserError
from t5x_like.layers.attention import AttentionConfig
from t5x_like.layers.mlp import MlpConfig
from t5x_like.layers.moe import dispatch, routers
from t5x_like.layers.moe.dispatch import DispatcherConfig
from t5x_like.layers.moe.layer import MoeConfig
from t5x_like.layers.moe.routers import (
    ExpertChoiceRouter,
    HashRouter,
    SigmoidRouter,
    TopKRouter,
)
from t5x_like.models.base import ModelDef
from t5x_like.models.block import BlockConfig
from t5x_like.models.decoder_only import DecoderOnlyConfig

from .conftest import call, layer, random_input, random_params

MLP = MlpConfig(mlp_dim=8)


def moe(**settings: Any) -> MoeConfig:
    return MoeConfig(**{"num_experts": 8, "expert": MLP, "router": TopKRouter(k=2), **settings})


def decoder(block_mlp: Any, **settings: Any) -> DecoderOnlyConfig:
    block = BlockConfig(
        embed_dim=8, attention=AttentionConfig(num_heads=2, head_dim=4), mlp=block_mlp
    )
    return DecoderOnlyConfig(vocab_size=16, num_layers=2, block=block, **settings)


REFUSED = {
    "k": (lambda: moe(router=TopKRouter(k=9)), r"k 9 .*num_experts 8: choose"),
    "sigmoid k": (lambda: moe(router=SigmoidRouter(k=9)), r"k 9 .*num_experts 8: choose"),
    "groups": (lambda: moe(router=TopKRouter(k=1, num_groups=3)), r"3 groups of 8 experts"),
    "k in groups": (
        lambda: moe(router=SigmoidRouter(k=5, num_groups=4, top_groups=2)),
        r"k 5 .*4 experts in top_groups 2 of num_groups 4",
    ),
    "groups of one": (lambda: moe(router=SigmoidRouter(k=1, num_groups=8, top_groups=2)), r"8.*1"),
    "second": (lambda: TopKRouter(k=3, random_second=True), r"needs k = 2, and k is 3"),
    "scoring": (lambda: TopKRouter(k=1, scoring="select"), r"Did you mean 'selected'"),
    "expert choice": (
        lambda: moe(router=ExpertChoiceRouter(capacity_factor=9.0)),
        r"capacity_factor 9 .*num_experts 8",
    ),
    "capacity of dropless": (
        lambda: DispatcherConfig(capacity_factor=1.25),
        r"capacity_factor is 1.25 and kind 'dropless'.*choose kind 'capacity'",
    ),
    "no capacity": (lambda: DispatcherConfig(kind="capacity"), r"capacity_factor None; give"),
    "matmul of capacity": (
        lambda: DispatcherConfig(kind="capacity", capacity_factor=1.0, matmul="ragged"),
        r"matmul is 'ragged' and kind 'capacity'",
    ),
    "exchange of dense": (
        lambda: DispatcherConfig(kind="dense", exchange="all_gather"),
        r"exchange is 'all_gather' and kind 'dense'",
    ),
    "router": (lambda: moe(router="top-k"), r"'top-k'; give a TopKRouter or SigmoidRouter"),
    "experts choose in a decoder": (
        lambda: ModelDef(decoder(moe(router=ExpertChoiceRouter()))),
        r"looks at later tokens.*encoder blocks only",
    ),
    "leading": (
        lambda: ModelDef(decoder(moe(), leading_blocks=(decoder(MLP).block,) * 2)),
        r"leading_blocks has 2 blocks and a stack 2 layers",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    make, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_the_log_says_once_what_runs_and_why(caplog):
    for announce in (dispatch._announce, routers._warn_of_force):
        announce.cache_clear()
    with caplog.at_level("INFO", logger="t5x_like"):
        for _ in range(2):
            program(moe(router=TopKRouter(k=2, force_balance=True)))
        dispatch._announce(DispatcherConfig(), 4, "gpu")
    assert [record.getMessage() for record in caplog.records] == [
        "Experts: force_balance is on: tokens go to experts in turn, not by their scores. This is "
        "for benchmarks: such a model learns no routing.",
        "Experts on cpu: dispatcher dropless, no exchange (the mesh has no expert axis), grouped "
        "matmul blocked (on a CPU ragged_dot multiplies with every matrix)",
        "Experts on gpu: dispatcher dropless, exchange all_gather over the expert axis of 4 (the "
        "default with dropless), grouped matmul ragged (jax.lax.ragged_dot is made for gpu)",
    ]


@pytest.mark.parametrize("kind", [TopKRouter, SigmoidRouter])
def test_forced_balance_spreads_real_tokens_evenly(kind):
    model = layer(router=kind(k=2, force_balance=True))
    x, real, ids = random_input(rows=4)
    real[:] = True
    real[0, 3:7] = False
    _, auxiliary = jax.jit(lambda params: call(model, params, x, real, ids))(random_params(model))
    np.testing.assert_array_equal(auxiliary.load, np.full(8, 2 * real.sum() / 8))


FIELDS: list[tuple[str, dict[str, Any]]] = [
    ("", {"num_experts": 4, "group_size": 4, "shared_expert": MLP, "expert_dropout_rate": 0.5}),
    ("expert", {"mlp_dim": 4}),
    (
        "router",
        {
            **{"k": 3, "scoring": "selected", "renormalize": True, "scale": 2.0},
            **{"jitter": 0.5, "random_second": True, "prioritized": True},
            **{"balance_loss": 0.5, "z_loss": 0.5, "force_balance": True},
        },
    ),
    (
        "dispatcher",
        {"capacity_factor": 3.0, "eval_capacity_factor": 3.0, "min_capacity": 2},
    ),
]
BASE = moe(
    dispatcher=DispatcherConfig(
        kind="capacity", capacity_factor=1.0, eval_capacity_factor=1.5, min_capacity=1
    )
)
OF_SIGMOID = {
    **{"k": 3, "renormalize": False, "scale": 2.0, "sequence_loss": 0.5, "z_loss": 0.5},
    **{"num_groups": 4, "top_groups": 2, "force_balance": True},
}


def program(config: MoeConfig) -> str:
    """What a layer computes, with and without dropout, and the parameters it has."""
    model = layer(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)})
    params, (x, real, ids) = random_params(model), random_input(rows=4)

    def both(params: Any, key: Any) -> Any:
        return [call(model, params, x, real, ids, dropout_key=k) for k in (None, key)]

    traced = jax.make_jaxpr(both)(params, jax.random.key(0))
    return f"{traced} {traced.consts}"


@pytest.mark.parametrize(
    ("config", "path", "name", "value"),
    [(BASE, path, n, v) for path, values in FIELDS for n, v in values.items()]
    + [
        (moe(router=SigmoidRouter(k=2, num_groups=2)), "router", name, value)
        for name, value in OF_SIGMOID.items()
    ]
    + [
        (moe(router=ExpertChoiceRouter()), "router", "capacity_factor", 2.0),
        (moe(router=ExpertChoiceRouter()), "router", "z_loss", 0.5),
        (moe(router=HashRouter()), "router", "seed", 1),
    ],
)
def test_every_field_counts(config, path, name, value):
    part = getattr(config, path) if path else config
    new = dataclasses.replace(part, **{name: value})
    changed = dataclasses.replace(config, **{path: new}) if path else new
    assert program(changed) != program(config)


def test_group_limits_count():
    limited = moe(router=TopKRouter(k=2, num_groups=4, top_groups=1))
    assert program(limited) != program(moe())


def test_random_second_expert():
    """Used as often as twice its share of the weights; the first expert always."""
    router = TopKRouter(k=2, renormalize=True, random_second=True)
    model = layer(router=router)
    params, (x, real, _) = random_params(model), random_input(rows=1)

    def routed(key: Any) -> Any:
        router = model.bind(params).router
        pairs = router(jnp.asarray(x), real=real, rows=1, token_ids=None, key=key).pairs
        return pairs.expert.reshape(2, -1), pairs.weight.reshape(2, -1)

    experts, weights = jax.jit(jax.vmap(routed))(jax.random.split(jax.random.key(0), 4000))
    used = np.mean(np.asarray(experts) < 8, axis=0)
    np.testing.assert_array_equal(used[0], real[0])
    wanted = np.minimum(1, 2 * np.asarray(weights)[0, 1]) * real[0]
    np.testing.assert_allclose(used[1], wanted, atol=0.04)  # 5 standard deviations
