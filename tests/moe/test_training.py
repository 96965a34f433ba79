"""Steps of models with experts: microbatches, padding, balance, metrics, replicas."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.layers.attention import AttentionConfig
from t5x_like.layers.mlp import MlpConfig
from t5x_like.layers.moe.dispatch import DispatcherConfig
from t5x_like.layers.moe.layer import MoeConfig
from t5x_like.layers.moe.routers import SigmoidRouter, TopKRouter
from t5x_like.layers.positions import RelativePositionsConfig
from t5x_like.models.base import ModelDef
from t5x_like.models.block import BlockConfig
from t5x_like.models.decoder_only import DecoderOnlyConfig
from t5x_like.models.encoder_decoder import EncoderDecoderConfig
from t5x_like.objectives.auxiliary import STACK_TOKENS, auxiliaries_of
from t5x_like.objectives.causal_lm import CausalLm
from t5x_like.objectives.seq2seq import Seq2Seq
from t5x_like.parallel.mesh import MeshConfig
from t5x_like.training.optimizers.adamw import AdamWConfig
from t5x_like.training.state import init_state, state_shardings
from t5x_like.training.step import StepConfig, jit_train_step, make_eval_step, make_train_step

from .conftest import RULES

B1 = 0.9
OPTIMIZER = AdamWConfig(b1=B1)
ATTENTION = AttentionConfig(num_heads=2, head_dim=4)
DENSE = BlockConfig(embed_dim=8, attention=ATTENTION, mlp=MlpConfig(mlp_dim=16))


def sparse(router: Any, **settings: Any) -> BlockConfig:
    moe = MoeConfig(num_experts=8, expert=MlpConfig(mlp_dim=8), router=router, **settings)
    return dataclasses.replace(DENSE, mlp=moe)


SWITCH = sparse(
    TopKRouter(k=1, balance_loss=0.5, z_loss=0.1),
    dispatcher=DispatcherConfig(kind="capacity", capacity_factor=1.0, min_capacity=1),
)
DEEPSEEK = sparse(
    SigmoidRouter(k=2, bias_rate=0.01, sequence_loss=0.5), shared_expert=MlpConfig(mlp_dim=8)
)


def seq2seq_model(block: BlockConfig) -> ModelDef:
    return ModelDef(
        EncoderDecoderConfig(
            vocab_size=64,
            num_encoder_layers=2,
            num_decoder_layers=3,
            block=(DENSE, block),
            positions=RelativePositionsConfig(),
            dtype="float32",
        )
    )


def decoder_model(block: BlockConfig) -> ModelDef:
    config = DecoderOnlyConfig(
        vocab_size=64, num_layers=3, block=block, leading_blocks=(DENSE,), dtype="float32"
    )
    return ModelDef(config)


def batch(seed: int = 0, *, rows: int = 8, lengths: tuple[int, int] = (12, 8)) -> dict[str, Any]:
    """Rows of very different numbers of real tokens."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, length in zip(("encoder_input", "decoder_target"), lengths, strict=True):
        real = np.arange(length) < np.linspace(2, length, rows).round()[:, None]
        arrays[f"{name}_tokens"] = np.where(real, rng.integers(1, 64, real.shape), 0)
    targets = arrays["decoder_target_tokens"]
    arrays["decoder_input_tokens"] = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    arrays = {name: array.astype(np.int32) for name, array in arrays.items()}
    return arrays | {"decoder_loss_weights": (targets > 0).astype(np.float32)}


@functools.cache
def trainer(model: ModelDef, objective: Any, mesh: Any, microbatches: int = 1) -> Any:
    """A compiled step, and a fresh state on the mesh."""
    optimizer = OPTIMIZER.build(model.param_info)
    config = StepConfig(microbatches=microbatches)
    step = make_train_step(model, objective, optimizer, lambda _: jnp.float32(1e-2), config)
    shardings = state_shardings(model, optimizer, mesh, RULES)
    state = init_state(model, optimizer, mesh, RULES, jax.random.key(0))
    return jit_train_step(step, mesh=mesh, rules=RULES, shardings=shardings), state


def one_device() -> Any:
    return MeshConfig().build(jax.devices()[:1])


def first_step(model: ModelDef, arrays: Any, microbatches: int = 1) -> tuple[Any, Any, Any]:
    """Gradients, metrics and parameters of the first step."""
    step, state = trainer(model, Seq2Seq(), one_device(), microbatches)
    state, metrics = step(jax.tree.map(jnp.copy, state), arrays, jax.random.key(1))
    # After one step, Adam's first moment is (1 - b1) times the gradient.
    grads = jax.tree.map(lambda m: np.asarray(m) / (1 - B1), state.opt_state.mu)
    return grads, jax.device_get(metrics), jax.device_get(state.params)


SWITCH_MODEL, DEEPSEEK_MODEL = seq2seq_model(SWITCH), seq2seq_model(DEEPSEEK)


def assert_close(actual: Any, expected: Any) -> None:
    """1e-6 of the largest element of each leaf."""

    def check(a: Any, e: Any) -> None:
        bound = 1e-6 * max(1.0, float(np.max(np.abs(e))))
        np.testing.assert_allclose(a, e, rtol=0, atol=bound)

    jax.tree.map(check, actual, expected)


