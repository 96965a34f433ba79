"""The train step: accumulation, keys, clipping, freezing, non-finite gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from t5x_like.errors import UserError
from t5x_like.models.base import ParamInfo
from t5x_like.objectives.seq2seq import Seq2Seq
from t5x_like.parallel.mesh import MeshConfig
from t5x_like.training.optimizers.adafactor import AdafactorConfig
from t5x_like.training.optimizers.adamw import AdamWConfig
from t5x_like.training.optimizers.base import ParameterGroup
from t5x_like.training.schedules import FactorSchedule
from t5x_like.training.state import init_state, state_shapes, state_shardings
from t5x_like.training.step import StepConfig, make_eval_step, mean_metrics

from .conftest import (
    KEY,
    RULES,
    VOCAB_SIZE,
    build_step,
    one_device_mesh,
    random_batch,
    relative_l2,
    tiny_model,
)

EMBED_DIM = 16


class BigramModel:
    """A model small enough to compile at once: logits of a token given the one before it."""

    param_info: ClassVar[dict[str, Any]] = {
        "table": ParamInfo((VOCAB_SIZE, EMBED_DIM), jnp.dtype("float32"), ("vocab", "embed")),
        "head": ParamInfo((EMBED_DIM, VOCAB_SIZE), jnp.dtype("float32"), ("embed", "vocab")),
    }

    def __init__(self, *, dropout_rate: float = 0.0) -> None:
        self.dropout_rate = dropout_rate

    def init(self, key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key)
        return {
            name: jax.random.normal(k, info.shape)
            for k, (name, info) in zip(keys, self.param_info.items(), strict=True)
        }

    def modules(self) -> Iterator[tuple[str, Any]]:
        return iter(())

    def bind(self, params: Any) -> Any:
        def module(batch: Any, *, dropout_key: Any = None) -> jax.Array:
            x = params["table"][batch["decoder_input_tokens"]]
            if self.dropout_rate:
                kept = jax.random.bernoulli(dropout_key, 1 - self.dropout_rate, x.shape)
                x = x * kept
            return x @ params["head"]

        return module


def first_step(
    *, batch: Any, dropout_rate: float = 0.0, step: int = 0, objective: Any = None, **config: Any
) -> dict[str, Any]:
    """Gradients, metrics and parameters of one step from the same initial parameters."""
    model = BigramModel(dropout_rate=dropout_rate)
    mesh = config.pop("mesh", None) or one_device_mesh()
    optimizer = config.pop("optimizer", AdamWConfig(b1=0.0))
    compiled, place = build_step(
        model,
        mesh,
        batch=batch,
        objective=objective or Seq2Seq(),
        optimizer=optimizer,
        learning_rate=config.pop("learning_rate", 1e-3),
        step_config=StepConfig(**config),
    )
    before = place(jax.device_get(model.init(jax.random.key(0))), step=step)
    state, metrics = compiled(before, batch)
    # With b1 = 0, Adam's first moment is the gradient.
    return {"grads": jax.device_get(state.opt_state.mu), "state": state, "metrics": metrics}


def reference_grads(batch: Any, *, key: Any, dropout_rate: float) -> Any:
    """Gradient of the summed loss of these rows with this dropout key."""
    model = BigramModel(dropout_rate=dropout_rate)
    params = model.init(jax.random.key(0))
    loss = lambda p: Seq2Seq().loss(model.bind(p), batch, dropout_key=key)[0]  # noqa: E731
    return jax.grad(loss)(params)


@pytest.mark.parametrize(
    "normalizer", ["NUM_REAL_TARGET_TOKENS", "AVERAGE_PER_SEQUENCE", None, 100.0]
)
def test_microbatches_change_nothing(normalizer):
    """Rows have 1 to 8 real tokens, so a mean of microbatch means would be far off (T5X: 2x)."""
    batch, objective = random_batch(0), Seq2Seq(loss_normalizing_factor=normalizer)
    whole = first_step(batch=batch, objective=objective)
    for microbatches in (2, 4):
        parts = first_step(batch=batch, objective=objective, microbatches=microbatches)
        assert relative_l2(parts["grads"], whole["grads"]) < 1e-6
        for name, value in whole["metrics"].items():
            np.testing.assert_allclose(parts["metrics"][name], value, rtol=1e-5, err_msg=name)


def test_microbatches_have_their_own_dropout_keys():
    """Two equal halves must not give twice the gradient of one (as in T5X)."""
    half = random_batch(0, rows=4)
    batch = {name: np.repeat(x, 2, axis=0) for name, x in half.items()}  # rows 0, 0, 1, 1, ...
    actual = first_step(batch=batch, dropout_rate=0.5, microbatches=2)["grads"]
    step_key = jax.random.fold_in(jnp.asarray(KEY), 0)
    parts = [
        reference_grads(half, key=jax.random.fold_in(step_key, i), dropout_rate=0.5)
        for i in range(2)
    ]
    tokens = batch["decoder_loss_weights"].sum()
    expected = jax.tree.map(lambda a, b: (a + b) / tokens, *parts)
    assert relative_l2(actual, expected) < 1e-6
    assert relative_l2(parts[0], parts[1]) > 0.1


def test_steps_have_their_own_dropout_keys():
    grads = [first_step(batch=random_batch(0), dropout_rate=0.5, step=i)["grads"] for i in (0, 1)]
    assert relative_l2(*grads) > 0.1


@pytest.mark.parametrize("microbatches", [1, 4])
def test_microbatches_stay_on_their_devices(microbatches):
    mesh = MeshConfig(ici={"data": 4, "fsdp": 2}).build()
    batch = random_batch(0, rows=32)
    actual = first_step(batch=batch, mesh=mesh, microbatches=microbatches)
    # Float32 noise: 0.6e-6 or 1.2e-6 by the last bits of the initial parameters, and 0.3e-6 on
    # one device with its rows in another order.
    assert relative_l2(actual["grads"], first_step(batch=batch)["grads"]) < 2e-6


def test_splitting_a_batch_moves_no_row():
    mesh = MeshConfig(ici={"data": 8}).build()
    batch = random_batch(0, rows=32)
    compiled = build_step(
        BigramModel(),
        mesh,
        batch=batch,
        objective=Seq2Seq(),
        optimizer=AdamWConfig(),
        step_config=StepConfig(microbatches=4),
    )[0].compiled
    text = compiled.as_text()
    assert " all-reduce(" in text
    for moving in ("all-gather(", "all-to-all(", "collective-permute("):
        assert f" {moving}" not in text, moving


@pytest.mark.parametrize(
    ("mesh", "microbatches", "message"),
    [
        (None, 3, "BATCH_SIZE 8 is not divisible by MICROBATCHES 3: change one of them"),
        ({"data": 8}, 2, "of size 4 is not divisible by the mesh axes data 8: choose a multiple"),
    ],
)
def test_indivisible_microbatches(mesh, microbatches, message):
    mesh = MeshConfig(ici=mesh).build() if mesh else None
    with pytest.raises(UserError) as error:
        first_step(batch=random_batch(0), mesh=mesh, microbatches=microbatches)
    assert message in str(error.value)


def test_no_microbatches():
    with pytest.raises(UserError, match="MICROBATCHES is 0: it must be at least 1"):
        StepConfig(microbatches=0)


def test_logged_rate_is_the_applied_one():
    """Adam's first step moves every parameter with a gradient by the rate (T5X ignored it)."""
    schedule = FactorSchedule(factors="linear_warmup * constant", base_learning_rate=0.1)
    run = first_step(
        batch=random_batch(0),
        step=50,
        learning_rate=schedule.build(),
        optimizer=AdamWConfig(b1=0.0, weight_decay=0.0),
    )
    before = BigramModel().init(jax.random.key(0))["head"]
    moved = np.abs(np.asarray(run["state"].params["head"]) - before)
    np.testing.assert_allclose(run["metrics"]["learning_rate"], 0.1 * 50 / 1000, rtol=1e-6)
    # Adam divides by its bias corrections at its own first step, so the step is the rate.
    np.testing.assert_allclose(np.median(moved), 0.005, rtol=1e-3)
    assert int(run["state"].step) == 51


