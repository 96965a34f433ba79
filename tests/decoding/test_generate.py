"""Ragged batches, ends, limits, the best of several, meshes, and what users get wrong."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import pytest

from t5x_like.decoding.beam_search import BeamSearch
from t5x_like.decoding.generate import Generator, best_of_n, bucket
from t5x_like.decoding.sampling import Sampling
from t5x_like.decoding.session import Generated
from t5x_like.errors import UserError
from t5x_like.models.base import ModelDef
from t5x_like.parallel.logical import Rules, param_shardings
from t5x_like.parallel.mesh import MeshConfig

from .configs import CONFIGS, VOCAB
from .conftest import random_params

NEW, EOS = 9, 2
LENGTHS = np.array([3, 8, 1, 14])
GREEDY = Sampling(max_new_tokens=NEW)
BEAMS = BeamSearch(max_new_tokens=NEW, num_beams=3, num_returned=3)
SAMPLES = Sampling(max_new_tokens=NEW, temperature=1.0, top_p=0.9, num_samples=2)


@functools.cache
def model_and_params(name: str) -> tuple[ModelDef, Any]:
    model = ModelDef(CONFIGS[name])
    return model, random_params(model)


def inputs(name: str) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(1).integers(3, VOCAB, (4, 14)).astype(np.int32)
    tokens = tokens * (np.arange(14) < LENGTHS[:, None])
    if "encoder" in name or name == "t5":
        prompts = np.array([[0, 5], [0, 0], [0, 7], [0, 0]])
        return {
            "encoder_input_tokens": tokens,
            "decoder_prompt_tokens": prompts,
            "decoder_prompt_lengths": np.array([2, 1, 2, 1]),
        }
    return {"decoder_prompt_tokens": tokens, "decoder_prompt_lengths": LENGTHS}


@functools.cache
def generator(name: str, decoding: Any, eos_ids: tuple[int, ...] = (EOS,)) -> Generator:
    return Generator(model_and_params(name)[0], decoding, eos_ids=eos_ids)


def run(name: str, decoding: Any, eos_ids: tuple[int, ...] = (EOS,), **arguments: Any) -> Generated:
    batch = arguments.pop("batch", None) or inputs(name)
    made = generator(name, decoding, eos_ids)(model_and_params(name)[1], batch, **arguments)
    return jax.tree.map(np.asarray, made)


def assert_same(actual: Generated, expected: Generated) -> None:
    np.testing.assert_array_equal(actual.tokens, expected.tokens)
    np.testing.assert_array_equal(actual.lengths, expected.lengths)
    np.testing.assert_allclose(actual.token_log_probs, expected.token_log_probs, atol=1e-5)
    np.testing.assert_allclose(actual.scores, expected.scores, atol=NEW * 1e-5)


@pytest.mark.parametrize(
    ("name", "decoding"),
    [
        ("t5", BEAMS),
        ("windows_in_turn", SAMPLES),
        ("windows_in_turn", BEAMS),
        ("latent", BEAMS),
        ("dynamic", GREEDY),
        ("transformer_xl_window", BEAMS),
    ],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_together_as_alone(name, decoding):
    """Prompts of 1, 3 and 8 tokens get beside one of 14 what each gets alone."""
    batch = inputs(name)
    keys = jax.random.split(jax.random.key(3), 4)
    together = run(name, decoding, keys=keys)
    for row in range(3):
        alone = run(
            name,
            decoding,
            batch={n: x[row : row + 1] for n, x in batch.items()},
            keys=keys[row : row + 1],
        )
        assert_same(alone, jax.tree.map(lambda x, r=row: x[r : r + 1], together))
    assert len(np.unique(together.tokens)) > 8


def test_greedy_follows_the_uncached_model():
    """Every token is the most likely one after those before it, in a model without a cache."""
    model, params = model_and_params("llama_grouped_queries")
    batch, out = inputs("llama_grouped_queries"), run("llama_grouped_queries", GREEDY, ())
    forward = jax.jit(lambda tokens, valid: model.bind(params)(
        {"decoder_input_tokens": tokens, "decoder_target_tokens": valid}
    ))  # fmt: skip
    rows = np.zeros((4, 14 + NEW), np.int32)
    for row, (prompt, n) in enumerate(zip(batch["decoder_prompt_tokens"], LENGTHS, strict=True)):
        rows[row, :n] = prompt[:n]
        rows[row, n : n + NEW] = out.tokens[row, 0]
    valid = np.arange(rows.shape[1]) < (LENGTHS + NEW)[:, None]
    log_probs = np.asarray(jax.nn.log_softmax(forward(rows, valid.astype(np.int32))))
    for row, n in enumerate(LENGTHS):
        after = log_probs[row, n - 1 : n - 1 + NEW]
        np.testing.assert_array_equal(out.tokens[row, 0], after.argmax(-1))
        np.testing.assert_allclose(out.token_log_probs[row, 0], after.max(-1), atol=1e-5)


def test_beams_have_the_log_probabilities_of_their_tokens():
    """Scores of ragged beams, with windows, by the whole forward pass: no ancestor is mixed up."""
    name = "windows_in_turn"
    model, params = model_and_params(name)
    batch, out = inputs(name), run(name, BEAMS)
    tokens = np.zeros((4, 3, 14 + NEW), np.int32)
    for row, (prompt, n) in enumerate(zip(batch["decoder_prompt_tokens"], LENGTHS, strict=True)):
        tokens[row, :, :n] = prompt[:n]
        tokens[row, :, n : n + NEW] = out.tokens[row]
    tokens = tokens.reshape(12, -1)
    log_probs = jax.jit(lambda batch: jax.nn.log_softmax(model.bind(params)(batch)))(
        {"decoder_input_tokens": tokens, "decoder_target_tokens": np.ones_like(tokens)}
    )
    log_probs = np.asarray(log_probs).reshape(4, 3, -1, VOCAB)
    for row, n in enumerate(LENGTHS):
        after = log_probs[row, :, n - 1 : n - 1 + NEW]
        own = np.take_along_axis(after, out.tokens[row][..., None], axis=-1)[..., 0]
        own = np.where(np.arange(NEW) < out.lengths[row][:, None], own, 0)
        np.testing.assert_allclose(out.token_log_probs[row], own, atol=1e-5)
        penalty = ((5 + out.lengths[row]) / 6) ** BEAMS.alpha
        some_ended = (out.tokens[row] == EOS).any()
        expected = own.sum(-1) / (penalty if some_ended else 1)
        np.testing.assert_allclose(out.scores[row], expected, atol=1e-4)


def test_ends_stop_sequences_and_limits():
    """Cut where an end token, a stop sequence or a request's own limit comes first."""
    name = "llama_grouped_queries"
    free = run(name, GREEDY, ()).tokens[:, 0]
    assert len(np.unique(free)) > 8
    end, stop = int(free[0, 4]), (int(free[1, 2]), int(free[1, 3]))
    never = (VOCAB - 1, VOCAB - 1, VOCAB - 1)
    decoding = Sampling(max_new_tokens=NEW, stop_sequences=(never, stop, (int(free[2, 0]),)))
    limits = np.array([NEW, 100, NEW, 5])
    out = run(name, decoding, (end, VOCAB + 5), max_new_tokens=limits)

    def length(row: int) -> int:
        tokens = free[row].tolist()
        for n in range(1, NEW + 1):
            stops = (never, stop, (free[2, 0],), (end,))
            if n == limits[row] or any(tuple(tokens[max(0, n - len(s)) : n]) == s for s in stops):
                return n
        return NEW

    lengths = [length(row) for row in range(4)]
    assert len(set(lengths)) > 2 and lengths[3] <= 5
    np.testing.assert_array_equal(out.lengths[:, 0], lengths)
    inside = np.arange(NEW) < out.lengths
    np.testing.assert_array_equal(out.tokens[:, 0], np.where(inside, free, 0))
    assert np.all((out.token_log_probs[:, 0] < 0) == inside)
    np.testing.assert_allclose(out.scores, out.token_log_probs.sum(-1), rtol=1e-6)


