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
from t5x_like.models.padding import real_tokens
from t5x_like.objectives.auxiliary import STACKS, auxiliaries_of
from t5x_like.objectives.causal_lm import CausalLm
from t5x_like.objectives.seq2seq import Seq2Seq
from t5x_like.parallel.mesh import MeshConfig
from t5x_like.training.flops import forward_flops
from t5x_like.training.optimizers.adamw import AdamWConfig
from t5x_like.training.state import init_state, state_shardings
from t5x_like.training.step import StepConfig, jit_train_step, make_eval_step, make_train_step

from .conftest import RULES

ENCODER_ROUTER = "encoder/layers/mlp/router"
DECODER_ROUTER = "decoder/group_0/block_1/mlp/router"
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


# Both in one model, to compile fewer of them: a pattern with dense blocks on one side.
MODEL = ModelDef(
    EncoderDecoderConfig(
        vocab_size=64,
        num_encoder_layers=1,
        num_decoder_layers=2,
        encoder_block=DEEPSEEK,
        block=(DENSE, SWITCH),
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


def first_step(arrays: Any, microbatches: int = 1, model: ModelDef = MODEL) -> tuple[Any, Any, Any]:
    """Gradients, metrics and parameters of the first step."""
    step, state = trainer(model, Seq2Seq(), one_device(), microbatches)
    state, metrics = step(jax.tree.map(jnp.copy, state), arrays, jax.random.key(1))
    # After one step, Adam's first moment is (1 - b1) times the gradient.
    grads = jax.tree.map(lambda m: np.asarray(m) / (1 - B1), state.opt_state.mu)
    return grads, jax.device_get(metrics), jax.device_get(state.params)


def assert_close(actual: Any, expected: Any) -> None:
    """1e-6 of the largest element of each leaf."""

    def check(a: Any, e: Any) -> None:
        bound = 1e-6 * max(1.0, float(np.max(np.abs(e))))
        np.testing.assert_allclose(a, e, rtol=0, atol=bound)

    jax.tree.map(check, actual, expected)


@pytest.fixture(scope="module")
def whole() -> tuple[Any, Any, Any]:
    """The step that computes the batch at once."""
    return first_step(batch())


@pytest.mark.parametrize("microbatches", [2, 4])
def test_microbatches_change_nothing(whole, microbatches):
    grads, metrics, params = whole
    assert metrics["moe/auxiliary_loss"] > 0.1
    for router in (ENCODER_ROUTER, DECODER_ROUTER):
        assert np.abs(at(grads, router)["kernel"]).max() > 1e-3
    more = first_step(batch(), microbatches)
    assert_close(more[:2], (grads, metrics))
    np.testing.assert_array_equal(bias_of(more[2]), bias_of(params))


def test_auxiliary_loss_is_the_mean_over_tokens_and_layers(whole):
    """Its gradient is that of the loss that the metrics report, whatever the token loss is."""
    arrays = batch()
    counts = {stack: jnp.sum(real_tokens(arrays, stack=stack)) for stack in STACKS}

    @jax.jit
    @jax.value_and_grad
    def loss(params: Any) -> Any:
        module, objective = MODEL.bind(params), Seq2Seq()
        value, _ = objective.loss(module, arrays, dropout_key=jax.random.key(1))
        means = [
            auxiliary.sums["auxiliary_loss"][0] / counts[path.split("/")[0]]
            for path, auxiliary in auxiliaries_of(module).items()
        ]
        assert [len(mean) for mean in means] == [1, 1]  # a layer of the encoder, one of the decoder
        return value / objective.normalizer(arrays) + jnp.mean(jnp.concatenate(means))

    value, grads = loss(initial_params())
    assert not np.any(grads["encoder"]["layers"]["mlp"]["router"].pop("balance_bias"))
    assert_close(whole[0], grads)
    metrics = whole[1]
    assert_close(value - metrics["loss"], metrics_mean(metrics, "auxiliary_loss"))


def metrics_mean(metrics: Any, name: str) -> float:
    """The mean over the two layers, which have different numbers of tokens."""
    paths = ("encoder/layers", "decoder/group_0/block_1")
    return float(np.mean([metrics[f"moe/{path}/{name}"] for path in paths]))


def test_padding_takes_no_capacity(whole):
    """Rows twice as long with as many tokens: same loss, gradients, auxiliary values, drops."""
    long = {n: np.pad(a, ((0, 0), (0, a.shape[1]))) for n, a in batch().items()}
    grads, metrics, _ = first_step(long)
    assert metrics["moe/dropped_fraction"] > 0.1
    assert metrics["nonpadding_fraction"] < 0.4
    assert_close(grads, whole[0])
    assert_close(metrics, whole[1] | {"nonpadding_fraction": metrics["nonpadding_fraction"]})


def at(tree: Any, path: str) -> Any:
    for name in path.split("/"):
        tree = tree[name]
    return tree


def bias_of(params: Any) -> Any:
    return at(params, ENCODER_ROUTER)["balance_bias"]


def initial_params() -> Any:
    return trainer(MODEL, Seq2Seq(), one_device())[1].params


def test_bias_moves_against_the_load_of_the_whole_batch(whole):
    grads, metrics, params = whole
    module = MODEL.bind(initial_params())
    module(batch(), dropout_key=jax.random.key(1))
    load = np.asarray(auxiliaries_of(module)["encoder/layers"].load)
    assert load.sum() == 2 * np.sum(batch()["encoder_input_tokens"] > 0)
    np.testing.assert_array_equal(bias_of(params), np.float32(0.01) * np.sign(load.mean() - load))
    largest = metrics["moe/encoder/layers/max_expert_load"]
    np.testing.assert_allclose(largest, load.max() / load.mean(), rtol=1e-6)
    # No parameter: nothing counts it, and no optimizer has state for it.
    assert "balance_bias" not in str(jax.tree.structure(grads))
    leaves = jax.tree.leaves(params)
    assert MODEL.num_params == sum(leaf.size for leaf in leaves) - bias_of(params).size


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
        for first, *others in copies.values():
            for copy in others:
                np.testing.assert_array_equal(copy, first, err_msg=jax.tree_util.keystr(path))
    bias = np.asarray(state.params["decoder"]["layers"]["mlp"]["router"]["balance_bias"])
    assert bias.shape == (2, 8) and np.ptp(bias) > 0


def test_evaluation_reports_the_experts():
    metrics = jax.jit(make_eval_step(MODEL, Seq2Seq()))(initial_params(), batch())
    for name in ("max_expert_load", "router_entropy", "router_confidence", "dropped_fraction"):
        total, weight = metrics[f"moe/{name}"]
        assert weight > 0 and np.isfinite(total)


def test_remat_changes_nothing(whole):
    model = ModelDef(dataclasses.replace(MODEL.config, remat="full"))
    assert_close(first_step(batch(), model=model)[:2], whole[:2])


def test_flops_count_active_experts_only():
    """Of a decoder layer with experts: router, k experts, shared expert; not the idle ones."""
    shapes = {"decoder_input_tokens": (4, 8)}
    sparse_flops = forward_flops(decoder_model(DEEPSEEK), shapes)
    dense_flops = forward_flops(decoder_model(DENSE), shapes)
    # A gated layer has three kernels: two experts and a shared one of mlp_dim 8, or one of 16.
    active, router, dense = 3 * 3 * 8 * 8, 8 * 8, 3 * 8 * 16
    assert sparse_flops - dense_flops == 2 * 4 * 8 * 2 * (active + router - dense)