def test_clipping_is_of_the_global_norm_and_the_logged_norm_is_before():
    clipped = first_step(
        batch=random_batch(0), optimizer=AdamWConfig(b1=0.0, clip_global_norm=1e-3)
    )
    plain = first_step(batch=random_batch(0))
    norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(clipped["grads"])))
    np.testing.assert_allclose(norm, 1e-3, rtol=1e-5)
    assert clipped["metrics"]["grad_norm"] == plain["metrics"]["grad_norm"] > 1e-3


def test_frozen_parameters():
    frozen = AdamWConfig(b1=0.0, groups=[ParameterGroup(pattern="table", frozen=True)])
    run, plain = (
        first_step(batch=random_batch(0), optimizer=optimizer)
        for optimizer in (frozen, AdamWConfig(b1=0.0))
    )
    before = BigramModel().init(jax.random.key(0))
    np.testing.assert_array_equal(run["state"].params["table"], before["table"])
    assert set(run["grads"]) == {"head"}
    assert relative_l2(run["state"].params["head"], plain["state"].params["head"]) < 1e-6
    np.testing.assert_allclose(
        run["metrics"]["grad_norm"], np.linalg.norm(plain["grads"]["head"]), rtol=1e-6
    )


@pytest.mark.parametrize("skip", [False, True])
def test_nonfinite_gradients(skip):
    batch = random_batch(0)
    batch["decoder_loss_weights"][-1, 0] = np.inf
    run = first_step(batch=batch, skip_nonfinite=skip)
    assert run["metrics"]["nonfinite"] == 1.0
    assert int(run["state"].step) == 1
    leaves = jax.tree.leaves((run["state"].params, run["state"].opt_state))
    assert all(np.isfinite(leaf).all() for leaf in leaves) == skip
    if skip:
        np.testing.assert_array_equal(
            run["state"].params["head"], BigramModel().init(jax.random.key(0))["head"]
        )
        assert int(run["state"].opt_state.count) == 0


