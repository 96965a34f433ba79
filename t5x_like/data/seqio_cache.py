"""SeqIO's side of the cache: what a Task's corpus is, and the examples of its shards."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import inspect
import os
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from t5x_like.data import (
    cache_format,
    cache_writer,
    denoisers,
    seqio_host,
    sources,
    task_modules,
)
from t5x_like.data.cache_format import CachedFeature, ShardStats, TaskManifest
from t5x_like.data.seqio_host import seqio, tf
from t5x_like.data.seqio_preprocessors import output_features
from t5x_like.data.seqio_sources import DocumentSource
from t5x_like.data.seqio_vocabularies import spec_of
from t5x_like.data.templates import RECORD
from t5x_like.errors import UserError, did_you_mean

seqio_host.hide_accelerators()
MAX_SHARDS = 1024
_PRECACHE_SEED = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardJob:
    """One shard to write: all that a worker process must know of it."""

    task: str
    module: str | None
    settings: Mapping[str, Any]
    tfds_data_dir: str | None
    corpus: str
    split: str
    index: int
    num_shards: int

    @property
    def name(self) -> str:
        return cache_format.shard_name(self.index, self.num_shards)


def load_provider(
    name: str,
    module: str | None,
    *,
    settings: Mapping[str, Any] | None = None,
    tfds_data_dir: str | None = None,
) -> seqio.Task | seqio.Mixture:
    """Imports `module` and returns the Task or Mixture `name`.

    Raises:
      UserError: no such module or name.
    """
    if settings and settings != sources.settings():
        sources.bind(dict(settings))
    if tfds_data_dir:
        seqio.set_tfds_data_dir_override(tfds_data_dir)
    if module:
        _import(module)
    names = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    if name not in names:
        raise UserError(
            f"There is no Task or Mixture {name!r}"
            + (f" in {module}." if module else "; give the module that registers it (--module).")
            + did_you_mean(name, names)
        )
    return seqio.get_mixture_or_task(name)


def _import(module: str) -> None:
    if os.getcwd() not in sys.path:  # where users keep their modules, as in T5X
        sys.path.append(os.getcwd())
    task_modules.module_sha256(module)  # says so if there is none
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise
        raise UserError(
            f"There is no module {module!r} (no {error.name!r}): check MIXTURE_OR_TASK_MODULE "
            "(--module) and Python's path."
        ) from None


# What a Task is


def task_manifest(task: seqio.Task, *, module: str | None, corpus: str) -> TaskManifest:
    """Describes `task`, whose tokens are the corpus with the fingerprint `corpus`."""
    pipeline, reason = pipeline_of(task)
    return TaskManifest(
        name=task.name,
        kind="task",
        corpus=corpus if pipeline is not None else "",
        output_features=output_features(task.output_features),
        pipeline=pipeline,
        not_serializable=reason,
        **_definition(module),
    )


def mixture_manifest(mixture: seqio.Mixture, *, module: str | None) -> TaskManifest:
    """Describes `mixture`: its Tasks, those of sub-mixtures included, and their rates."""
    return TaskManifest(
        name=mixture.name,
        kind="mixture",
        output_features=output_features(mixture.output_features),
        tasks=tuple((task.name, float(mixture.get_rate(task))) for task in mixture.tasks),
        **_definition(module),
    )


def _definition(module: str | None) -> dict[str, Any]:
    return {
        "module": module or "",
        "module_sha256": task_modules.module_sha256(module) if module else "",
        "settings": sources.settings() if module == task_modules.USER_MODULE else {},
        "versions": cache_writer.versions(),
    }


def pipeline_of(task: seqio.Task) -> tuple[tuple[dict[str, Any], ...] | None, str]:
    """The steps after the cache point as `{"op", "args"}`, or None and why they are not such."""
    if not task.supports_caching:
        return None, "it has no CacheDatasetPlaceholder among its preprocessors"
    if task.requires_caching:
        return None, "its CacheDatasetPlaceholder asks for SeqIO's own cache"
    for name, feature in task.output_features.items():
        if feature.rank != 1 or not tf.as_dtype(feature.dtype).is_integer:
            return None, f"its feature {name!r} is not a sequence of tokens"
    steps = []
    for step in task.preprocessors[_cache_index(task) + 1 :]:
        step = getattr(step, "__self__", step)  # of a bound method, such as `step.__call__`
        if hasattr(step, "resolve"):
            step = step.resolve(task.output_features)
        if step is seqio.preprocessors.append_eos_after_trim:
            step = denoisers.AppendEos()
        if not isinstance(step, denoisers.Preprocessor):
            return None, f"its step {_name_of(step)} after the cache point is not one of ours"
        steps.append(step.to_dict())
    return tuple(steps), ""


def _cache_index(task: seqio.Task) -> int:
    placeholders = [isinstance(s, seqio.CacheDatasetPlaceholder) for s in task.preprocessors]
    return placeholders.index(True)


# What a corpus is


def corpus_identity(task: seqio.Task, splits: Sequence[str]) -> dict[str, Any]:
    """JSON-able description of all that decides what the Task gives at its cache point."""
    cached = _precache_spec(task, splits[0])
    return {
        "format_version": cache_format.FORMAT_VERSION,
        "source": {split: _source_identity(task.source, split) for split in splits},
        "preprocessors": [_describe(s) for s in task.preprocessors[: _cache_index(task)]],
        "vocabularies": {
            name: _vocabulary_identity(feature.vocabulary)
            for name, feature in task.output_features.items()
            if name in cached
        },
    }


def _vocabulary_identity(vocabulary: seqio.Vocabulary) -> dict[str, Any]:
    return dataclasses.asdict(dataclasses.replace(spec_of(vocabulary), path=""))


def _source_identity(source: seqio.DataSource, split: str) -> Any:
    if isinstance(source, DocumentSource):
        return source.identity(split)
    identity: dict[str, Any] = {"class": type(source).__qualname__}
    if isinstance(source, seqio.TfdsDataSource):
        identity["tfds"] = source.tfds_dataset.resolved_tfds_name(split)
        identity["examples"] = source.num_input_examples(split)
    shards = source.list_shards(split)
    if isinstance(source, seqio.FileDataSource):
        return {**identity, "files": [sources.file_identity(shard) for shard in shards]}
    function = getattr(source, "_dataset_fn", None)  # of a FunctionDataSource
    names = [os.path.basename(shard) for shard in shards]
    return {**identity, "shards": names, "function": _describe(function)}


def _describe(value: Any, *, within: tuple[Any, ...] = ()) -> Any:
    """JSON-able form of a preprocessor: its name, its source, its arguments and all that it
    captured. `within` holds the callables that `value` is a part of."""
    describe = functools.partial(_describe, within=within)
    if isinstance(value, functools.partial):
        arguments = {str(i): argument for i, argument in enumerate(value.args)} | value.keywords
        return {"function": describe(value.func), "arguments": describe(arguments)}
    if isinstance(value, denoisers.Preprocessor):
        return value.to_dict()
    if isinstance(value, seqio.Vocabulary):
        return _vocabulary_identity(value)
    if isinstance(value, seqio.Feature):
        return {"add_eos": value.add_eos, "vocabulary": describe(value.vocabulary)}
    if isinstance(value, Mapping):
        return {str(k): describe(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        described = [describe(v) for v in value]
        # The order of a set, and the address in a function's repr, differ from run to run.
        return sorted(described, key=repr) if isinstance(value, set | frozenset) else described
    if callable(value):
        identity = {"name": _name_of(value), "sha256": _source_sha256(value)}
        if any(value is outer for outer in within) or not (state := _captured(value)):
            return identity
        return identity | {"captured": _describe(state, within=(*within, value))}
    if type(value).__repr__ is object.__repr__ and hasattr(value, "__dict__"):
        if any(value is outer for outer in within):
            return _name_of(value)
        return {"class": _name_of(value), **_describe(vars(value), within=(*within, value))}
    # An address in memory differs from run to run.
    return value if isinstance(value, str | int | float | None) else _without_address(repr(value))


def _captured(function: Any) -> dict[str, Any]:
    """What a callable remembers besides its source: two closures of one `def` differ in nothing
    else, and two lambdas of one line in their bytecode alone."""
    if inspect.ismethod(function):
        return {"self": function.__self__, "function": function.__func__}
    if isinstance(function, types.FunctionType):
        captured = dict(inspect.getclosurevars(function).nonlocals)
        captured |= {"*": function.__defaults__, "**": function.__kwdefaults__}
        if function.__name__ == "<lambda>":
            code = function.__code__
            constants = [c for c in code.co_consts if not isinstance(c, types.CodeType)]
            captured["code"] = (code.co_code.hex(), code.co_names, constants)
        return {name: value for name, value in captured.items() if value is not None}
    return {} if isinstance(function, type) else dict(getattr(function, "__dict__", {}))


def _name_of(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', type(function).__module__)}.{name}"


def _source_sha256(function: Any) -> str:
    target = inspect.unwrap(function) if inspect.isroutine(function) else type(function)
    try:
        return hashlib.sha256(inspect.getsource(target).encode()).hexdigest()
    except (OSError, TypeError):  # built in, or typed into a shell
        return ""


def _without_address(text: str) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def cached_features(task: seqio.Task, split: str) -> dict[str, CachedFeature]:
    """How each feature that the Task gives at its cache point is stored.

    Raises:
      UserError: one of them is ragged or sparse.
    """
    features = {}
    for name, spec in _precache_spec(task, split).items():
        if name == cache_writer.REPLACED_BYTES:
            continue
        if not isinstance(spec, tf.TensorSpec) or spec.shape.rank is None:
            raise UserError(
                f"The feature {name!r} of {task.name!r} has no fixed rank at the cache point "
                f"({spec}), so it cannot be cached. Remove it there."
            )
        features[name] = CachedFeature(dtype=_stored_dtype(task, name, spec), rank=spec.shape.rank)
    return features


def _stored_dtype(task: seqio.Task, name: str, spec: tf.TensorSpec) -> str:
    if spec.dtype == tf.string:
        return "bytes"
    if name in task.output_features and spec.dtype.is_integer:
        size = task.output_features[name].vocabulary.vocab_size
        return "uint16" if size <= 1 << 16 else "uint32"
    return spec.dtype.name


def token_features(task: seqio.Task, features: Mapping[str, CachedFeature]) -> list[str]:
    """The cached features that are token sequences of the Task, or the bytes of its records."""
    return [
        name
        for name, feature in features.items()
        if (name in task.output_features or name == RECORD)
        and feature.dtype.startswith("uint")
        and feature.rank == 1
    ]


def num_shards(task: seqio.Task, split: str) -> int:
    """Number of shards of a split: it depends on the source alone, never on the workers."""
    return max(1, min(len(task.source.list_shards(split)), MAX_SHARDS))


@functools.lru_cache(maxsize=16)
def _precache_spec(task: seqio.Task, split: str) -> dict[str, Any]:
    return _precache_dataset(task, split, 0, num_shards(task, split)).element_spec


def _precache_dataset(task: seqio.Task, split: str, index: int, of: int) -> tf.data.Dataset:
    shard = seqio.ShardInfo(index=index, num_shards=of)
    dataset = task.source.get_dataset(split=split, shuffle=False, seed=0, shard_info=shard)
    return task.preprocess_precache(dataset, seed=_PRECACHE_SEED)


# A shard


def write_shard(job: ShardJob, count: Callable[[int], None] = lambda documents: None) -> ShardStats:
    """Writes one shard, wherever it runs: here, in a worker process, or in a Beam worker."""
    task = load_provider(
        job.task, job.module, settings=job.settings, tfds_data_dir=job.tfds_data_dir
    )
    features = cached_features(task, job.split)
    return cache_writer.write_shard(
        _examples(task, job),
        corpus=job.corpus,
        split=job.split,
        name=job.name,
        features=features,
        token_features=token_features(task, features),
        count=count,
    )


def _examples(task: seqio.Task, job: ShardJob) -> Iterator[dict[str, np.ndarray]]:
    dataset = _precache_dataset(task, job.split, job.index, job.num_shards)
    try:
        yield from dataset.as_numpy_iterator()
    except tf.errors.OpError as error:
        # TensorFlow turns errors of Python code into text.
        found = re.search(r"UserError: (.*)", str(error))
        if found is None:
            raise
        raise UserError(found[1]) from None