def test_a_limit_of_0_and_beams_of_other_lengths():
    limits = np.array([4, 0, NEW, 1])
    out = run("t5", BEAMS, max_new_tokens=limits)
    assert np.all(out.lengths[:, 0] <= limits)
    assert out.lengths[0, 0] > 1 and out.lengths[3, 0] == 1
    assert not out.tokens[1].any()
    greedy = run("llama_grouped_queries", GREEDY, (), max_new_tokens=limits)
    np.testing.assert_array_equal(greedy.lengths[:, 0], limits)


def test_best_of_n():
    decoding = Sampling(max_new_tokens=NEW, temperature=1.5, num_samples=6)
    out = run("llama_grouped_queries", decoding, (3, 4, 5, 6, 7, 8, 9, 10))
    assert len(np.unique(out.lengths)) > 2
    best = best_of_n(out)
    assert best.tokens.shape == (4, 1, NEW)
    np.testing.assert_array_equal(best.scores[:, 0], out.scores.max(axis=1))
    means = out.scores / out.lengths
    by_mean = best_of_n(out, score="mean_log_prob")
    np.testing.assert_allclose(by_mean.scores / by_mean.lengths, means.max(1, keepdims=True))

    def longest(row: int, candidates: Any) -> list[int]:
        assert [len(c) for c in candidates] == out.lengths[row].tolist()
        return [len(c) for c in candidates]

    np.testing.assert_array_equal(best_of_n(out, score=longest).lengths[:, 0], out.lengths.max(1))
    with pytest.raises(UserError, match="mean_log_prob"):
        best_of_n(out, score="likelihood")  # type: ignore[arg-type]


