"""Masked LM with next-sentence prediction, and classification: what they compute and add up to."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.errors import UserError
from t5x_like.models.base import ModelDef
from t5x_like.objectives.classification import Classification
from t5x_like.objectives.masked_lm import MaskedLm
from t5x_like.training.flops import named_leaves
from t5x_like.training.state import TrainState
from t5x_like.training.step import StepConfig, make_train_step
from tests.encoder_only.conftest import random_batch, tiny_bert

OBJECTIVES = {"masked_lm": MaskedLm, "classification": Classification}
FACTORS = ("NUM_REAL_TARGET_TOKENS", "NUM_TOTAL_TARGET_TOKENS", "AVERAGE_PER_SEQUENCE")


@functools.cache
def model() -> tuple[ModelDef, Any]:
    """A model whose biases and norms are not at their start, and its parameters."""
    model_def = ModelDef(tiny_bert())

    @jax.jit
    def draw() -> Any:
        params = model_def.init(jax.random.key(0))
        keys = iter(jax.random.split(jax.random.key(1), 100))
        return jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape), params)

    return model_def, draw()


@functools.partial(jax.jit, static_argnums=0)
def loss_of(objective: Any, module: Any, batch: Any) -> Any:
    return objective.loss(module, batch)


@jax.jit
def heads(module: Any, batch: Any) -> Any:
    return module.heads(batch)


def log_probabilities(logits: Any) -> np.ndarray:
    return np.asarray(jax.nn.log_softmax(np.asarray(logits, np.float64)))


def test_loss_is_the_token_loss_plus_the_sentence_loss_of_every_token():
    model_def, params = model()
    batch = random_batch()
    module = model_def.bind(params)
    tokens, classes = heads(module, batch)
    of_token = -np.take_along_axis(
        log_probabilities(tokens), batch["encoder_target_tokens"][..., None], -1
    )[..., 0]
    of_pair = -np.take_along_axis(log_probabilities(classes), batch["class_labels"][..., None], -1)[
        ..., 0
    ]
    expected = 0.0
    for row, place in np.argwhere(batch["encoder_loss_weights"] > 0):
        segment = batch["encoder_segment_ids"][row, batch["encoder_target_positions"][row, place]]
        expected += of_token[row, place] + of_pair[row, segment - 1]
    total, metrics = loss_of(MaskedLm(z_loss=0.0), module, batch)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    count = batch["encoder_loss_weights"].sum()
    assert metrics["loss"][1] == count
    np.testing.assert_allclose(metrics["loss"][0], total, rtol=1e-6)
    real = batch["class_loss_weights"] > 0
    np.testing.assert_allclose(
        metrics["next_sentence/loss"], (of_pair[real].sum(), real.sum()), rtol=1e-5
    )
    right = (np.argmax(classes, -1) == batch["class_labels"])[real].sum()
    np.testing.assert_allclose(metrics["next_sentence/accuracy"], (right, real.sum()))
    np.testing.assert_allclose(
        metrics["cross_ent_loss"],
        ((of_token * batch["encoder_loss_weights"]).sum(), count),
        rtol=1e-5,
    )


def test_average_per_sequence_is_the_sum_of_two_plain_means():
    """With a masked token or more in every sequence."""
    model_def, params = model()
    batch = random_batch(targets=4)
    batch["encoder_target_positions"][:, :2] = [0, 1]
    batch["encoder_target_positions"][:, 2:] = batch["encoder_sequence_starts"][:, 1:2]
    batch["encoder_loss_weights"][:] = 1.0
    module = model_def.bind(params)
    objective = MaskedLm(z_loss=0.0, loss_normalizing_factor="AVERAGE_PER_SEQUENCE")
    total, metrics = loss_of(objective, module, batch)
    tokens = -np.take_along_axis(
        log_probabilities(heads(module, batch).tokens),
        batch["encoder_target_tokens"][..., None],
        -1,
    )
    pair, pairs = metrics["next_sentence/loss"]
    np.testing.assert_allclose(objective.normalizer(batch), pairs)
    np.testing.assert_allclose(total / pairs, tokens.mean() + pair / pairs, rtol=1e-5)


def test_without_labels_there_is_no_sentence_loss():
    model_def, params = model()
    batch = random_batch()
    alone = {k: v for k, v in batch.items() if not k.startswith("class_")}
    module = model_def.bind(params)
    total, metrics = loss_of(MaskedLm(z_loss=0.0), module, alone)
    assert not any(name.startswith("next_sentence") for name in metrics)
    np.testing.assert_allclose(total, metrics["cross_ent_loss"][0], rtol=1e-6)


def test_targets_without_positions_are_those_of_all_places():
    """[B, L] targets give the same loss as [B, P] ones."""
    model_def, params = model()
    batch = random_batch()
    whole = {k: v for k, v in batch.items() if k != "encoder_target_positions"}
    for name in ("encoder_target_tokens", "encoder_loss_weights"):
        whole[name] = np.zeros(batch["encoder_input_tokens"].shape, batch[name].dtype)
    for row, place in np.argwhere(batch["encoder_loss_weights"] > 0):
        at = row, batch["encoder_target_positions"][row, place]
        whole["encoder_target_tokens"][at] = batch["encoder_target_tokens"][row, place]
        whole["encoder_loss_weights"][at] = 1.0
    module = model_def.bind(params)
    for factor in FACTORS[::2]:
        objective = MaskedLm(loss_normalizing_factor=factor)
        np.testing.assert_allclose(
            loss_of(objective, module, batch)[0], loss_of(objective, module, whole)[0], rtol=1e-5
        )


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_everything_adds_up_over_microbatches(name, factor):
    model_def, params = model()
    objective = OBJECTIVES[name](loss_normalizing_factor=factor)
    whole = random_batch()
    halves = [{k: v[i::2] for k, v in whole.items()} for i in range(2)]
    loss = jax.jit(lambda batch: objective.loss(model_def.bind(params), batch))
    total, metrics = loss(whole)
    parts = [loss(half) for half in halves]
    np.testing.assert_allclose(total, sum(part[0] for part in parts), rtol=1e-5)
    summed = jax.tree.map(lambda a, b: a + b, parts[0][1], parts[1][1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), metrics, summed)
    normalizers = [objective.normalizer(half) for half in halves]
    np.testing.assert_allclose(objective.normalizer(whole), sum(normalizers), rtol=1e-6)


class KeepGradients:
    """An optimizer that changes nothing; its state are the gradients."""

    def split(self, tree: Any) -> tuple[Any, Any]:
        return tree, {}

    def merge(self, trained: Any, frozen: Any) -> Any:
        return trained

    def update(self, grads: Any, state: Any, params: Any, *, learning_rate: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, grads), grads


@pytest.mark.parametrize(
    "objective",
    [MaskedLm(), MaskedLm(loss_normalizing_factor="AVERAGE_PER_SEQUENCE"), Classification()],
)
def test_gradients_do_not_depend_on_accumulation(objective):
    """1, 2 and 4 microbatches of rows with 0 to 4 masked tokens.

    The bound on a leaf is 1e-5 of its norm, and what float32 rounds of the whole gradient's: the
    keys' bias has none but that.
    """
    model_def, params = model()
    batch = {k: jnp.asarray(v) for k, v in random_batch().items()}
    found = []
    for microbatches in (1, 2, 4):
        config = StepConfig(microbatches=microbatches)
        keep: Any = KeepGradients()
        step = make_train_step(model_def, objective, keep, lambda _: jnp.float32(1), config)
        state = TrainState(step=jnp.int32(0), params=params, opt_state={})
        new, metrics = jax.jit(step)(state, batch, jax.random.key(0))
        found.append((dict(named_leaves(new.opt_state)), metrics))
    whole, whole_metrics = found[0]
    for grads, metrics in found[1:]:
        for name, expected in whole.items():
            bound = 1e-5 * np.linalg.norm(expected) + 1e-7 * whole_metrics["grad_norm"]
            assert np.linalg.norm(grads[name] - expected) < bound, name
        assert metrics.keys() == whole_metrics.keys()
        for name, value in metrics.items():
            np.testing.assert_allclose(value, whole_metrics[name], rtol=1e-5, err_msg=name)


def test_classification_counts_sequences():
    model_def, params = model()
    batch = random_batch()
    module = model_def.bind(params)
    objective = Classification(z_loss=0.0)
    total, metrics = loss_of(objective, module, batch)
    log_p = log_probabilities(heads(module, batch).classes)
    real = batch["class_loss_weights"]
    at_label = np.take_along_axis(log_p, batch["class_labels"][..., None], -1)[..., 0]
    np.testing.assert_allclose(total, -(at_label * real).sum(), rtol=1e-5)
    assert metrics["accuracy"][1] == real.sum() == objective.normalizer(batch) == 16
    np.testing.assert_allclose(objective.score(module, batch), (at_label * real).sum(1), rtol=1e-4)
    average = Classification(z_loss=0.0, loss_normalizing_factor="AVERAGE_PER_SEQUENCE")
    np.testing.assert_allclose(loss_of(average, module, batch)[0], total, rtol=1e-6)


def test_score_of_masked_tokens():
    model_def, params = model()
    batch = random_batch()
    module = model_def.bind(params)
    at_target = np.take_along_axis(
        log_probabilities(heads(module, batch).tokens),
        batch["encoder_target_tokens"][..., None],
        -1,
    )[..., 0]
    expected = (at_target * batch["encoder_loss_weights"]).sum(1)
    np.testing.assert_allclose(MaskedLm().score(module, batch), expected, rtol=1e-4, atol=1e-5)


def test_padding_is_finite():
    model_def, params = model()
    empty = {k: np.zeros_like(v) for k, v in random_batch().items()}
    for name, factor in ((n, f) for n in OBJECTIVES for f in FACTORS[::2]):
        objective = OBJECTIVES[name](loss_normalizing_factor=factor)
        loss = functools.partial(lambda o, p: o.loss(model_def.bind(p), empty)[0], objective)
        total, grads = jax.jit(jax.value_and_grad(loss))(params)
        assert total == 0 == objective.normalizer(empty)
        assert all(not np.any(g) for g in jax.tree.leaves(grads))


def test_a_model_without_classes_is_refused():
    model_def = ModelDef(tiny_bert(num_classes=None))
    module = model_def.bind(model_def.init(jax.random.key(0)))
    with pytest.raises(UserError, match=r"has sentence pairs, .* num_classes is None; set it to 2"):
        MaskedLm().loss(module, random_batch())
    with pytest.raises(UserError, match="num_classes is None; set it to the number of classes"):
        Classification().loss(module, random_batch())
