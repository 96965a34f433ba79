"""Where instruction data comes from, as SeqIO data sources of records."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import lzma
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from t5x_like.data import sources
from t5x_like.data.seqio_sources import DocumentSource
from t5x_like.data.templates import RECORD, Record, write_record
from t5x_like.errors import UserError

Example = Mapping[str, Any]
"""An example as the source has it: JSON, nested."""
Prepare = Callable[[Example], Record | Iterable[Record] | None]
"""Makes records of an example: one, several, or none to leave it out."""


class _JsonSource(DocumentSource):
    """Examples as {"text": JSON}."""

    def documents(self, split: str) -> Iterator[bytes]:
        """The JSON of the examples of a split, in order, without TensorFlow."""
        return self._documents(self.list_shards(split), split)

    def num_input_examples(self, split: str) -> int:
        return sum(1 for _ in self.documents(split))


class RecordSource(_JsonSource):
    """Whole lines of JSON Lines files, whole rows of Parquet files.

    A .json file that is one object with "Instances" is a task of Super-NaturalInstructions: it
    gives an example for each instance.

    Args:
      files: globs by split.
      validation_fraction: share of "train" that is the validation split, if none is given.
    """

    def __init__(self, files: Mapping[str, Sequence[str]], *, validation_fraction: float = 0.0):
        super().__init__(files, validation_fraction=validation_fraction)

    def _documents(self, files: Sequence[str], split: str) -> Iterator[bytes]:
        for path in files:
            for document in _read(path):
                held_out = self._fraction and sources.held_out(document, self._fraction)
                if not self._fraction or held_out == (split == "validation"):
                    yield document


class CountingSource(_JsonSource):
    """The numbers below `count`, from which `prepare` makes an example each by rule."""

    def __init__(self, count: int, *, validation_fraction: float):
        super().__init__({"train": []}, validation_fraction=validation_fraction)
        self._count = count

    def list_shards(self, split: str) -> list[str]:
        return [__file__]  # one, and its size says that one process will do

    def identity(self, split: str) -> dict[str, object]:
        return {"count": self._count, "validation_fraction": self._fraction}

    def _documents(self, files: Sequence[str], split: str) -> Iterator[bytes]:
        for number in range(self._count if files else 0):
            document = str(number).encode()
            if sources.held_out(document, self._fraction) == (split == "validation"):
                yield document


def _read(path: str) -> Iterator[bytes]:
    """The records of a file, as JSON."""
    if path.endswith(".parquet"):
        yield from _read_parquet(path)
    elif path.endswith(".json") and not _is_lines(path):
        yield from _read_natural_instructions(path)
    else:
        yield from (_checked(line, path, i) for i, line in _lines(path))


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    documents = sources.read_documents(path, format="lines", key="")
    yield from ((i, line) for i, line in enumerate(documents, 1) if line.strip())


def _is_lines(path: str) -> bool:
    """Whether the first line is JSON by itself."""
    first = next(_lines(path), (1, b"{}"))[1]
    try:
        return "Instances" not in json.loads(first)
    except json.JSONDecodeError:
        return False


def _checked(line: bytes, path: str, number: int) -> bytes:
    try:
        if isinstance(json.loads(line), dict | int):
            return line
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}:{number} is not JSON: {error}.") from None
    raise UserError(f"{path}:{number} is not a JSON object. Give one object a line.")


def _read_parquet(path: str) -> Iterator[bytes]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    yield json.dumps(row, default=str).encode()
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is not a Parquet file: {error}.") from None


def _read_natural_instructions(path: str) -> Iterator[bytes]:
    """A task file of https://github.com/allenai/natural-instructions: its instances."""
    try:
        task = json.loads(Path(path).read_bytes())
        instances = task.pop("Instances")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{path} is neither JSON Lines nor a task of Super-NaturalInstructions (a JSON object "
            'with "Definition" and "Instances").'
        ) from None
    shared = {"Definition": task.get("Definition"), "task_name": Path(path).stem}
    shared["Positive Examples"] = task.get("Positive Examples", [])
    for instance in instances:
        yield json.dumps(shared | instance).encode()


# Records


def records_of(prepare: Prepare, example: Example) -> list[Record]:
    """What `prepare` makes of an example, as a list."""
    made = prepare(example)
    if made is None:
        return []
    return [made] if isinstance(made, Mapping) else list(made)


def as_records(dataset: tf.data.Dataset, *, prepare: Prepare, code: str) -> tf.data.Dataset:
    """Preprocessor: examples to {"record": u8[bytes]}, what the cache stores.

    Args:
      dataset: {"text": JSON}, or nested tensors as TFDS gives them.
      code: digest of the module of `prepare`, so that a change of it makes another cache.
    """
    del code
    spec = dataset.element_spec
    is_json = list(spec) == ["text"]

    def run(*leaves: Any) -> np.ndarray:
        if is_json:
            example = json.loads(leaves[0])
        else:
            example = _plain(tf.nest.pack_sequence_as(spec, leaves))
        return np.array([write_record(r) for r in records_of(prepare, example)], object)

    def map_example(example: Any) -> tf.Tensor:
        made = tf.numpy_function(run, tf.nest.flatten(example), tf.string)
        return tf.ensure_shape(made, [None])

    records = dataset.map(map_example).unbatch()
    return records.map(lambda record: {RECORD: tf.io.decode_raw(record, tf.uint8)})


def _plain(value: Any) -> Any:
    """Tensors of TFDS as JSON has them."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.decode() if isinstance(value, bytes) else value


def code_digest(prepare: Prepare) -> str:
    """Digest of the module that `prepare` comes from."""
    function = prepare.func if isinstance(prepare, functools.partial) else prepare
    module = inspect.getmodule(function)
    source = inspect.getsource(module) if module else ""
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def read_examples(source: seqio.DataSource, split: str) -> Iterator[Example]:
    """The examples of a split, as JSON."""
    if isinstance(source, _JsonSource):
        yield from map(json.loads, source.documents(split))
    else:
        yield from map(_plain, source.get_dataset(split, shuffle=False).as_numpy_iterator())


def read_xz(path: Path) -> list[dict[str, Any]]:
    """The objects of a small .jsonl.xz file."""
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
