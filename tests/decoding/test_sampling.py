"""Draws follow the exact distribution, written out here in another way; keys belong to prompts."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import pytest

from t5x_like.decoding import filters
from t5x_like.decoding.generate import Generator, example_keys
from t5x_like.decoding.sampling import Sampling
from t5x_like.models.base import ModelDef

from .configs import decoder, rope
from .conftest import random_params

VOCAB, DRAWS = 9, 20_000
PROMPT = np.array([[3, 5, 5, 1]])
MODEL = ModelDef(decoder(rope(), vocab_size=VOCAB, num_layers=1))
PARAMS = random_params(MODEL)


def exact(logits: np.ndarray, history: list[int], sampling: Sampling) -> np.ndarray:
    """Probabilities of the next token, by sorting."""
    logits = logits.astype(np.float64).copy()
    for token in set(history):
        factor = sampling.repetition_penalty
        logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
    p = np.exp((logits - logits.max()) / sampling.temperature)
    if sampling.top_k:
        p[np.argsort(-p)[sampling.top_k :]] = 0
    p /= p.sum()
    order = np.argsort(-p)
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= sampling.top_p]] = 0
    p[p < sampling.min_p * p.max()] = 0
    return p / p.sum()


@functools.cache
def logits_after(*tokens: int) -> np.ndarray:
    """By the whole forward pass, without a cache."""
    batch = {
        "decoder_input_tokens": np.array([tokens]),
        "decoder_target_tokens": np.ones((1, len(tokens))),
    }
    return np.asarray(_forward(PARAMS, batch)[0, -1])


_forward = jax.jit(lambda params, batch: MODEL.bind(params)(batch))


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.7},
        {"temperature": 2.0, "top_k": 4},
        {"temperature": 1.5, "top_p": 0.8},
        {"temperature": 1.5, "min_p": 0.2},
        {"temperature": 1.0, "repetition_penalty": 1.8},
        {"temperature": 2.5, "repetition_penalty": 1.3, "top_k": 7, "top_p": 0.95, "min_p": 0.1},
    ],
    ids=str,
)
def test_frequencies_of_pairs(fields):
    """Of 20,000 pairs: counts of first and of second tokens within 3 standard deviations of the
    exact expectation, and those of pairs likely (by a fixed seed)."""
    sampling = Sampling(max_new_tokens=2, num_samples=DRAWS, **fields)
    batch = {"decoder_prompt_tokens": PROMPT, "decoder_prompt_lengths": np.array([4])}
    generated = Generator(MODEL, sampling, eos_ids=())(PARAMS, batch)
    pairs = np.asarray(generated.tokens)[0]
    counts = np.zeros((VOCAB, VOCAB))
    np.add.at(counts, tuple(pairs.T), 1)

    prompt = [int(t) for t in PROMPT[0]]
    first = exact(logits_after(*prompt), prompt, sampling)
    second = [exact(logits_after(*prompt, a), [*prompt, a], sampling) for a in range(VOCAB)]
    expected = first[:, None] * np.stack(second)
    assert np.sum(expected > 0.01) >= 8  # a distribution worth testing
    if "top" in str(fields) or "min" in str(fields):
        assert np.any(expected == 0)
    for axis in (0, 1):  # the first token, and the second one after any
        of_token = expected.sum(axis=1 - axis)
        sigma = np.sqrt(DRAWS * of_token * (1 - of_token))
        assert np.all(abs(counts.sum(axis=1 - axis) - DRAWS * of_token) <= 3 * sigma)
    # All pairs at once; they are too many for 3 sigma to hold for each.
    assert not counts[expected == 0].any()
    often = DRAWS * expected >= 5
    chi2 = np.sum((counts - DRAWS * expected)[often] ** 2 / (DRAWS * expected)[often])
    degrees = often.sum() - 1
    assert chi2 < degrees + 3 * np.sqrt(2 * degrees)

    # Log-probabilities are the model's own.
    log_probs = jax.nn.log_softmax(logits_after(*prompt))[pairs[:, 0]]
    np.testing.assert_allclose(generated.token_log_probs[0, :, 0], log_probs, atol=1e-5)


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9, 0.999])
def test_top_p_keeps_the_smallest_nucleus(p):
    logits = np.random.default_rng(0).normal(scale=3, size=(50, 200)).astype(np.float32)
    kept = np.asarray(filters.keep_top_p(logits, p)) > filters.EXCLUDED
    probabilities = np.asarray(jax.nn.softmax(logits, axis=-1))
    for row, keep in zip(probabilities, kept, strict=True):
        inside = np.sort(row[keep])
        assert inside.sum() >= p - 1e-6
        assert inside[1:].sum() < p  # without the least likely one it is too little
        assert inside[0] > row[~keep].max(initial=0)


def test_samples_depend_on_the_key_of_their_prompt_alone():
    sampling = Sampling(max_new_tokens=6, temperature=1.0, num_samples=3)
    generator = Generator(MODEL, sampling, eos_ids=(2,))
    prompts = np.array([[3, 5, 5, 1], [4, 0, 0, 0], [4, 0, 0, 0], [7, 1, 0, 0]])
    lengths = np.array([4, 1, 1, 2])
    keys = example_keys(7, np.array([10, 11, 12, 13]))

    def run(rows: list[int]) -> Any:
        batch = {"decoder_prompt_tokens": prompts[rows], "decoder_prompt_lengths": lengths[rows]}
        return generator(PARAMS, batch, keys=keys[np.array(rows)])

    together, others = run([0, 1, 2, 3]), run([3, 2, 0, 2])
    for ours, theirs in ((0, 3), (1, 2), (2, 0), (3, 2)):
        np.testing.assert_array_equal(others.tokens[ours], together.tokens[theirs])
        np.testing.assert_allclose(others.scores[ours], together.scores[theirs], atol=1e-5)
    tokens = np.asarray(together.tokens)
    assert not np.array_equal(tokens[1], tokens[2])  # equal prompts, other keys
    assert len({tuple(t) for t in tokens[0]}) > 1  # samples differ
    assert np.all(np.diff(np.asarray(together.scores), axis=1) <= 0)  # best first