def test_batch_of_padding_is_harmless():
    batch = jax.tree.map(np.zeros_like, random_batch(0))
    run = first_step(batch=batch, optimizer=AdamWConfig(b1=0.0, weight_decay=0.0))
    assert run["metrics"]["nonfinite"] == run["metrics"]["loss"] == 0.0
    np.testing.assert_array_equal(
        run["state"].params["head"], BigramModel().init(jax.random.key(0))["head"]
    )


def test_eval_step_adds_up():
    model, batch = BigramModel(), random_batch(0)
    params = model.init(jax.random.key(0))
    step = jax.jit(make_eval_step(model, Seq2Seq()))
    halves = [{n: x[i::2] for n, x in batch.items()} for i in range(2)]
    total = jax.tree.map(jnp.add, *[step(params, half) for half in halves])
    for name, value in mean_metrics(step(params, batch)).items():
        np.testing.assert_allclose(mean_metrics(total)[name], value, rtol=1e-6)


def test_initial_state_is_sharded_and_the_same_on_every_mesh():
    model, mesh = BigramModel(), MeshConfig(ici={"fsdp": 4, "tensor": 2}).build()
    optimizer = AdafactorConfig(min_dim_size_to_factor=8, momentum=0.9).build(model.param_info)
    states = [
        init_state(model, optimizer, m, RULES, jax.random.key(0)) for m in (one_device_mesh(), mesh)
    ]
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get(states))
    shardings = state_shardings(model, optimizer, mesh, RULES)
    assert jax.tree.map(lambda leaf: leaf.sharding, states[1]) == shardings
    assert shardings.params["head"].spec == P("fsdp", "tensor")
    # Moments lie like their parameter, but for the dim that was averaged away.
    assert shardings.opt_state.m["head"].spec == P("fsdp", "tensor")
    assert shardings.opt_state.v_row["head"].spec == P("fsdp", None)
    assert shardings.opt_state.v_col["head"].spec == P(None, "tensor")
    assert shardings.opt_state.count.spec == P()


def test_no_parameter_and_no_state_is_whole_where_it_need_not_be():
    """Of the tiny T5's state, at most 2% is held twice."""
    model, mesh = tiny_model(), MeshConfig(ici={"fsdp": 4, "tensor": 2}).build()
    optimizer = AdamWConfig().build(model.param_info)
    shapes = state_shapes(model, optimizer)
    shardings = state_shardings(model, optimizer, mesh, RULES)
    per_device = jax.tree.map(lambda s, x: math.prod(s.shard_shape(x.shape)), shardings, shapes)
    whole = sum(x.size for x in jax.tree.leaves(shapes))
    assert sum(jax.tree.leaves(per_device)) * mesh.size < 1.02 * whole