WHOLE = ("layers", "relpos_buckets", "length", "head_dim", "positions")
STORAGE = {"embed": "fsdp", "vocab": "tensor", "heads": "tensor", "kv_heads": "tensor",
           "mlp": "tensor"} | dict.fromkeys(WHOLE)  # fmt: skip
RULES = Rules(storage=STORAGE, compute=STORAGE | {"embed": None, "batch": ("data", "fsdp")})


@pytest.mark.parametrize(
    ("name", "decoding", "degrees"),
    [
        ("t5", BEAMS, {"data": 2, "tensor": 2}),
        ("windows_in_turn", SAMPLES, {"data": 2, "fsdp": 2, "tensor": 2}),
    ],
    ids=["t5", "llama"],
)
def test_a_mesh_gives_what_one_device_gives(name, decoding, degrees):
    """Three prompts, which the mesh does not divide; the loop over layers is a loop there."""
    model, params = model_and_params(name)
    batch = {n: x[:3] for n, x in inputs(name).items()}
    devices = np.prod(list(degrees.values()))
    mesh = MeshConfig(ici=degrees).build(jax.devices()[:devices])
    sharded = jax.device_put(params, param_shardings(mesh, RULES, model.param_info))
    one = jax.tree.map(lambda x: x[:3], run(name, decoding))
    generator = Generator(model, decoding, eos_ids=(EOS,), mesh=mesh, rules=RULES, unrolled=False)
    many = generator(sharded, batch)
    assert many.tokens.sharding.is_fully_replicated
    assert_same(jax.tree.map(np.asarray, many), one)


def test_a_prefix_sees_itself_in_both_directions():
    """The first token's log-probability is that of the whole pass with the prefix unmasked."""
    name = "llama_grouped_queries"
    model, params = model_and_params(name)
    prefix = (np.arange(14) < np.array([2, 8, 1, 9])[:, None]).astype(np.int32)
    batch = inputs(name) | {"decoder_causal_attention": prefix}
    out = run(name, GREEDY, (), batch=batch)
    whole = {
        "decoder_input_tokens": batch["decoder_prompt_tokens"],
        "decoder_target_tokens": np.ones((4, 14), np.int32),
        "decoder_causal_attention": prefix,
    }
    log_probs = np.asarray(jax.nn.log_softmax(jax.jit(lambda b: model.bind(params)(b))(whole)))
    expected = log_probs[np.arange(4), LENGTHS - 1].max(-1)
    np.testing.assert_allclose(out.token_log_probs[:, 0, 0], expected, atol=1e-5)
    causal = run(name, GREEDY, ()).token_log_probs[:, 0, 0]
    assert np.all(abs(causal - expected)[[1, 3]] > 1e-3)


def test_buckets_bound_the_number_of_compilations():
    sizes = {bucket(n) for n in range(1, 4097)}
    assert len(sizes) < 45
    assert all(n <= bucket(n) <= max(8, 1.25 * n) for n in range(1, 4097))
    made, shapes = generator("llama_grouped_queries", GREEDY, ()), []
    for length in (9, 10):
        tokens = np.ones((2, length + 3), np.int32)
        batch = {"decoder_prompt_tokens": tokens, "decoder_prompt_lengths": np.array([length, 1])}
        shapes.append(jax.tree.map(np.shape, made._inputs(batch, None)))
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("name", "lengths", "message"),
    [
        ("llama_grouped_queries", [3, 0], "Prompt 1 of the batch is empty"),
        ("learned_gpt2", [3, 33], "Prompt 1 of the batch has 33 tokens and may get 9 more, but"),
    ],
)
def test_prompts_that_cannot_be_continued(name, lengths, message):
    tokens = np.ones((2, 33), np.int32)
    batch = {"decoder_prompt_tokens": tokens, "decoder_prompt_lengths": np.array(lengths)}
    with pytest.raises(UserError, match=message):
        run(name, GREEDY, batch=batch)


def test_the_last_position_of_a_learned_table_is_used():
    """40 positions: 32 tokens and 9 more, of which the last is not read."""
    tokens = np.ones((1, 32), np.int32)
    batch = {"decoder_prompt_tokens": tokens, "decoder_prompt_lengths": np.array([32])}
    assert run("learned_gpt2", GREEDY, (), batch=batch).lengths[0, 0] == NEW


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (Sampling, {"top_p": 0.0}, "top_p is 0.0"),
        (Sampling, {"top_k": -1}, "top_k is -1"),
        (Sampling, {"stop_sequences": ((1,), ())}, "stop_sequences has an empty one"),
        (Sampling, {"min_p": 1.0}, "min_p is 1.0"),
        (BeamSearch, {"num_returned": 5}, "num_returned 5 is above num_beams 4"),
        (BeamSearch, {"length_penalty": "gnm"}, "Did you mean 'gnmt'"),
    ],
)
def test_settings_out_of_range(kind, fields, message):
    with pytest.raises(UserError, match=message):
        kind(max_new_tokens=3, **fields)
