"""Arrays in TensorStore: where they are in a checkpoint, and reading them a part at a time."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath

from t5x_like.errors import UserError
from t5x_like.interop.matching import Source

# What is read or written in one go, so that compressed and decoded copies stay small.
BLOCK_BYTES = 32 << 20


def kvstore(path: epath.Path) -> dict[str, Any]:
    """TensorStore's key-value store for a local directory or a `gs://bucket/...` one."""
    if str(path).startswith("gs://"):
        bucket, _, key = str(path).removeprefix("gs://").partition("/")
        return {"driver": "gcs", "bucket": bucket, "path": key.rstrip("/") + "/"}
    return {"driver": "file", "path": str(path.resolve()) + "/"}


def orbax_kvstore(state: epath.Path, path: str = "") -> dict[str, Any]:
    """The same for `path` in a directory that Orbax wrote, an OCDBT store or plain files."""
    if (state / "manifest.ocdbt").exists():
        return {"driver": "ocdbt", "base": kvstore(state), "path": path}
    store = kvstore(state)
    return {**store, "path": store["path"] + path}


def zarr_dtype(dtype: np.dtype) -> str:
    """What TensorStore's zarr driver calls a numpy dtype."""
    return dtype.name if dtype.name == "bfloat16" else dtype.str


def open_orbax_tree(state: epath.Path, *, cache_bytes: int = 0) -> dict[str, Source]:
    """All arrays of a tree that Orbax wrote, by their path joined with "/"; nothing is read.

    Args:
      cache_bytes: how much of the decoded chunks is kept in memory, for all arrays together.

    Raises:
      UserError: a store that cannot be read.
    """
    names = {name.decode(): driver for name, driver in list_arrays(state).items()}
    context = ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes}})
    return {
        name.replace(".", "/"): open_array(
            orbax_kvstore(state, name + "/"), name=name, driver=driver, context=context
        )
        for name, driver in names.items()
    }


def list_arrays(state: epath.Path) -> dict[bytes, str]:
    """Returns {array name: TensorStore driver} of an Orbax tree of arrays."""
    drivers = {b".zarray": "zarr", b"zarr.json": "zarr3"}
    try:
        keys = ts.KvStore.open(orbax_kvstore(state)).result().list().result()
    except ValueError as error:
        raise _damaged(str(state), error) from error
    split = (key.rpartition(b"/") for key in keys)
    return {name: drivers[file] for name, _, file in split if name and file in drivers}


def open_array(
    kvstore: dict[str, Any],
    *,
    name: str,
    driver: str = "zarr",
    context: ts.Context | None = None,
) -> Source:
    """An array of a TensorStore driver; `name` is what errors call it."""
    # A chunk file that is missing would otherwise be read as zeros.
    spec = {"driver": driver, "kvstore": kvstore, "fill_missing_data_reads": False}
    spec |= {"recheck_cached_data": "open"}

    def guarded(action: Callable[[], Any]) -> Any:
        try:
            return action()
        except ValueError as error:
            raise _damaged(name, error) from error

    array = guarded(lambda: ts.open(spec, open=True, read=True, context=context).result())
    return Source(
        shape=tuple(array.shape),
        dtype=array.dtype.numpy_dtype,
        chunk=tuple(array.chunk_layout.read_chunk.shape or array.shape),
        read=lambda: guarded(lambda: _read_blocks(array)),
        take=lambda i, axis: guarded(lambda: _read_blocks(array[(slice(None),) * axis + (i,)])),
    )


def _read_blocks(array: Any) -> np.ndarray:
    """Reads an array by blocks of rows: TensorStore would load all its chunks at once."""
    dtype = array.dtype.numpy_dtype
    if array.size * dtype.itemsize <= BLOCK_BYTES:
        return np.asarray(array.read().result())
    out = np.empty(array.shape, dtype)
    chunk = (array.chunk_layout.read_chunk.shape or array.shape)[0]
    for rows in row_blocks(array.shape, dtype.itemsize, multiple_of=chunk):
        out[rows] = array[rows].read().result()
    return out


def row_blocks(shape: tuple[int, ...], itemsize: int, *, multiple_of: int = 1) -> list[slice]:
    """Slices of the first axis of at most about `BLOCK_BYTES` each, `multiple_of` rows or more."""
    row = max(1, math.prod(shape[1:]) * itemsize)
    step = max(1, BLOCK_BYTES // row // multiple_of) * multiple_of
    return [slice(i, min(i + step, shape[0])) for i in range(0, shape[0], step)]


def all_finite(value: np.ndarray) -> bool:
    """Whether `value` holds neither NaN nor infinity; by blocks, to need little memory."""
    rows = np.atleast_1d(value)
    return all(np.isfinite(rows[r]).all() for r in row_blocks(rows.shape, rows.itemsize))


def write_blocks(array: Any, value: np.ndarray) -> None:
    """Writes `value`, cast to the array's dtype, by blocks of rows; back when all is written."""
    dtype = array.dtype.numpy_dtype
    if not value.ndim:
        array.write(value.astype(dtype)).result()
        return
    chunk = (array.chunk_layout.write_chunk.shape or value.shape)[0]
    for rows in row_blocks(value.shape, dtype.itemsize, multiple_of=chunk):
        array[rows].write(np.ascontiguousarray(value[rows], dtype)).result()


def _damaged(name: str, error: ValueError) -> UserError:
    reason = re.split(r" \[\w+(?: locations)?=", str(error), maxsplit=1)[0]
    return UserError(f"Array '{name}' of the checkpoint cannot be read: {' '.join(reason.split())}")
