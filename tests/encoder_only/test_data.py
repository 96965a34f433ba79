"""Global batches of masked language modelling from a cache: hosts, resuming, fresh noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from t5x_like.data import cache_format, cache_writer, vocabularies
from t5x_like.data.cache_format import CachedFeature, OutputFeature, TaskManifest
from t5x_like.data.dataset import DatasetConfig
from t5x_like.data.encoder_converters import ClassificationConverter, NextSentenceConverter
from t5x_like.data.encoder_steps import MaskTokens, Passages, SentencePairs


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    """Tasks "pairs" and "labelled" over 40 documents of random tokens."""
    directory = tmp_path_factory.mktemp("cache")
    vocabulary = vocabularies.load("tasks/kjv/vocabulary.model").spec
    rng = np.random.default_rng(0)
    documents = [
        {"targets": rng.integers(300, 8000, rng.integers(5, 300)), "label": np.int32([i % 6])}
        for i in range(40)
    ]
    features = {"targets": CachedFeature(dtype="uint16"), "label": CachedFeature(dtype="int32")}
    identity = {"name": "random"}
    corpus = cache_format.fingerprint(identity)
    cache_writer.write_shard(
        documents,
        corpus=cache_format.corpus_dir(directory, corpus),
        split="train",
        name=cache_format.shard_name(0, 1),
        features=features,
        token_features=["targets"],
    )
    cache_writer.complete_corpus(
        directory,
        identity=identity,
        features=features,
        shards={"train": [cache_format.shard_name(0, 1)]},
    )
    pipelines = {
        "pairs": (SentencePairs(), MaskTokens(whole_words=True)),
        "labelled": (Passages(),),
    }
    for name, steps in pipelines.items():
        manifest = TaskManifest(
            name=name,
            kind="task",
            corpus=corpus,
            output_features={"targets": OutputFeature(vocabulary=vocabulary)},
            pipeline=tuple(step.to_dict() for step in steps),
        )
        cache_writer.write_task(directory, manifest)
    return str(directory)


def config(cache: str, name: str, **changes) -> DatasetConfig:
    converter = NextSentenceConverter() if name == "pairs" else ClassificationConverter()
    settings = {
        "task_feature_lengths": {"inputs": 48, "targets": 8},
        "batch_size": 8,
        "feature_converter": converter,
        "pack": True,
        "cache_dir": cache,
    }
    return DatasetConfig(mixture_or_task_name=name, **settings | changes)


@pytest.mark.parametrize("name", ["pairs", "labelled"])
@pytest.mark.parametrize("pack", [True, False])
def test_hosts_and_restarts_see_the_same_batches(cache, name, pack):
    made = config(cache, name, pack=pack)
    whole = made.build()
    batches = [next(whole) for _ in range(12)]
    spec = {k: (v.shape, v.dtype) for k, v in batches[0].items()}
    assert spec == made.element_spec
    halves = [made.build(range(4)), made.build(range(4, 8))]
    for i, batch in enumerate(batches):
        parts = [next(half) for half in halves]
        for k in batch:
            np.testing.assert_array_equal(batch[k], np.concatenate([p[k] for p in parts]))
        if i == 6:
            state = whole.get_state() | {"shards": {}}
            for half in halves:
                state["shards"] |= half.get_state()["shards"]
    resumed = made.build()
    resumed.set_state(state)
    for batch in batches[7:]:
        again = next(resumed)
        for k in batch:
            np.testing.assert_array_equal(batch[k], again[k])


def test_every_epoch_has_its_own_noise(cache):
    batches = config(cache, "pairs", num_epochs=2, shuffle=False, pack=False, batch_size=500)
    batch = next(batches.build())
    real = batch["encoder_segment_ids"].any(1)
    rows, places = batch["encoder_input_tokens"][real], batch["encoder_target_positions"][real]
    half = len(rows) // 2
    assert len(rows) == 2 * half
    assert (places[:half] != places[half:]).any(axis=1).mean() > 0.9
    labels = batch["class_labels"][real, 0]
    assert 0.3 < (labels[:half] != labels[half:]).mean() < 0.7


def test_labels_go_with_their_documents(cache):
    batch = next(
        config(cache, "labelled", num_epochs=1, shuffle=False, pack=False, batch_size=500).build()
    )
    labels = batch["class_labels"][batch["class_loss_weights"] > 0]
    assert set(labels) == set(range(6))
    # Documents in order, so that the label goes up by one (modulo 6) from document to document.
    steps = np.diff(labels) % 6
    assert set(steps) == {0, 1} and (steps == 1).sum() == 39


def test_genre_task_is_cached_with_its_labels(tmp_path: Path):
    made = config(str(tmp_path), "kjv_genre", module="tasks.kjv", split="validation", num_epochs=1)
    batches = list(made.build())
    weights = np.concatenate([b["class_loss_weights"].ravel() for b in batches])
    labels = np.concatenate([b["class_labels"].ravel() for b in batches])[weights > 0]
    # Of the books held out none is of the law; John, the longest, is a gospel.
    counts = np.bincount(labels, minlength=6)
    assert counts[0] == 0 and counts[1:].all() and counts.argmax() == 4
