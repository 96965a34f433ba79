"""What tells two corpora apart: all that the steps before the cache point remember."""

import functools

import pytest
import seqio
import tensorflow as tf

from t5x_like.data import seqio_cache
from t5x_like.data.cache_format import fingerprint
from tasks.instruct import embedded

VOCABULARY = seqio.ByteVocabulary()


def digest(step):
    """The fingerprint of a Task that has `step` before its cache point."""
    task = seqio.Task(
        "identity",
        source=seqio.FunctionDataSource(_examples, splits=["train"]),
        preprocessors=[step, seqio.CacheDatasetPlaceholder()],
        output_features={"targets": seqio.Feature(VOCABULARY, add_eos=False)},
    )
    return fingerprint(seqio_cache.corpus_identity(task, ["train"]))


def _examples(split, shuffle_files, seed=None):
    return tf.data.Dataset.from_tensors({"targets": tf.constant([1])})


def closure(captured):
    def step(dataset):
        return dataset if captured is not None else dataset.take(1)

    return step


def with_default(number):
    def step(dataset, count=number):
        return dataset.take(count)

    return step


def mapped(number):
    @seqio.map_over_dataset
    def step(example):
        return {"targets": example["targets"] + number}

    return step


class Taker:
    def __init__(self, number):
        self.number = number

    def __call__(self, dataset):
        return dataset.take(self.number)

    def method(self, dataset):
        return dataset.take(self.number)


def recursive(number):
    def step(dataset, depth=0):
        return dataset.take(number) if depth else step(dataset, 1)

    return step


@pytest.mark.parametrize(
    "make",
    [
        closure,
        with_default,
        mapped,
        Taker,
        lambda number: Taker(number).method,
        recursive,
        lambda number: functools.partial(closure(number)),
        lambda number: closure(closure(number)),
        lambda number: closure({"nested": [number]}),
        lambda number: closure(Taker(number)),
    ],
)
def test_what_a_step_captured_tells_corpora_apart(make):
    assert digest(make(1)) != digest(make(2))
    assert digest(make(1)) == digest(make(1))


def test_lambdas_of_one_line_are_told_apart():
    lambdas = (lambda x: x), (lambda x: -x), (lambda x: x - 1), (lambda x: x - 2), (lambda x: x.at)
    assert len({digest(closure(function)) for function in lambdas}) == len(lambdas)


def test_the_order_of_a_set_does_not_matter():
    assert digest(closure({"a", "b", "c", 3})) == digest(closure({3, "c", "b", "a"}))
    one, other = closure(1), closure(2)
    assert digest(closure({one, other})) == digest(closure({closure(2), closure(1)}))


def test_every_embedded_task_has_records_of_its_own():
    """Tasks that one function makes (list_last, list_count, ...) once shared a corpus: the answers
    of whichever was cached first."""
    names = [f"embedded_{name}" for name in embedded.COLLECTIONS]
    identities = {
        name: fingerprint(
            seqio_cache.corpus_identity(seqio.TaskRegistry.get(name), ["train", "validation"])
        )
        for name in names
    }
    assert len(set(identities.values())) == len(names)
    zero_shot = seqio.TaskRegistry.get("embedded_list_last_zero_shot")
    assert (
        fingerprint(seqio_cache.corpus_identity(zero_shot, ["train", "validation"]))
        == identities["embedded_list_last"]
    )
