"""The tensors of a Hugging Face directory: safetensors files, sharded or single.

Reading goes through the safetensors library, a tensor at a time and without a memory map, so that
what was read does not stay in memory. That library can only write a file that is in memory as a
whole: writing is done here (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from t5x_like.errors import UserError
from t5x_like.interop.arrays import all_finite, row_blocks

# Of the format's types those that weights have; the library finds bfloat16 by ml_dtypes' import.
DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5 * 10**9


class Spec(NamedTuple):
    """Shape and type of a tensor; `dtype` is the format's name, such as BF16."""

    shape: tuple[int, ...]
    dtype: str


class TensorFiles:
    """The tensors in a directory, opened but not read.

    Attributes:
      specs: `Spec` by name.
    """

    def __init__(self, directory: Path) -> None:
        """Opens `model.safetensors` or the files of `model.safetensors.index.json`.

        Raises:
          UserError: no such file, only pickled weights, a damaged or missing file.
        """
        self._files: dict[str, Any] = {}
        self.specs: dict[str, Spec] = {}
        self.directory = directory
        index = read_json(directory / INDEX) if (directory / INDEX).is_file() else None
        for file in _find_files(directory, index):
            try:
                opened = safetensors.safe_open(file, framework="np", backend="pread")
            except (safetensors.SafetensorError, OSError) as error:
                raise UserError(
                    f"'{file}' is damaged or cut short ({' '.join(str(error).split())}); "
                    "copy or download it again."
                ) from error
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                found = opened.get_slice(name)
                self.specs[name] = Spec(tuple(found.get_shape()), found.get_dtype())
                self._files[name] = opened
        missing = sorted(set((index or {}).get("weight_map", {})) - self.specs.keys())
        if missing:
            raise UserError(f"'{directory / INDEX}' lists what no file has: {', '.join(missing)}.")

    def read(self, name: str) -> np.ndarray:
        """The tensor `name`, of a type in `DTYPES`; UserError if it holds NaN or infinity."""
        value = np.asarray(self._files[name].get_tensor(name))
        if not all_finite(value):
            raise UserError(f"Tensor '{name}' of '{self.directory}' holds NaN or infinite values.")
        return value

    def equals(self, name: str, value: np.ndarray) -> bool:
        """Whether tensor `name` is `value`, bit by bit."""
        spec = self.specs[name]
        if (spec.shape, DTYPES.get(spec.dtype)) != (value.shape, value.dtype):
            return False
        part = self._files[name].get_slice(name)
        return all(
            np.asarray(part[rows]).tobytes() == np.ascontiguousarray(value[rows]).tobytes()
            for rows in row_blocks(value.shape, value.itemsize)
        )


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; UserError if it is not there or is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"'{file}' is not there.") from None
    except ValueError as error:
        raise UserError(f"'{file}' is no JSON ({error}); copy or download it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"'{file}' holds no JSON object.")
    return content


def _find_files(directory: Path, index: Mapping[str, Any] | None) -> list[Path]:
    if index is not None:
        if not isinstance(index.get("weight_map"), dict):
            raise UserError(f"'{directory / INDEX}' has no 'weight_map'.")
        names = sorted(set(index["weight_map"].values()))
        absent = [name for name in names if not (directory / name).is_file()]
        if absent:
            raise UserError(f"'{directory}' lacks files that its index names: {', '.join(absent)}.")
        return [directory / name for name in names]
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    pickled = sorted(p.name for p in directory.glob("*.bin")) or sorted(
        p.name for p in directory.glob("*.pt*")
    )
    if pickled:
        raise UserError(
            f"'{directory}' holds pickled weights only ({pickled[0]}), which can run code when "
            "they are loaded and are never read here; where you trust them, write safetensors with "
            "transformers: AutoModel.from_pretrained(DIR).save_pretrained(NEW_DIR)."
        )
    raise UserError(f"'{directory}' has no {SINGLE} and no {INDEX}.")


# ---- Writing.


class TensorWriter:
    """Writes the tensors of `specs`, each when it is there, into as many files as they need.

    A tensor has its place in a file before it is written. In a file wide types come first, so
    that every tensor is aligned, as torch wants it.
    """

    def __init__(
        self, directory: Path, specs: Mapping[str, Spec], *, shard_bytes: int = SHARD_BYTES
    ) -> None:
        """Makes files with headers; a file is begun where one would be above `shard_bytes`."""
        self._places: dict[str, tuple[Path, int]] = {}
        self._specs = specs
        shards = _shards(specs, shard_bytes)
        for number, names in enumerate(shards, start=1):
            part = f"model-{number:05}-of-{len(shards):05}.safetensors"
            file = directory / (part if len(shards) > 1 else SINGLE)
            offsets = _write_header(file, {name: specs[name] for name in names})
            self._places |= {name: (file, offset) for name, offset in offsets.items()}
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(map(_num_bytes, specs.values()))},
                "weight_map": {name: self._places[name][0].name for name in sorted(specs)},
            }
            (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def write(self, name: str, value: np.ndarray) -> None:
        """Writes a tensor, cast to its type, by blocks of rows."""
        spec, (path, offset) = self._specs[name], self._places.pop(name)
        assert value.shape == spec.shape, (name, value.shape, spec)
        rows = np.atleast_1d(value)
        with path.open("r+b") as file:
            file.seek(offset)
            for block in row_blocks(rows.shape, DTYPES[spec.dtype].itemsize):
                content = np.ascontiguousarray(rows[block], DTYPES[spec.dtype])
                file.write(content.view(np.uint8).data)

    def close(self) -> None:
        """Checks that every tensor has been written."""
        assert not self._places, f"not written: {', '.join(self._places)}"


def dtype_name(dtype: Any) -> str:
    """The format's name of a numpy dtype that weights have."""
    return _NAMES[np.dtype(dtype)]


def _num_bytes(spec: Spec) -> int:
    return math.prod(spec.shape) * DTYPES[spec.dtype].itemsize


def _shards(specs: Mapping[str, Spec], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + _num_bytes(spec) > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _num_bytes(spec)
    return shards


def _write_header(file: Path, specs: Mapping[str, Spec]) -> dict[str, int]:
    """Makes a file that has everything but the numbers; name -> where its bytes go."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(specs, key=lambda n: (-DTYPES[specs[n].dtype].itemsize, n)):
        begin, end = end, end + _num_bytes(specs[name])
        shape, dtype = list(specs[name].shape), specs[name].dtype
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = 8 + len(text)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        out.truncate(data + end)
    return {name: data + header[name]["data_offsets"][0] for name in specs}
