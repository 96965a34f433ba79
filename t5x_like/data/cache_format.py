"""On-disk format of a token cache: what `t5x_like cache` writes and training reads.

    CACHE_DIR/corpora/<fingerprint>/manifest.json                   CorpusManifest
    CACHE_DIR/corpora/<fingerprint>/COMPLETED                       empty, written last
    CACHE_DIR/corpora/<fingerprint>/<split>/<shard>.arrayrecord     one record a document
    CACHE_DIR/corpora/<fingerprint>/<split>/<shard>.npz             ShardStats of that shard
    CACHE_DIR/tasks/<task or mixture name>.json                     TaskManifest

A corpus is what a Task gives at its cache point; its name is a digest of all that decides its
contents (source, preprocessors before the cache point, vocabularies). Tasks that share that part,
such as the denoisers of UL2, share one corpus. This module needs neither TensorFlow nor SeqIO.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from typing import Any, TypeAlias

import msgpack
import numpy as np
from etils import epath

from t5x_like.errors import UserError

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
COMPLETED = "COMPLETED"
# Grain reads records by index, so every record must be its own chunk.
WRITER_OPTIONS = "group_size:1"
PathLike: TypeAlias = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VocabularySpec:
    """What identifies a vocabulary, and what a denoiser needs of it.

    Sentinel i (`<extra_id_i>`) is the id `size - 1 - i`, for i < `extra_ids`.

    Attributes:
      kind: "sentencepiece", "bytes", "huggingface", or the class name of any other vocabulary.
      size: number of ids, the extra ids included.
      sha256: hex digest of the vocabulary's contents.
      path: file that it was read from, or "".
      zero_is_token: id 0 stands for text (GPT-2's "!"), so that only its place tells padding.
      unk_id: id of the unknown token; None where nothing is unknown.
    """

    kind: str
    size: int
    sha256: str
    eos_id: int
    unk_id: int | None
    pad_id: int = 0
    extra_ids: int = 0
    path: str = ""
    zero_is_token: bool = False

    def same_as(self, other: VocabularySpec) -> bool:
        """True if both give the same ids to the same text, wherever the file lies."""
        return dataclasses.replace(self, path="") == dataclasses.replace(other, path="")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachedFeature:
    """How a record stores a feature: numpy dtype name, or "bytes"; and its rank."""

    dtype: str
    rank: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputFeature:
    """A feature that the Task gives to the model (a `seqio.Feature`)."""

    vocabulary: VocabularySpec
    add_eos: bool = True
    required: bool = True
    dtype: str = "int32"
    rank: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """One record file: its stem, and what `verify` checks it against."""

    name: str
    records: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitManifest:
    """Contents of a split.

    Attributes:
      tokens: number of tokens, by feature of integers and rank 1.
      unigram_entropy: entropy of the unigram distribution of those tokens, in nats.
      replaced_bytes: invalid UTF-8 bytes of the source, each run replaced by U+FFFD.
      dropped_documents: documents without a token (empty, or only whitespace), not stored.
    """

    shards: tuple[Shard, ...]
    tokens: Mapping[str, int]
    unigram_entropy: Mapping[str, float]
    replaced_bytes: int = 0
    dropped_documents: int = 0

    @property
    def records(self) -> int:
        return sum(shard.records for shard in self.shards)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusManifest:
    """Contents of a corpus. `identity` is the object whose digest is `fingerprint`."""

    fingerprint: str
    features: Mapping[str, CachedFeature]
    splits: Mapping[str, SplitManifest]
    identity: Mapping[str, Any]
    versions: Mapping[str, str]
    format_version: int = FORMAT_VERSION


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskManifest:
    """How a Task, or a Mixture of Tasks, is read from the cache.

    Attributes:
      kind: "task" or "mixture".
      corpus: fingerprint of the Task's corpus; "" for a mixture.
      output_features: what the model gets.
      pipeline: the steps after the cache point, `{"op": name, "args": {...}}` each; None if they
        cannot be run without SeqIO, for the reason given in `not_serializable`.
      tasks: a mixture's Tasks (sub-mixtures resolved) and rates.
      module: Python module that registered the Task; "" if it was none.
      module_sha256: digest of that module's source (see `data.task_modules`).
      settings: gin-bound settings that the definition depended on.
    """

    name: str
    kind: str
    corpus: str = ""
    output_features: Mapping[str, OutputFeature]
    pipeline: tuple[Mapping[str, Any], ...] | None = None
    not_serializable: str = ""
    tasks: tuple[tuple[str, float], ...] = ()
    module: str = ""
    module_sha256: str = ""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    format_version: int = FORMAT_VERSION


# Paths


def corpus_dir(cache_dir: PathLike, fingerprint: str) -> epath.Path:
    return epath.Path(cache_dir) / "corpora" / fingerprint


def record_file(corpus: PathLike, split: str, shard: str) -> epath.Path:
    return epath.Path(corpus) / split / f"{shard}.arrayrecord"


def stats_file(corpus: PathLike, split: str, shard: str) -> epath.Path:
    return epath.Path(corpus) / split / f"{shard}.npz"


def task_file(cache_dir: PathLike, name: str) -> epath.Path:
    return epath.Path(cache_dir) / "tasks" / f"{name}.json"


def shard_name(index: int, num_shards: int) -> str:
    return f"{index:05d}-of-{num_shards:05d}"


def fingerprint(identity: Mapping[str, Any]) -> str:
    """Returns 16 hex digits that name the corpus described by a JSON-able `identity`."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# Records


def encode_record(example: Mapping[str, Any], features: Mapping[str, CachedFeature]) -> bytes:
    """Packs an example: a msgpack array of [shape, data] in the order of sorted feature names.

    `data` is the raw little-endian array or, for "bytes", a list of byte strings.
    """
    fields = []
    for name in sorted(features):
        feature = features[name]
        if feature.dtype == "bytes":
            array = np.asarray(example[name], dtype=object)
            data: Any = [bytes(value) for value in array.ravel()]
        else:
            array = _cast(np.asarray(example[name]), feature.dtype, name)
            data = array.tobytes()
        fields.append([list(array.shape), data])
    return msgpack.packb(fields)


def decode_record(record: bytes, features: Mapping[str, CachedFeature]) -> dict[str, np.ndarray]:
    """Inverse of `encode_record`. Unsigned integers come back as int32, "bytes" as objects."""
    example = {}
    for name, (shape, data) in zip(sorted(features), msgpack.unpackb(record), strict=True):
        dtype = features[name].dtype
        if dtype == "bytes":
            array = np.empty(len(data), dtype=object)
            array[:] = data
        else:
            array = np.frombuffer(data, dtype=np.dtype(dtype).newbyteorder("<"))
            array = array.astype(np.int32 if dtype.startswith("uint") else dtype)
        example[name] = array.reshape(shape)
    return example


def _cast(array: np.ndarray, dtype: str, name: str) -> np.ndarray:
    stored = array.astype(np.dtype(dtype).newbyteorder("<"))
    if not np.array_equal(stored, array, equal_nan=array.dtype.kind == "f"):
        raise UserError(
            f"Feature {name!r} holds {array.dtype} values outside of {dtype}, the dtype of its "
            "cache. Its ids must be within its vocabulary."
        )
    return stored


# Statistics of a shard, kept beside it so that an interrupted job can take up where it was


@dataclasses.dataclass(kw_only=True)
class ShardStats:
    """Counts gathered while a shard is written.

    Attributes:
      records: number of records, in the order of `lengths`.
      lengths: u32[records] tokens of each record, by feature of integers and rank 1.
      counts: u64[ids] how often each id occurred, by the same features.
    """

    records: int
    lengths: dict[str, np.ndarray]
    counts: dict[str, np.ndarray]
    replaced_bytes: int
    dropped_documents: int
    bytes: int
    sha256: str


def save_stats(path: PathLike, stats: ShardStats) -> None:
    """Writes `stats` in numpy's npz format (the same stats always give the same bytes)."""
    arrays: dict[str, Any] = {
        "records": np.int64(stats.records),
        "replaced_bytes": np.int64(stats.replaced_bytes),
        "dropped_documents": np.int64(stats.dropped_documents),
        "bytes": np.int64(stats.bytes),
        "sha256": np.array(stats.sha256),
    }
    arrays |= {f"lengths/{name}": value for name, value in stats.lengths.items()}
    arrays |= {f"counts/{name}": value for name, value in stats.counts.items()}
    with epath.Path(path).open("wb") as file:
        np.savez_compressed(file, **arrays)


def load_stats(path: PathLike) -> ShardStats:
    """Reads what `save_stats` wrote."""
    with epath.Path(path).open("rb") as file, np.load(file) as data:
        arrays = dict(data)

    def group(prefix: str) -> dict[str, np.ndarray]:
        return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}

    return ShardStats(
        records=int(arrays["records"]),
        lengths=group("lengths/"),
        counts=group("counts/"),
        replaced_bytes=int(arrays["replaced_bytes"]),
        dropped_documents=int(arrays["dropped_documents"]),
        bytes=int(arrays["bytes"]),
        sha256=str(arrays["sha256"]),
    )


