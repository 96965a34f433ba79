"""SeqIO Tasks of a collection of instruction data."""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import seqio
import tensorflow as tf

from t5x_like.data.chat import WEIGHTS, ChatFormat, ChatLM, ChatTurns, find_format
from t5x_like.data.denoisers import AppendEos, Preprocessor
from t5x_like.data.templates import GROUP, Instruct, Record, Template, few_shot, write_record
from t5x_like.errors import UserError
from tasks.instruct import metrics
from tasks.instruct.sources import Prepare, as_records, code_digest, read_examples, records_of

# Share of the examples that each kind of template gets, where a collection has all of them.
SHARES = {"zero_shot": 0.5, "few_shot": 0.3, "chain_of_thought": 0.1, "inversion": 0.1}
# The exemplars are drawn from so many records, out of so many examples of their split.
_POOL = 64
_SCANNED = 1 << 14
_POOL_BYTES = 1 << 18


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collection:
    """A public data set as instructions.

    Attributes:
      prepare: example to records.
      templates: zero-shot, chain-of-thought and inversion; `t5` ones are T5's own prompt. Few-shot
        ones are made of the zero-shot ones.
      shots: numbers of solved examples of the few-shot templates; () for none.
      shares: of the kinds of templates, in `name` itself.
      tfds: name and version in TFDS, or "".
      exemplar_split: where solved examples are taken from.
      metric_fns: SeqIO's metric functions of (targets, predictions).
      postprocess_fn: SeqIO's, for targets that metrics want otherwise than as text.
    """

    prepare: Prepare
    templates: tuple[Template, ...]
    shots: tuple[int, ...] = (2,)
    shares: Mapping[str, float] = dataclasses.field(default_factory=lambda: SHARES)
    tfds: str = ""
    exemplar_split: str = "train"
    metric_fns: tuple[Callable[..., Mapping[str, Any]], ...] = (metrics.exact_match,)
    postprocess_fn: Callable[..., Any] | None = None

    def all_templates(self) -> list[Template]:
        """The templates with the few-shot ones, weighted by `shares`; T5's last."""
        zero_shot = [t for t in self.templates if t.kind == "zero_shot"]
        shown = [few_shot(t, shots=k) for k, t in zip(itertools.cycle(self.shots), zero_shot)]
        every = [*self.templates, *shown] if self.shots else list(self.templates)
        counts = collections.Counter(t.kind for t in every)
        weighted = [
            dataclasses.replace(t, weight=t.weight * self.shares.get(t.kind, 1.0) / counts[t.kind])
            for t in every
        ]
        return sorted(weighted, key=lambda t: t.kind == "t5")


class WithExemplars:
    """`Instruct` whose exemplars are read from the source, when they are needed."""

    def __init__(
        self, step: Instruct, *, source: seqio.DataSource, split: str, prepare: Prepare
    ) -> None:
        self._step, self._source, self._split, self._prepare = step, source, split, prepare

    def resolve(self, output_features: Mapping[str, seqio.Feature]) -> Instruct:
        del output_features
        if not any(template.shots for template in self._step.templates):
            return self._step
        pool = exemplars(self._source, self._split, self._prepare)
        return dataclasses.replace(self._step, exemplars=pool)

    def __call__(
        self,
        dataset: tf.data.Dataset,
        sequence_length: Mapping[str, int] | None,
        output_features: Mapping[str, seqio.Feature],
    ) -> tf.data.Dataset:
        return self.resolve(output_features)(dataset, sequence_length, output_features)


