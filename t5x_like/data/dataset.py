"""What gin binds to say which data a run reads, and the choice of the route to it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from t5x_like.data import cache_format, quiet, task_modules, vocabularies
from t5x_like.data.batch_iterator import BatchIterator, ElementSpec, Shard, ShardedBatchIterator
from t5x_like.data.cache_format import OutputFeature, TaskManifest
from t5x_like.data.cache_reader import SplitReader
from t5x_like.data.converters import EncDecConverter, FeatureConverter
from t5x_like.data.denoisers import Context, from_dict
from t5x_like.data.grain_pipeline import TaskWindows, WindowStream
from t5x_like.data.mixtures import MixtureStream, stream_key
from t5x_like.data.packing import Stream
from t5x_like.errors import UserError, did_you_mean

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """A Task or Mixture as global batches; T5X's names.

    The global batch t depends on this config and t alone, not on the number of hosts.

    Attributes:
      task_feature_lengths: most tokens of each of the Task's features, such as
        {"inputs": 512, "targets": 114}.
      batch_size: rows of the global batch.
      cache_dir: where `t5x_like cache` keeps its token caches.
      split: of the Task.
      shuffle: whether documents come in a new random order in each epoch.
      seed: of that order, of the noise and of the mixing.
      pack: whether a row holds several examples.
      module: Python module that registers the Task (T5X's MIXTURE_OR_TASK_MODULE).
      num_epochs: None for no end. With a number, the last batch is filled up with rows of zero
        weight, and every host reads all examples.
      feature_converter: which arrays the model takes.
      use_cached: True to read the cache, False to run the Task in SeqIO as training goes; "auto"
        reads the cache, making it if need be, unless the Task has steps after the cache point that
        only SeqIO can run.
      vocabulary: "bytes" or a file; the Task's vocabulary must be this one. None for no check.
    """

    mixture_or_task_name: str
    task_feature_lengths: Mapping[str, int]
    batch_size: int
    cache_dir: str
    split: str = "train"
    shuffle: bool = True
    seed: int = 0
    pack: bool = False
    module: str | None = None
    num_epochs: int | None = None
    feature_converter: FeatureConverter = dataclasses.field(default_factory=EncDecConverter)
    use_cached: bool | Literal["auto"] = "auto"
    vocabulary: str | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size is {self.batch_size}; it must be at least 1.")
        if self.num_epochs is not None and self.num_epochs < 1:
            raise UserError(f"num_epochs is {self.num_epochs}; give at least 1, or None.")
        if self.use_cached not in (True, False, "auto"):
            raise UserError(f"use_cached is {self.use_cached!r}; give True, False or 'auto'.")
        self.feature_converter.limits(self.task_feature_lengths)
        object.__setattr__(self, "cache_dir", os.path.expanduser(self.cache_dir))

    @property
    def element_spec(self) -> ElementSpec:
        """name -> (shape, dtype) of the global batch; reads nothing."""
        return self.feature_converter.element_spec(
            self.task_feature_lengths, batch_size=self.batch_size, pack=self.pack
        )

    def build(self, rows: Sequence[int] | None = None) -> BatchIterator:
        """Opens the data and starts to read it in a background thread.

        Args:
          rows: which rows of the global batch to deliver, in this order; None for all.

        Raises:
          UserError: rows outside of the batch, an unknown Task, a cache that does not fit, lengths
            too short for the Task.
        """
        rows = list(range(self.batch_size) if rows is None else map(int, rows))
        if not rows or len(set(rows)) < len(rows) or not set(rows) <= set(range(self.batch_size)):
            raise UserError(
                f"Rows {rows[:8]} (of {len(rows)}) are not distinct rows of a batch of "
                f"{self.batch_size}. Use a batch_size that divides among the hosts."
            )
        if self.use_cached is False:
            return self._build_seqio(rows, "use_cached is False")
        task = self.cached_task()
        members = members_of(self.cache_dir, task)
        foreign = [f"{m.name}: {m.not_serializable}" for m, _ in members if m.pipeline is None]
        if not foreign:
            _log_route(f"{self.mixture_or_task_name!r} is read from the cache by Grain.")
            return self._build_grain(rows, task, members)
        if self.use_cached is True:
            raise UserError(
                f"use_cached is True, but steps after the cache point need SeqIO ({foreign[0]}). "
                "Set use_cached = 'auto'."
            )
        return self._build_seqio(rows, foreign[0])

    def check_vocabulary(self, features: Mapping[str, OutputFeature]) -> None:
        """Raises UserError if a feature's vocabulary is not `vocabulary`, or tells no padding."""
        unmarked = "encoder_input_tokens" in self.element_spec and (
            "encoder_segment_ids" not in self.element_spec
        )
        for name, feature in features.items() if unmarked else ():
            if feature.vocabulary.zero_is_token:
                raise UserError(
                    f"Id 0 is a token in the vocabulary of {name!r} of "
                    f"{self.mixture_or_task_name!r}, so that an encoder cannot tell padding by it; "
                    "set DatasetConfig.pack = True."
                )
        for name, feature in features.items() if self.vocabulary else ():
            found = feature.vocabulary
            wanted = vocabularies.load(str(self.vocabulary), extra_ids=found.extra_ids).spec
            if not found.same_as(wanted):
                raise UserError(
                    f"Feature {name!r} of {self.mixture_or_task_name!r} has another vocabulary: "
                    f"{cache_format.describe(found)}, not {cache_format.describe(wanted)} "
                    f"({self.vocabulary}). Cache the task again or use its own vocabulary."
                )

    def fingerprint(self, tasks: Mapping[str, Any]) -> dict[str, Any]:
        """What the contents of all batches follow from, as JSON; `tasks` says what was read."""
        given = dataclasses.asdict(self)
        for name in ("cache_dir", "module", "use_cached", "vocabulary"):
            del given[name]
        given["feature_converter"] = repr(self.feature_converter)
        return json.loads(json.dumps(given | {"tasks": tasks}, default=dict))

    def cached_task(self) -> TaskManifest:
        """The manifest of the Task; its cache is made first if need be and allowed.

        Raises:
          UserError: there is no cache and none may be made, or making it failed.
        """
        wanted = (self.cache_dir, self.mixture_or_task_name, self.module)
        task, reason = task_modules.find_cached(*wanted)
        if task is None and self.use_cached is True:
            known = cache_format.task_file(self.cache_dir, "").parent.glob("*.json")
            near = did_you_mean(self.mixture_or_task_name, (path.stem for path in known))
            command = " ".join(task_modules.cache_command(*wanted)[2:])
            raise UserError(
                f"use_cached is True, but {reason}.{near} Run `{command}` or set use_cached = "
                "'auto'."
            )
        if task is None:
            log.info("%s; running `t5x_like cache`.", reason)
            _run(task_modules.cache_command(*wanted))
            task, reason = task_modules.find_cached(*wanted)
        if task is None:
            raise UserError(f"`t5x_like cache` ended well, but {reason}. Give another CACHE_DIR.")
        return task

    def _build_grain(
        self, rows: list[int], task: TaskManifest, members: Sequence[tuple[TaskManifest, float]]
    ) -> BatchIterator:
        # With a last epoch, one shard fills all rows.
        num_shards = 1 if self.num_epochs else self.batch_size
        windows = [self._windows(member, num_shards) for member, _ in members]
        rates = [rate for _, rate in members]

        def stream(shard: int) -> Stream:
            streams = [
                WindowStream(
                    w,
                    shard=shard,
                    num_shards=num_shards,
                    stop=self.num_epochs * len(w) if self.num_epochs else None,
                )
                for w in windows
            ]
            if task.kind == "task":
                return streams[0]
            return MixtureStream(streams, rates, key=stream_key(self.seed, task.name), shard=shard)

        if self.num_epochs:
            shards = [Shard("all", stream(0), range(self.batch_size))]
        else:
            shards = [Shard(str(row), stream(row), [row]) for row in rows]
        return self.iterator(
            shards,
            rows=rows,
            features=task.output_features,
            tasks={m.name: [m.corpus, _digest(m.pipeline), rate] for m, rate in members},
        )

    def iterator(
        self,
        shards: Sequence[Shard],
        *,
        rows: Sequence[int],
        features: Mapping[str, OutputFeature],
        tasks: Mapping[str, Any],
    ) -> BatchIterator:
        """The iterator over `shards`; both routes end here. See `fingerprint` for `tasks`.

        Raises:
          UserError: see `check_vocabulary`.
        """
        self.check_vocabulary(features)
        return ShardedBatchIterator(
            shards,
            rows=rows,
            converter=self.feature_converter,
            lengths=self.task_feature_lengths,
            pack=self.pack,
            element_spec=self.element_spec,
            vocabularies={name: f.vocabulary for name, f in features.items()},
            made_for=self.fingerprint(tasks),
        )

    def _windows(self, task: TaskManifest, num_shards: int) -> TaskWindows:
        corpus = cache_format.read_corpus(self.cache_dir, task.corpus)
        return TaskWindows(
            task.name,
            SplitReader(self.cache_dir, corpus, self.split),
            [from_dict(step) for step in task.pipeline or ()],
            context=Context(lengths=self.task_feature_lengths, features=task.output_features),
            converter=self.feature_converter,
            seed=self.seed,
            shuffle=self.shuffle,
            num_shards=num_shards,
        )

    def _build_seqio(self, rows: list[int], reason: str) -> BatchIterator:
        _log_route(f"{self.mixture_or_task_name!r} is streamed through SeqIO ({reason}).")
        with quiet.native_stderr_closed():
            from t5x_like.data import seqio_stream

        return seqio_stream.build(self, rows)


@functools.cache
def _log_route(text: str) -> None:
    """Once a process: an evaluation opens its data again and again."""
    log.info(text)


def members_of(cache_dir: str, task: TaskManifest) -> list[tuple[TaskManifest, float]]:
    """The Tasks of a Mixture with their rates; a Task alone has the rate 1."""
    if task.kind == "task":
        return [(task, 1.0)]
    members = [(cache_format.read_task(cache_dir, name), rate) for name, rate in task.tasks]
    return [(member, rate) for member, rate in members if member is not None]


def _digest(pipeline: Any) -> str:
    return hashlib.sha256(json.dumps(pipeline, sort_keys=True).encode()).hexdigest()[:16]


def _run(command: Sequence[str]) -> None:
    """Runs `command`, which sees the modules that this process sees; shows what it says."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    last = ""
    for line in process.stderr:
        sys.stderr.write(last)
        last = line
    if process.wait() == 2:  # its last line is for the user
        raise UserError(last.strip().removeprefix("t5x_like: error: "))
    sys.stderr.write(last)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with code {process.returncode}.")
