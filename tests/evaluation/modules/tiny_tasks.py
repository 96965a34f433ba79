"""SeqIO Tasks of a few lines over bytes, for the tests of evaluation and inference."""

from __future__ import annotations

import json

import seqio
import tensorflow as tf

from t5x_like.evaluation import metrics

WORDS = ("ox", "ram", "dove", "lion", "fish", "bee", "hen", "ant", "asp", "owl", "bat", "cow")
SIZES = {"train": 24, "validation": 12}


def _pairs(split: str) -> list[tuple[str, str]]:
    """ "say ox" -> "ox": the same words in both splits, so that one can be learnt by heart."""
    return [
        (f"say {WORDS[i % len(WORDS)]} {i}", WORDS[i % len(WORDS)]) for i in range(SIZES[split])
    ]


def _copies(split: str, shuffle_files: bool = False, seed: int | None = None) -> tf.data.Dataset:
    del shuffle_files, seed
    inputs, targets = zip(*_pairs(split), strict=True)
    return tf.data.Dataset.from_tensor_slices({"inputs": list(inputs), "targets": list(targets)})


def _choices(split: str, shuffle_files: bool = False, seed: int | None = None) -> tf.data.Dataset:
    """An example a choice: its question, and whether it is right, come along."""
    del shuffle_files, seed
    rows = [
        (question, choice, json.dumps([i, choice == answer, choice]))
        for i, (question, answer) in enumerate(_pairs(split)[:4])
        for choice in WORDS[:3]
    ]
    inputs, targets, keys = zip(*rows, strict=True)
    columns = {"inputs": list(inputs), "targets": list(targets), "key": list(keys)}
    return tf.data.Dataset.from_tensor_slices(columns)


def _key(text: str, *, example, is_target: bool):
    return tuple(json.loads(example["key"])) if is_target else text


_FEATURE = seqio.Feature(seqio.ByteVocabulary(extra_ids=125), add_eos=True)
_STEPS = [
    seqio.preprocessors.tokenize,
    seqio.CacheDatasetPlaceholder(),
    seqio.preprocessors.append_eos_after_trim,
]


def _shout(text: str, **_) -> str:
    return text.upper()


def _add(name: str, function, *, steps=_STEPS, features=("inputs", "targets"), **scored) -> None:
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(dataset_fn=function, splits=list(SIZES)),
        preprocessors=steps,
        output_features=dict.fromkeys(features, _FEATURE),
        **scored,
    )


_add("tiny_copy", _copies, metric_fns=[metrics.accuracy, metrics.bits_per_byte])
_add("tiny_shout", _copies, metric_fns=[metrics.exact_match], postprocess_fn=_shout)
_add("tiny_choice", _choices, metric_fns=[metrics.rank_classification], postprocess_fn=_key)
_add("tiny_unscored", _copies)
# A step after the cache point that only SeqIO can run: no cache, it is streamed.
_add("tiny_streamed", _copies, steps=[*_STEPS, lambda ds: ds], metric_fns=[metrics.accuracy])
_add("tiny_lm", _copies, features=("targets",), metric_fns=[])
seqio.MixtureRegistry.add("tiny_mixture", ["tiny_copy", "tiny_shout"], default_rate=1.0)