@functools.lru_cache(maxsize=128)
def exemplars(source: seqio.DataSource, split: str, prepare: Prepare) -> tuple[Record, ...]:
    """At most 64 records of as many examples of a split, 256 kB, chosen by a digest of the example.

    Where records have a group, there are up to five of each in place of 64.
    """
    examples = itertools.islice(read_examples(source, split), _SCANNED)
    chosen: list[Record] = []
    room, taken = _POOL_BYTES, collections.Counter[str]()
    for example in sorted(examples, key=lambda example: _digest(json.dumps(example))):
        for record in records_of(prepare, example)[:1]:
            group = str(record.get(GROUP, ""))
            size = len(write_record(record))
            if taken[group] < (5 if group else _POOL) and size <= room:
                taken[group] += 1
                room -= size
                chosen.append(record)
        if taken[""] == _POOL:
            break
    return tuple(chosen)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def add_tasks(
    name: str,
    collection: Collection,
    *,
    source: seqio.DataSource,
    vocabulary: seqio.Vocabulary,
) -> list[str]:
    """Registers `name`, of all templates but T5's, and `name_KIND` for each kind that there is.

    All of them share one cache of records.

    Args:
      source: of the examples that `collection.prepare` reads.

    Returns:
      Names of the Tasks, `name` first.
    """
    both = {feature: seqio.Feature(vocabulary, add_eos=True) for feature in ("inputs", "targets")}
    templates = collection.all_templates()
    kinds = list(dict.fromkeys(t.kind for t in templates))
    chosen = {name: [t for t in templates if t.kind != "t5"]}
    chosen |= {f"{name}_{kind}": [t for t in templates if t.kind == kind] for kind in kinds}
    for task, of_task in chosen.items():
        step = WithExemplars(
            Instruct(templates=tuple(of_task)),
            source=source,
            split=collection.exemplar_split,
            prepare=collection.prepare,
        )
        seqio.TaskRegistry.add(
            task,
            source=source,
            preprocessors=[
                *to_cache(collection.prepare),
                step.__call__,
                AppendEos().__call__,
            ],
            output_features=both,
            metric_fns=list(collection.metric_fns),
            postprocess_fn=collection.postprocess_fn,
        )
    return list(chosen)


def add_chat_tasks(
    name: str,
    *,
    source: seqio.DataSource,
    vocabulary: seqio.Vocabulary,
    format: str | ChatFormat = "plain",
) -> list[str]:
    """Registers Tasks over conversations: see `schemas.chat` for the forms that are read.

    `name_lm` is for decoders (`WeightedLMConverter`): whole conversations, loss on the assistant's
    turns. `name_turns` is for encoder-decoders: an example for each of the assistant's turns.

    Args:
      format: one of `t5x_like.data.chat.FORMATS`, or one of your own.

    Raises:
      UserError: there is no such format.
    """
    from tasks.instruct.schemas import chat

    chosen = find_format(format)
    prepare = functools.partial(chat.prepare, format=chosen)
    tokens = seqio.Feature(vocabulary, add_eos=False)
    steps: dict[str, tuple[Preprocessor, tuple[str, ...]]] = {
        f"{name}_lm": (ChatLM(format=chosen), ("targets", WEIGHTS)),
        f"{name}_turns": (ChatTurns(format=chosen), ("inputs", "targets")),
    }
    for task, (step, features) in steps.items():
        seqio.TaskRegistry.add(
            task,
            source=source,
            preprocessors=[*to_cache(prepare), step.__call__],
            output_features={feature: tokens for feature in features},
            metric_fns=[],
        )
    return list(steps)


def to_cache(prepare: Prepare) -> Sequence[Any]:
    """The preprocessors up to the cache point: examples to records."""
    to_records = functools.partial(as_records, prepare=prepare, code=code_digest(prepare))
    return (to_records, seqio.CacheDatasetPlaceholder())


def add_mixture(
    name: str,
    tasks: Sequence[str] | Mapping[str, float],
    *,
    cap: float | None = None,
    temperature: float = 1.0,
) -> None:
    """Registers a mixture of Tasks, or of mixtures.

    Args:
      tasks: names with their rates; or names alone, whose rates are min(examples, cap) ^
        (1 / temperature): in proportion to their size, but none larger than `cap` (Raffel et al.
        2020, section 3.5.2), and more alike the higher the temperature.

    Raises:
      UserError: a rate, the cap or the temperature is not positive.
    """
    if isinstance(tasks, Mapping):
        if not all(rate > 0 for rate in tasks.values()):
            raise UserError(f"The mixture {name!r} has rates {dict(tasks)}; all must be positive.")
        seqio.MixtureRegistry.add(name, list(tasks.items()))
        return
    if not temperature > 0 or (cap is not None and not cap > 0):
        raise UserError(
            f"The mixture {name!r} has cap = {cap} and temperature = {temperature}; both must be "
            "positive."
        )
    rate = functools.partial(size_rate, cap=cap, temperature=temperature)
    seqio.MixtureRegistry.add(name, [(task, rate) for task in tasks])


def size_rate(task: seqio.Task, *, cap: float | None, temperature: float) -> float:
    """min(examples, cap) ^ (1 / temperature); the examples are those of the train split."""
    count = task.source.num_input_examples("train")
    if count is None:
        raise UserError(
            f"The source of {task.name!r} does not know its size. Give the mixture explicit rates."
        )
    return min(count, float("inf") if cap is None else cap) ** (1 / temperature)