@pytest.mark.parametrize("model", [SWITCH_MODEL, DEEPSEEK_MODEL], ids=["switch", "deepseek"])
def test_microbatches_change_nothing(model):
    grads, metrics, params = first_step(model, batch())
    assert metrics["moe/auxiliary_loss"] > 0.1
    router = grads["decoder"]["group_0"]["block_1"]["mlp"]["router"]["kernel"]
    assert np.abs(router).max() > 1e-3
    for microbatches in (2, 4):
        more = first_step(model, batch(), microbatches)
        assert_close(more[:2], (grads, metrics))
        assert_close(biases(more[2]), biases(params))


def test_auxiliary_loss_is_the_mean_over_tokens_and_layers():
    """Its gradient is that of the loss that the metrics report, whatever the token loss is."""
    arrays = batch()
    grads, metrics, _ = first_step(SWITCH_MODEL, arrays)
    params = jax.device_get(trainer(SWITCH_MODEL, Seq2Seq(), one_device())[1].params)
    counts = {stack: np.sum(arrays[name] > 0) for stack, name in STACK_TOKENS.items()}

    def loss(params: Any) -> Any:
        module = SWITCH_MODEL.bind(params)
        objective = Seq2Seq()
        value, _ = objective.loss(module, arrays, dropout_key=jax.random.key(1))
        per_layer = []
        for path, auxiliary in auxiliaries_of(module).items():
            total, tokens = auxiliary.sums["auxiliary_loss"]
            np.testing.assert_array_equal(tokens, counts[path.split("/")[0]])
            per_layer.append(total / tokens)
        means = jnp.concatenate(per_layer)
        assert len(means) == 2  # layer 1 of the encoder's two, layer 1 of the decoder's three
        return value / objective.normalizer(arrays) + jnp.mean(means)

    assert_close(grads, jax.grad(loss)(params))
    assert {"moe/load_balance_loss", "moe/encoder/group_0/block_1/router_z_loss"} <= set(metrics)


@pytest.mark.parametrize("model", [SWITCH_MODEL, DEEPSEEK_MODEL], ids=["switch", "deepseek"])
def test_padding_takes_no_capacity(model):
    """Rows twice as long with as many tokens: same loss, gradients, auxiliary values, drops."""
    short = batch()
    long = {n: np.pad(a, ((0, 0), (0, a.shape[1]))) for n, a in short.items()}
    expected, actual = first_step(model, short), first_step(model, long)
    if model is SWITCH_MODEL:
        assert expected[1]["moe/dropped_fraction"] > 0.1
    expected[1].pop("nonpadding_fraction"), actual[1].pop("nonpadding_fraction")
    assert_close(actual[:2], expected[:2])


def biases(params: Any) -> Any:
    flat = jax.tree.leaves_with_path(params)
    return {jax.tree_util.keystr(p): x for p, x in flat if "balance_bias" in str(p)}


def test_bias_moves_against_the_load_of_the_whole_batch():
    _, metrics, params = first_step(DEEPSEEK_MODEL, batch())
    module = DEEPSEEK_MODEL.bind(trainer(DEEPSEEK_MODEL, Seq2Seq(), one_device())[1].params)
    module(batch(), dropout_key=jax.random.key(1))
    load = np.asarray(auxiliaries_of(module)["decoder/group_0/block_1"].load)
    assert load.sum() == 2 * np.sum(batch()["decoder_target_tokens"] > 0)
    bias = params["decoder"]["group_0"]["block_1"]["mlp"]["router"]["balance_bias"]
    np.testing.assert_array_equal(bias, np.float32(0.01) * np.sign(load.mean() - load))
    # No parameter: nothing counts it, and no optimizer has state for it.
    assert "balance_bias" not in str(jax.tree.structure(first_step(DEEPSEEK_MODEL, batch())[0]))
    np.testing.assert_allclose(
        metrics["moe/decoder/group_0/block_1/max_expert_load"], load.max() / load.mean(), rtol=1e-6
    )


def test_replicas_stay_equal():
    """After 20 steps all copies of all arrays are bit for bit the same; the bias has moved."""
    mesh = MeshConfig(ici={"data": 2, "expert": 2, "tensor": 2}).build()
    model = decoder_model(DEEPSEEK)
    step, state = trainer(model, CausalLm(), mesh)
    for i in range(20):
        arrays = {n: a for n, a in batch(i).items() if n.startswith("decoder")}
        state, _ = step(state, arrays, jax.random.key(1))
    for path, array in jax.tree.leaves_with_path(state):
        copies: dict[str, list[Any]] = {}
        for shard in array.addressable_shards:
            copies.setdefault(str(shard.index), []).append(np.asarray(shard.data))
        for same in copies.values():
            for copy in same[1:]:
                np.testing.assert_array_equal(copy, same[0], err_msg=jax.tree_util.keystr(path))
    bias = np.asarray(state.params["decoder"]["layers"]["mlp"]["router"]["balance_bias"])
    assert bias.shape == (2, 8) and np.ptp(bias) > 0.05


def test_evaluation_reports_the_experts():
    step = make_eval_step(DEEPSEEK_MODEL, Seq2Seq())
    params = trainer(DEEPSEEK_MODEL, Seq2Seq(), one_device())[1].params
    metrics = step(params, batch())
    for name in ("max_expert_load", "router_entropy", "router_confidence", "dropped_fraction"):
        total, weight = metrics[f"moe/{name}"]
        assert weight > 0 and np.isfinite(total)


@pytest.mark.parametrize("remat", ["none", "minimal", "full"])
def test_remat_changes_nothing(remat):
    model = ModelDef(dataclasses.replace(SWITCH_MODEL.config, remat=remat))
    assert_close(first_step(model, batch())[:2], first_step(SWITCH_MODEL, batch())[:2])
