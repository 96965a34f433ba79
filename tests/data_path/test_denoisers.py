"""Denoisers lose nothing, fit their lengths, and say what is wrong with them."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_like.data import denoisers
from t5x_like.data.denoisers import (
    AppendEos,
    Context,
    FullLM,
    IIDDenoising,
    PrefixLM,
    SpanCorruption,
)
from t5x_like.data.mixtures import generator
from t5x_like.data.ragged import Examples, Ragged
from t5x_like.errors import UserError
from tests.data_path.conftest import FEATURES, VOCABULARY

FIRST_SENTINEL = VOCABULARY.size - 1
DENOISERS = (
    SpanCorruption(),
    SpanCorruption(noise_density=0.5, mean_noise_span_length=3.0, prefix=(5,)),
    IIDDenoising(),
    PrefixLM(),
    PrefixLM(suffix_density=0.25, concatenate=True, prefix=(5, 6)),
)


def run(steps, documents, lengths=(64, 64), *, position: int = 0) -> tuple[Examples, Context]:
    context = Context(
        lengths=dict(zip(("inputs", "targets"), lengths, strict=True)), features=FEATURES
    )
    examples: Examples = {"targets": Ragged.from_rows([np.array(d, int) for d in documents])}
    rng = generator(11, position=position)
    for step in steps:
        examples = step.apply(examples, context, rng)
    return examples, context


@given(
    documents=st.lists(st.lists(st.integers(3, 900), max_size=70), max_size=12),
    denoiser=st.sampled_from([d for d in DENOISERS if not isinstance(d, PrefixLM)]),
)
@settings(max_examples=150, deadline=None)
def test_noise_and_the_rest_make_the_text(documents, denoiser):
    examples, context = run([denoiser], documents)
    restored = [
        token
        for inputs, targets in rows(examples, denoiser)
        for part in zip(runs(inputs), runs(targets), strict=True)
        for token in one_of(*part)
    ]
    assert restored == [token for document in documents for token in document]
    for name, tokens in examples.items():
        assert tokens.lengths.max(initial=0) < context.lengths[name]


@given(
    documents=st.lists(st.lists(st.integers(3, 900), max_size=200), max_size=12),
    denoiser=st.sampled_from([d for d in DENOISERS if isinstance(d, PrefixLM)]),
)
@settings(max_examples=100, deadline=None)
def test_prefix_and_suffix_make_the_text(documents, denoiser):
    examples, context = run([denoiser], documents, lengths=(40, 30))
    restored = [token for pair in rows(examples, denoiser) for part in pair for token in part]
    assert restored == [token for document in documents for token in document]
    assert examples["targets"].lengths.min(initial=1) > 0
    for name, tokens in examples.items():
        assert tokens.lengths.max(initial=0) < context.lengths[name]


def rows(examples: Examples, denoiser) -> list[tuple[list[int], list[int]]]:
    """(inputs without the prefix, targets) of each example."""
    pairs = [
        (examples["inputs"][i].tolist(), examples["targets"][i].tolist())
        for i in range(len(examples["inputs"]))
    ]
    size = len(denoiser.prefix)
    assert all(tuple(inputs[:size]) == denoiser.prefix for inputs, _ in pairs)
    return [(inputs[size:], targets) for inputs, targets in pairs]


def runs(tokens: list[int]) -> list[list[int]]:
    """Runs of tokens, an empty one for each sentinel; sentinels descend from the last id."""
    found: list[list[int]] = []
    sentinel = FIRST_SENTINEL
    for token in tokens:
        if token == sentinel:
            found.append([])
            sentinel -= 1
        elif found and found[-1]:
            found[-1].append(token)
        else:
            found.append([token])
    return found


def one_of(first: list[int], second: list[int]) -> list[int]:
    assert bool(first) != bool(second), "a sentinel stands against a run of the other side"
    return first or second


def test_joined_and_cut_as_t5_does(oracle_dir: Path):
    case = json.loads((oracle_dir / "span_corruption.json").read_text())["concat_split"]
    examples, _ = run([SpanCorruption()], case["documents"], lengths=(case["inputs_length"], 14))
    restored = [
        [token for part in zip(runs(i), runs(t), strict=True) for token in one_of(*part)]
        for i, t in rows(examples, SpanCorruption())
    ]
    # The oracle's vocabulary is larger; its ids meet our sentinels nowhere in these documents.
    assert [len(segment) for segment in case["segments"]] == [len(row) for row in restored]
    assert restored == case["segments"]


def test_padding_inside_documents_is_dropped():
    documents = [[5, 0, 6], [0, 0], [7]]  # as a source may pad them
    for denoiser in (SpanCorruption(), PrefixLM(suffix_density=0.5)):
        examples, _ = run([denoiser], documents)
        tokens = np.concatenate([t.values for t in examples.values()])
        assert sorted(t for t in tokens if t <= 900) == [5, 6, 7]


def test_id_0_of_a_vocabulary_that_has_it_as_a_token_is_kept():
    """GPT-2's "!"."""
    vocabulary = dataclasses.replace(FEATURES["targets"].vocabulary, zero_is_token=True)
    feature = dataclasses.replace(FEATURES["targets"], vocabulary=vocabulary)
    context = Context(lengths={"inputs": 64, "targets": 64}, features={"targets": feature})
    documents = Ragged.from_rows([np.array([5, 0, 6]), np.array([0, 7])])
    rng = np.random.default_rng(0)
    examples = FullLM().apply({"targets": documents}, context, rng)
    eos = vocabulary.eos_id
    assert examples["targets"].values.tolist() == [5, 0, 6, eos, 0, 7, eos]


