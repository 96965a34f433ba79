"""The encoder-only model: packing, padding, heads, dropout, and what its fields change."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.errors import UserError
from t5x_like.layers.attention import AttentionConfig
from t5x_like.layers.norms import NormConfig
from t5x_like.layers.positions import LearnedPositionsConfig, RelativePositionsConfig
from t5x_like.layers.rope import RopeConfig
from t5x_like.models.base import ModelDef
from t5x_like.training.flops import named_leaves
from tests.encoder_only.conftest import LENGTH, random_batch, tiny_bert


@functools.cache
def bound(config: Any) -> Any:
    """A model whose biases and norms are not at their start."""
    model_def = ModelDef(config)

    @jax.jit
    def draw() -> Any:
        params = model_def.init(jax.random.key(0))
        keys = iter(jax.random.split(jax.random.key(1), 100))
        return jax.tree.map(lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape), params)

    return model_def.bind(draw())


@jax.jit
def call(module: Any, batch: Any) -> Any:
    return module(batch)


@jax.jit
def heads(module: Any, batch: Any, dropout_key: Any = None) -> Any:
    return module.heads(batch, dropout_key=dropout_key)


BLOCK = tiny_bert().block
VARIANTS = {
    "bert": tiny_bert(),
    "roberta": tiny_bert(
        positions=LearnedPositionsConfig(max_length=LENGTH, offset=2), num_token_types=1
    ),
    # Other blocks fit too: relative or rotary positions, pre-norm, RMS norms, factorised tables.
    "t5": tiny_bert(
        block=dataclasses.replace(BLOCK, norm_placement="pre", norm=NormConfig()),
        positions=RelativePositionsConfig(num_buckets=8, max_distance=16),
        embedding_norm=False,
    ),
    "rotary_local": tiny_bert(
        block=(
            dataclasses.replace(BLOCK, attention=AttentionConfig(
                num_heads=2, head_dim=8, window=4, positions=RopeConfig())),
            BLOCK,
        ),
        positions=None,
        embedding_dim=6,
    ),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_sequences_do_not_see_each_other(variant):
    """Every packed sequence gives what it gives in a row of its own."""
    module = bound(VARIANTS[variant])
    batch = random_batch()
    if variant == "roberta":
        batch["encoder_token_types"][:] = 0
    packed = heads(module, batch)
    del batch["encoder_target_positions"]
    everywhere = np.asarray(heads(module, batch).tokens)
    for row, sequence in ((r, s) for r in range(3) for s in (1, 2)):
        inside = np.flatnonzero(batch["encoder_segment_ids"][row] == sequence)
        names = ("encoder_input_tokens", "encoder_token_types")
        alone = {n: np.pad(batch[n][row, inside], (0, LENGTH - len(inside)))[None] for n in names}
        got = heads(module, alone)
        np.testing.assert_allclose(got.tokens[0, : len(inside)], everywhere[row, inside], atol=2e-5)
        np.testing.assert_allclose(got.classes[0, 0], packed.classes[row, sequence - 1], atol=2e-5)


def test_padding_has_no_influence():
    module = bound(tiny_bert())
    tokens = np.zeros((1, LENGTH), np.int32)
    tokens[0, :5] = [7, 8, 9, 10, 11]
    long = heads(module, {"encoder_input_tokens": tokens})
    short = heads(module, {"encoder_input_tokens": tokens[:, :5]})
    np.testing.assert_allclose(long.tokens[:, :5], short.tokens, atol=1e-5)
    np.testing.assert_allclose(long.classes, short.classes, atol=1e-5)


def test_with_segment_ids_zero_is_a_token():
    module = bound(tiny_bert())
    tokens = np.int32([[0, 8, 9, 0, 0]])
    segments = np.int32([[1, 1, 1, 0, 0]])
    one = heads(module, {"encoder_input_tokens": tokens, "encoder_segment_ids": segments})
    other = heads(module, {"encoder_input_tokens": tokens})
    assert np.abs(one.tokens[0, 1] - other.tokens[0, 1]).max() > 1e-3
    alone = {"encoder_input_tokens": tokens[:, :3], "encoder_segment_ids": segments[:, :3]}
    np.testing.assert_allclose(call(module, alone), one.tokens[:, :3], atol=1e-5)


def test_targets_are_gathered():
    module = bound(tiny_bert())
    batch = random_batch()
    gathered = call(module, batch)
    assert gathered.shape == (8, 4, 60) and gathered.dtype == jnp.float32
    places = batch.pop("encoder_target_positions")
    everywhere = np.asarray(call(module, batch))
    expected = np.take_along_axis(everywhere, places[..., None], axis=1)
    np.testing.assert_allclose(gathered, expected, atol=1e-5)


def test_heads_are_optional():
    def names(config: Any) -> set[str]:
        return {path.split("/")[0] for path, _ in named_leaves(ModelDef(config).param_info)}

    whole = names(tiny_bert(embedding_dim=8))
    classes = {"pooler", "classifier"}
    assert whole - names(tiny_bert(embedding_dim=8, num_classes=None)) == classes
    without = names(tiny_bert(embedding_dim=8, masked_lm_head=False))
    assert whole - without == {"masked_lm_head", "logits_bias", "logits_projection"}
    module = bound(tiny_bert(masked_lm_head=False, num_classes=5))
    assert call(module, random_batch()).shape == (8, 3, 5)
    assert heads(bound(tiny_bert(num_classes=None)), random_batch()).classes is None


def test_dropout_follows_the_key():
    config = tiny_bert(block=dataclasses.replace(BLOCK, dropout_rate=0.3))
    module = bound(config)
    batch = random_batch()
    one, again, other = (heads(module, batch, jax.random.key(k)) for k in (0, 0, 1))
    for name in ("tokens", "classes"):
        np.testing.assert_array_equal(getattr(one, name), getattr(again, name))
        assert np.abs(getattr(one, name) - getattr(other, name)).max() > 1e-2
    without = [heads(m, batch).tokens for m in (module, bound(tiny_bert()))]
    np.testing.assert_array_equal(*without)


@functools.cache
def base_output() -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in heads(bound(tiny_bert()), random_batch())])


@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": 3},
        {"num_token_types": 0},
        {"masked_lm_head": False},
        {"num_classes": 3},
        {"num_classes": None},
        {"logits": "tied_rescaled"},
        {"logits_bias": False},
        {"embedding_norm": False},
        {"positions": None},
    ],
    ids=str,
)
def test_every_field_changes_the_output(change):
    out = heads(bound(tiny_bert(**change)), random_batch())
    flat = np.concatenate([np.ravel(x) for x in out if x is not None])
    assert flat.shape != base_output().shape or np.abs(flat - base_output()).max() > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"masked_lm_head": False, "num_classes": None}, "neither masked_lm_head nor num_classes"),
        ({"num_token_types": -1}, "num_token_types is -1; give an integer of at least 1"),
        ({"num_classes": 2.5}, "num_classes is 2.5; give an integer"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"logits": "dense"}, "logits is 'dense'; choose from tied, tied_rescaled"),
        ({"masked_lm_head": 1}, "masked_lm_head is 1; give True or False"),
    ],
)
def test_bad_values_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        tiny_bert(**change)
