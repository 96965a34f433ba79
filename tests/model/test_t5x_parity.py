"""Logits, losses and gradients are those that T5X computed from the same parameters."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.kernels.position_bias import relative_position_bucket
from t5x_like.objectives.seq2seq import Seq2Seq

from .conftest import Oracle, relative_l2

CHECKPOINTS = {"step0": "legacy/checkpoint_0", "step20": "legacy/checkpoint_20"}
SUM = Seq2Seq(loss_normalizing_factor=None)


@pytest.fixture(scope="module", params=CHECKPOINTS)
def step(request, oracle: Oracle):
    return request.param, oracle.params(CHECKPOINTS[request.param])


def returning(logits):
    """A model that gives these logits."""
    return lambda batch, dropout_key=None: logits


@pytest.mark.parametrize("kind", ["unpacked", "packed"])
def test_logits(oracle: Oracle, step, kind):
    name, params = step
    batch = oracle.batch(kind)
    real = batch["decoder_target_tokens"] > 0
    logits = oracle.logits(params, batch)
    expected = oracle.expected[f"{name}/{kind}/logits"]
    np.testing.assert_allclose(logits[real], expected[real], rtol=0, atol=1e-4)


def test_logits_of_long_sequences(oracle: Oracle, step):
    name, params = step
    batch = oracle.batch("long")
    real = batch["decoder_target_tokens"][:, ::8] > 0
    logits = oracle.logits(params, batch)[:, ::8]
    expected = oracle.expected[f"{name}/long/logits_every_8th_position"]
    np.testing.assert_allclose(logits[real], expected[real], rtol=0, atol=1e-4)


def test_logits_of_trained_model(oracle: Oracle):
    batch = oracle.batch("unpacked")
    real = batch["decoder_target_tokens"] > 0
    logits = oracle.logits(oracle.params("legacy_trained/checkpoint_1500"), batch)
    expected = oracle.expected["trained/unpacked/logits"]
    np.testing.assert_allclose(logits[real], expected[real], rtol=0, atol=1e-4)


def test_encoder_output(oracle: Oracle, step):
    name, params = step
    tokens = oracle.batch("unpacked")["encoder_input_tokens"]
    encoded = np.asarray(
        jax.jit(lambda p: oracle.model.bind(p).encode(jnp.asarray(tokens)))(params)
    )
    expected = oracle.expected[f"{name}/unpacked/encoder_output"]
    np.testing.assert_allclose(encoded[tokens > 0], expected[tokens > 0], rtol=0, atol=1e-4)


OBJECTIVES = {
    "loss_sum_z1e-4": SUM,
    "loss_sum_z0": Seq2Seq(loss_normalizing_factor=None, z_loss=0.0),
    "loss_labelsmooth0.1_z1e-4": Seq2Seq(loss_normalizing_factor=None, label_smoothing=0.1),
    "loss_lnf_233.5": Seq2Seq(loss_normalizing_factor=233.5),
    "loss_lnf_NUM_REAL_TARGET_TOKENS": Seq2Seq(),
    "loss_lnf_NUM_TOTAL_TARGET_TOKENS": Seq2Seq(loss_normalizing_factor="NUM_TOTAL_TARGET_TOKENS"),
    "loss_lnf_AVERAGE_PER_SEQUENCE": Seq2Seq(loss_normalizing_factor="AVERAGE_PER_SEQUENCE"),
}


@pytest.mark.parametrize("kind", ["unpacked", "packed"])
def test_losses_metrics_and_scores(oracle: Oracle, step, kind):
    name, params = step
    batch = oracle.batch(kind)
    module = returning(oracle.logits(params, batch))

    def expected(key):
        return oracle.expected[f"{name}/{kind}/{key}"]

    for key, objective in OBJECTIVES.items():
        loss = objective.loss(module, batch)[0] / objective.normalizer(batch)
        np.testing.assert_allclose(loss, expected(key), rtol=1e-5, err_msg=key)
    _, metrics = SUM.loss(module, batch)
    for metric, key in {
        "loss": "loss_sum_z1e-4",
        "cross_ent_loss": "loss_sum_z0",
        "z_loss": "z_loss_sum",
    }.items():
        np.testing.assert_allclose(metrics[metric][0], expected(key), rtol=1e-5)
        np.testing.assert_allclose(metrics[metric][1], expected("weight_sum"))
    right = expected("logits").argmax(-1) == batch["decoder_target_tokens"]
    np.testing.assert_allclose(
        metrics["accuracy"][0], (right * batch["decoder_loss_weights"]).sum()
    )
    np.testing.assert_allclose(SUM.score(module, batch), expected("score_batch"), rtol=1e-5)


def test_every_gradient(oracle: Oracle):
    grads = oracle.gradient(oracle.params(CHECKPOINTS["step0"]), oracle.batch("unpacked"))
    assert relative_l2(grads, oracle.stacked("step0/unpacked/grads/")) < 1e-4


@pytest.mark.parametrize(("name", "kind"), [("step0", "packed"), ("step20", "unpacked")])
def test_gradient_norms(oracle: Oracle, name, kind):
    grads = oracle.gradient(oracle.params(CHECKPOINTS[name]), oracle.batch(kind))
    expected = oracle.expected[f"{name}/{kind}/grad_norms"]
    np.testing.assert_allclose(oracle.unrolled_norms(grads), expected, rtol=1e-4)


@pytest.mark.parametrize(
    "factor",
    [None, "NUM_REAL_TARGET_TOKENS", "NUM_TOTAL_TARGET_TOKENS", "AVERAGE_PER_SEQUENCE"],
)
def test_custom_weights(oracle: Oracle, factor):
    kind = "unpacked_custom_weights"
    objective = Seq2Seq(loss_normalizing_factor=factor)
    params, batch = oracle.params(CHECKPOINTS["step0"]), oracle.batch(kind)
    normalizer = objective.normalizer(batch)
    loss = objective.loss(returning(oracle.logits(params, batch)), batch)[0] / normalizer
    np.testing.assert_allclose(loss, oracle.expected[f"step0/{kind}/loss_lnf_{factor}"], rtol=1e-5)
    # The gradient of a plain sum with the weights that the normalisation stands for.
    batch["decoder_loss_weights"] = np.asarray(objective.token_weights(batch) / normalizer)
    norm = np.linalg.norm(oracle.unrolled_norms(oracle.gradient(params, batch)))
    np.testing.assert_allclose(
        norm, oracle.expected[f"step0/{kind}/grad_norm_lnf_{factor}"], rtol=1e-4
    )


@pytest.mark.parametrize("direction", ["bidirectional", "causal"])
def test_relative_position_buckets(oracle_dir, direction):
    table = np.load(oracle_dir / "relpos_buckets.npz")
    buckets = relative_position_bucket(
        table["distances_key_minus_query"],
        bidirectional=direction == "bidirectional",
        num_buckets=32,
        max_distance=128,
    )
    np.testing.assert_array_equal(buckets, table[f"{direction}_num_buckets32_max_distance128"])