def test_ul2_lengths():
    context = Context(lengths={"inputs": 512, "targets": 512}, features=FEATURES)
    lengths = {
        (density, mean): SpanCorruption(
            noise_density=density, mean_noise_span_length=mean
        ).tokens_length(context)
        for density, mean in ((0.15, 3.0), (0.15, 8.0), (0.5, 3.0), (0.5, 64.0), (0.15, 64.0))
    }
    assert list(lengths.values()) == [568, 588, 766, 1006, 600]
    assert PrefixLM().tokens_length(context) == 511
    # 511 tokens of prefix and EOS; three quarters of the sequence.
    assert PrefixLM(suffix_density=0.25, concatenate=True).tokens_length(context) == 681


def test_random_prefix_is_uniform():
    examples, _ = run([PrefixLM()], [[7] * 9] * 8000)
    counts = np.bincount(examples["inputs"].lengths, minlength=10)
    assert counts[0] == counts[9] == 0
    assert (abs(counts[1:9] - 1000) < 5 * np.sqrt(1000)).all()


def test_full_lm_puts_eos_between_documents():
    examples, _ = run([FullLM()], [[5, 6], [7], [8, 9, 10]], lengths=(4, 4))
    assert [examples["targets"][i].tolist() for i in range(3)] == [[5, 6, 1, 7], [1, 8, 9, 10], [1]]


def test_append_eos_trims_and_counts(caplog):
    examples, context = run([AppendEos()], [[5, 6, 7, 8, 9], [5]], lengths=(4, 4))
    assert examples["targets"][0].tolist() == [5, 6, 7, 1]
    assert examples["targets"][1].tolist() == [5, 1]
    assert context.trimmed["targets"] == 2
    assert "2 of 6 tokens lie beyond the length 3" in caplog.text


def test_noise_is_a_function_of_the_position():
    documents = [list(range(3, 500))]
    (first, _), (again, _) = run([SpanCorruption()], documents), run([SpanCorruption()], documents)
    other, _ = run([SpanCorruption()], documents, position=1)
    assert np.array_equal(first["inputs"].values, again["inputs"].values)
    assert not np.array_equal(first["inputs"].values, other["inputs"].values)


def test_steps_survive_json():
    for step in (*DENOISERS, FullLM(), AppendEos()):
        assert denoisers.from_dict(json.loads(json.dumps(step.to_dict()))) == step
    with pytest.raises(UserError, match="Did you mean 'SpanCorruption'"):
        denoisers.from_dict({"op": "SpanCoruption", "args": {}})


@pytest.mark.parametrize(
    ("step", "lengths", "message"),
    [
        (SpanCorruption(), (2, 10), "inputs' length 2 is too short for one span"),
        (SpanCorruption(prefix=(5, 6)), (4, 10), "2 prefix tokens take 5"),
        (SpanCorruption(), (512, 113), "targets' length 113 is too short.*needs 114"),
        (IIDDenoising(), (512, 114), "IIDDenoising of 511 tokens at density 0.15 needs about"),
        (PrefixLM(), (1, 10), "too short for PrefixLM"),
    ],
)
def test_lengths_too_short(step, lengths, message):
    with pytest.raises(UserError, match=message):
        run([step], [[5, 6, 7]], lengths=lengths)


def test_bad_settings():
    with pytest.raises(UserError, match=r"density is 1.5"):
        SpanCorruption(noise_density=1.5)
    with pytest.raises(UserError, match=r"mean_noise_span_length is 0.5"):
        SpanCorruption(mean_noise_span_length=0.5)
    context = Context(lengths={"targets": 10}, features=FEATURES)
    with pytest.raises(UserError, match="no length for 'inputs'"):
        SpanCorruption().tokens_length(context)


def test_more_spans_than_sentinels_is_said(caplog):
    few = dataclasses.replace(VOCABULARY, extra_ids=3)
    features = {k: dataclasses.replace(f, vocabulary=few) for k, f in FEATURES.items()}
    context = Context(lengths={"inputs": 64, "targets": 64}, features=features)
    examples = {"targets": Ragged.from_rows([np.arange(3, 200)])}
    denoiser = SpanCorruption(noise_density=0.5)
    denoiser.apply(examples, context, generator(0, position=0))
    assert "the vocabulary has 3, a sequence has" in caplog.text