def unigram_entropy(counts: np.ndarray) -> float:
    """Entropy in nats of the distribution given by the counts u64[ids]."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum()) + 0.0


# Manifests


def to_json(manifest: CorpusManifest | TaskManifest) -> str:
    return json.dumps(dataclasses.asdict(manifest), indent=1, sort_keys=True) + "\n"


def is_complete(corpus: PathLike) -> bool:
    return (epath.Path(corpus) / COMPLETED).exists()


def read_corpus(cache_dir: PathLike, fingerprint: str) -> CorpusManifest:
    """Reads the manifest of a complete corpus.

    Raises:
      UserError: the corpus is missing, incomplete, or of another version of this format.
    """
    directory = corpus_dir(cache_dir, fingerprint)
    if not is_complete(directory):
        raise UserError(f"The cache {directory} is not complete. Run `t5x_like cache` again.")
    raw = _read_json(directory / "manifest.json")
    if raw["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"The cache {directory} has format version {raw['format_version']}; this program "
            f"reads {FORMAT_VERSION}. Delete it and run `t5x_like cache` again."
        )
    features = {name: CachedFeature(**feature) for name, feature in raw.pop("features").items()}
    splits = {}
    for name, split in raw.pop("splits").items():
        shards = tuple(Shard(**shard) for shard in split.pop("shards"))
        splits[name] = SplitManifest(shards=shards, **split)
    return CorpusManifest(features=features, splits=splits, **raw)


def read_task(cache_dir: PathLike, name: str) -> TaskManifest | None:
    """Reads the manifest of a Task or Mixture; None if it was never cached in `cache_dir`.

    One of another version of this format counts as none, with a warning: it is cached anew.
    """
    path = task_file(cache_dir, name)
    if not path.exists():
        return None
    raw = _read_json(path)
    if (version := raw.get("format_version", 1)) != FORMAT_VERSION:
        logger.warning(
            "The cache of %r has format version %s, not %s: it is made anew.",
            *(name, version, FORMAT_VERSION),
        )
        return None
    features = {
        key: OutputFeature(vocabulary=VocabularySpec(**feature.pop("vocabulary")), **feature)
        for key, feature in raw.pop("output_features").items()
    }
    pipeline = raw.pop("pipeline")
    return TaskManifest(
        output_features=features,
        pipeline=None if pipeline is None else tuple(pipeline),
        tasks=tuple((task, rate) for task, rate in raw.pop("tasks")),
        **raw,
    )


def _read_json(path: epath.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error}). Delete it and cache again.") from None


def check_vocabulary(task: TaskManifest, vocabularies: Mapping[str, VocabularySpec]) -> None:
    """Checks that a cache was made with the vocabularies (by feature) that are wanted now.

    Raises:
      UserError: a feature's vocabulary differs from the one in the cache.
    """
    for name, wanted in vocabularies.items():
        cached = task.output_features[name].vocabulary
        if not cached.same_as(wanted):
            raise UserError(
                f"The cache of {task.name!r} was made with another vocabulary for {name!r}: "
                f"{describe(cached)}, not {describe(wanted)}. Use another CACHE_DIR or run "
                "`t5x_like cache --overwrite`."
            )


def describe(vocabulary: VocabularySpec) -> str:
    return f"{vocabulary.kind} of {vocabulary.size} ids (sha256 {vocabulary.sha256[:12]})"
