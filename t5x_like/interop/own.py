"""Our own checkpoints, without a trainer: written and read one layer at a time.

Orbax writes what a checkpoint consists of, with arrays of one number. Each array is then made
anew in its real shape, in chunks of one layer and at most `arrays.BLOCK_BYTES`, and filled part
by part: so neither a stack of layers nor a sharding has to be in memory as a whole.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from flax import traverse_util

from t5x_like.errors import UserError
from t5x_like.interop import arrays
from t5x_like.interop.matching import Source

if TYPE_CHECKING:
    from t5x_like.models.base import ParamInfo


_STACKED = re.compile(r"/(layers|leading|group_\d+)/")


def find_own_checkpoint(path: str | epath.Path) -> epath.Path | None:
    """Returns the `checkpoints/<step>` directory at `path` or the latest one below it."""
    directory = epath.Path(path)
    if directory.name.isdigit() and (directory / "state").is_dir():
        return directory
    for parent in (directory / "checkpoints", directory):
        if parent.is_dir():
            steps = [p for p in parent.iterdir() if p.name.isdigit() and (p / "state").is_dir()]
            if steps:
                return max(steps, key=lambda p: int(p.name))
    return None


def unknown_checkpoint(
    path: str | epath.Path, *, called: str = "INITIAL_CHECKPOINT_PATH"
) -> UserError:
    """What is wrong with a path, `called` so by the user, that holds no checkpoint."""
    what = "has no checkpoint" if epath.Path(path).is_dir() else "is no directory"
    return UserError(
        f"{called} '{path}' {what} that can be read; known kinds: t5x_like (MODEL_DIR or "
        "checkpoints/<step>), T5X legacy and T5X Orbax (checkpoint_<step>), Hugging Face "
        "(config.json and safetensors)."
    )


def open_own_checkpoint(step_dir: epath.Path) -> dict[str, Source]:
    """The parameters of a checkpoint by name; nothing is read yet.

    Raises:
      UserError: a damaged checkpoint, or one without parameters.
    """
    params = _open_params(step_dir)
    if not params:
        raise UserError(f"The checkpoint '{step_dir}' holds no parameters ('params').")
    # A chunk of a trainer's checkpoint is what a device held, mostly all layers: such a one is
    # kept while its layers are read one after the other, for two parameters at a time.
    several = [s for name, s in params.items() if _STACKED.search(name) and s.chunk[0] > 1]
    if not several:
        return params
    return _open_params(step_dir, cache_bytes=2 * max(s.nbytes for s in several))


def _open_params(step_dir: epath.Path, *, cache_bytes: int = 0) -> dict[str, Source]:
    tree = arrays.open_orbax_tree(step_dir / "state", cache_bytes=cache_bytes)
    return {n.removeprefix("params/"): s for n, s in tree.items() if n.startswith("params/")}


class OwnWriter:
    """Writes `directory/checkpoints/<step>`: parameters, step and metadata, no optimizer state."""

    def __init__(
        self,
        directory: Path,
        param_info: Mapping[str, ParamInfo],
        dtypes: Mapping[str, np.dtype],
        *,
        step: int,
        metadata: Mapping[str, Any],
    ) -> None:
        """`param_info` and the `dtypes` to store by the path of a parameter joined with "/"."""
        small = {n: np.zeros((1,) * len(info.shape), dtypes[n]) for n, info in param_info.items()}
        state = {"params": traverse_util.unflatten_dict(small, sep="/"), "step": np.int32(step)}
        _write_structure(directory / "checkpoints", state, step=step, metadata=metadata)
        state_dir = directory / "checkpoints" / str(step) / "state"
        self._arrays = {
            name: _create(
                state_dir / f"params.{name.replace('/', '.')}",
                shape=info.shape,
                dtype=dtypes[name],
                stacked=info.logical_axes[0] == "layers",
            )
            for name, info in param_info.items()
        }

    def write(self, name: str, index: int | None, value: np.ndarray) -> None:
        """Writes a parameter, or layer `index` of a stacked one; `value` is cast to its dtype."""
        array = self._arrays[name] if index is None else self._arrays[name][index]
        arrays.write_blocks(array, value)


def _write_structure(
    directory: Path, state: dict[str, Any], *, step: int, metadata: Mapping[str, Any]
) -> None:
    handlers = {
        # One directory an array, so that they can be replaced one by one.
        "state": ocp.PyTreeCheckpointHandler(use_ocdbt=False),
        "metadata": ocp.JsonCheckpointHandler(),
    }
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)  # Orbax warns that there is no OCDBT store to be merged.
    try:
        with ocp.CheckpointManager(directory.absolute(), item_handlers=handlers) as manager:
            state_args = ocp.args.PyTreeSave(state)
            metadata_args = ocp.args.JsonSave(dict(metadata))
            manager.save(step, args=ocp.args.Composite(state=state_args, metadata=metadata_args))
            manager.wait_until_finished()
    finally:
        logger.setLevel(level)


def _create(path: Path, *, shape: tuple[int, ...], dtype: np.dtype, stacked: bool) -> Any:
    """An array as Orbax makes it, but for its chunks."""
    spec = {
        "driver": "zarr",
        "kvstore": arrays.kvstore(epath.Path(path)),
        "metadata": {
            "shape": shape,
            "chunks": chunk_shape(shape, dtype.itemsize, stacked=stacked),
            "dtype": arrays.zarr_dtype(dtype),
            "compressor": {"id": "zstd", "level": 1},
            "fill_value": None,
        },
    }
    return ts.open(spec, create=True, delete_existing=True).result()


def chunk_shape(shape: tuple[int, ...], itemsize: int, *, stacked: bool) -> list[int]:
    """One layer of a stack, cut along its first axis until it has at most `BLOCK_BYTES`."""
    chunk = [1, *shape[1:]] if stacked else list(shape)
    axis = int(stacked)
    if len(chunk) > axis:
        row = max(1, math.prod(chunk[axis + 1 :]) * itemsize)
        chunk[axis] = max(1, min(chunk[axis], arrays.BLOCK_BYTES // row))
    return chunk
