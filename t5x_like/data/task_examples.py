"""The examples of Tasks one by one, with all of their fields, for evaluation and inference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from t5x_like.data import cache_format, dataset, quiet
from t5x_like.data.cache_format import OutputFeature, TaskManifest
from t5x_like.data.cache_reader import SplitReader
from t5x_like.data.dataset import DatasetConfig
from t5x_like.data.denoisers import Context, from_dict
from t5x_like.data.mixtures import generator, stream_key
from t5x_like.data.ragged import Ragged

Fields = dict[str, Any]
# Documents that go through the steps together.
_GROUP = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskExamples:
    """A Task's examples in an order that depends on the config alone.

    Attributes:
      name: of the Task.
      module: Python module that registers it; None if it is not known.
      features: what the model gets.
      read: () -> the examples: token features as i32 arrays, and whatever else the Task carries
        along (`inputs_pretokenized`, a record, ids), strings as bytes.
    """

    name: str
    module: str | None
    features: Mapping[str, OutputFeature]
    read: Callable[[], Iterator[Fields]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskFunctions:
    """How a Task is scored.

    Attributes:
      metric_fns: SeqIO's metric functions.
      postprocess: (text, example=fields, is_target=bool) -> what these functions are given.
    """

    metric_fns: Sequence[Callable[..., Mapping[str, Any]]] = ()
    postprocess: Callable[..., Any] = lambda text, *, example, is_target: text


def open_tasks(config: DatasetConfig) -> list[TaskExamples]:
    """The Task of `config`, or every Task of its Mixture; one epoch of the split.

    As for training, a Task is read from its cache, which is made if need be, unless `use_cached`
    is False or some of its steps are only SeqIO's.

    Raises:
      UserError: see `DatasetConfig.build`.
    """
    if config.use_cached is False:
        return _streamed(config, config.mixture_or_task_name)
    members = [m for m, _ in dataset.members_of(config.cache_dir, config.cached_task())]
    return [
        task
        for member in members
        for task in (
            _streamed(config, member.name) if member.pipeline is None else [_cached(config, member)]
        )
    ]


def load_functions(task: TaskExamples) -> TaskFunctions:
    """The metric and postprocess functions of a Task; imports its module, and so TensorFlow.

    Raises:
      UserError: the module or the Task is not there.
    """
    with quiet.native_stderr_closed():
        from t5x_like.data import seqio_tasks
    return seqio_tasks.load_functions(task.name, task.module)


def _streamed(config: DatasetConfig, name: str) -> list[TaskExamples]:
    with quiet.native_stderr_closed():
        from t5x_like.data import seqio_tasks
    return seqio_tasks.open_tasks(config, name)


def _cached(config: DatasetConfig, task: TaskManifest) -> TaskExamples:
    config.check_vocabulary(task.output_features)
    corpus = cache_format.read_corpus(config.cache_dir, task.corpus)
    documents = SplitReader(config.cache_dir, corpus, config.split)
    reader = _CachedExamples(config, task, documents)
    reader.apply([], group=0)  # To see at once whether lengths and steps fit together.
    return TaskExamples(
        name=task.name,
        module=config.module or task.module or None,
        features=task.output_features,
        read=reader.read,
    )


class _CachedExamples:
    """Runs the steps after the cache point on groups of documents."""

    def __init__(self, config: DatasetConfig, task: TaskManifest, documents: SplitReader) -> None:
        self._documents = documents
        self._steps = [from_dict(step) for step in task.pipeline or ()]
        self._context = Context(lengths=config.task_feature_lengths, features=task.output_features)
        self._key = stream_key(config.seed, task.name, "examples")
        self._shuffle = config.shuffle

    def read(self) -> Iterator[Fields]:
        order: Sequence[int] = range(self._documents.num_documents)
        if self._shuffle:
            rng = generator(stream_key(self._key, "order"), position=0)
            order = rng.permutation(self._documents.num_documents).tolist()
        for group, start in enumerate(range(0, len(order), _GROUP)):
            indices = order[start : start + _GROUP]
            yield from self.apply([self._documents.read_one(i) for i in indices], group=group)

    def apply(self, documents: Sequence[Mapping[str, np.ndarray]], *, group: int) -> list[Fields]:
        names = list(self._documents.nothing())
        tokens = {name: Ragged.from_rows([d[name] for d in documents]) for name in names}
        rng = generator(self._key, position=group)
        for step in self._steps:
            tokens = dict(step.apply(tokens, self._context, rng))
        lengths = self._context.lengths
        for name in tokens.keys() & lengths.keys():
            tokens[name] = self._context.trim(name, tokens[name], lengths[name])
        count = len(next(iter(tokens.values())))
        examples: list[Fields] = [{n: t[i] for n, t in tokens.items()} for i in range(count)]
        if all(step.keeps_examples for step in self._steps):
            for example, document in zip(examples, documents, strict=True):
                example |= {n: _plain(v) for n, v in document.items() if n not in tokens}
        return examples


def _plain(value: np.ndarray) -> Any:
    """A scalar as itself, such as the bytes of a text."""
    return value.item() if value.ndim == 0 else value
