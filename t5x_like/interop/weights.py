"""Weights of a model, wherever they are stored, under our names and read a layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from flax import traverse_util

from t5x_like.config import write_gin
from t5x_like.errors import UserError
from t5x_like.interop import arrays, matching, own, t5x_legacy
from t5x_like.interop.hugging_face.adapter import Slot
from t5x_like.interop.hugging_face.checkpoint import HuggingFaceCheckpoint, is_hugging_face
from t5x_like.interop.matching import Source
from t5x_like.models.base import ModelDef

KINDS = {"own": "t5x_like", "hf": "Hugging Face", "t5x": "T5X"}
_GIN_FILES = ("model.gin", "config.gin")  # What `convert` and what training writes.


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The parameters of a model.

    Attributes:
      kind: a key of `KINDS`.
      directory: the model directory that they are in, beside its tokenizer files.
      config: our model config.
      param_info: flat, `ParamInfo` by name.
      dtypes: the dtype in which each parameter is stored.
      step: of the training that made them; 0 where that is not known.
      read: slot -> the parameter, or one layer of it.
      parts: () -> (slot, array) of all of them, each tensor being read once.
    """

    kind: str
    directory: Path
    config: Any
    param_info: Mapping[str, Any]
    dtypes: Mapping[str, np.dtype]
    step: int
    read: Callable[[Slot], np.ndarray]
    parts: Callable[[], Iterator[tuple[Slot, np.ndarray]]]


def find_kind(path: str | Path) -> str:
    """The kind of checkpoint at `path`, a key of `KINDS`; UserError if there is none."""
    if own.find_own_checkpoint(path) is not None:
        return "own"
    if t5x_legacy.find_t5x_checkpoint(path) is not None:
        return "t5x"
    if is_hugging_face(path):
        return "hf"
    raise own.unknown_checkpoint(path, called="--from")


def open_weights(path: str | Path, *, model: str | Path | None = None) -> Weights:
    """Opens a checkpoint of any kind and checks that it is one of its model.

    Args:
      model: a gin file with the macro MODEL, for a checkpoint of ours or T5X's without one.

    Raises:
      UserError: no checkpoint, no or superfluous `model`, another model, damaged files.
    """
    kind = find_kind(path)
    if kind == "hf":
        if model is not None:
            raise UserError(f"--model is not needed: '{path}' has a config.json, which says it.")
        return _open_hugging_face(Path(path))
    if kind == "own":
        return _open_own(epath.Path(path), model)
    return _open_t5x(epath.Path(path), model)


def _open_hugging_face(directory: Path) -> Weights:
    checkpoint = HuggingFaceCheckpoint(directory)
    of_slot = {slot: (t, i) for t in checkpoint.transfers for i, slot in enumerate(t.ours)}

    def read(slot: Slot) -> np.ndarray:
        transfer, position = of_slot[slot]
        return checkpoint.read(transfer)[position]

    def parts() -> Iterator[tuple[Slot, np.ndarray]]:
        for transfer in checkpoint.transfers:
            yield from zip(transfer.ours, checkpoint.read(transfer), strict=True)

    return Weights(
        kind="hf",
        directory=directory,
        config=checkpoint.config,
        param_info=checkpoint.param_info,
        dtypes=checkpoint.dtypes(),
        step=0,
        read=read,
        parts=parts,
    )


def _open_own(path: epath.Path, model: str | Path | None) -> Weights:
    step_dir = own.find_own_checkpoint(path)
    assert step_dir is not None
    inside = step_dir.parent.name == "checkpoints"
    directory = Path(step_dir.parent.parent if inside else step_dir.parent)
    if model is None:
        found = [directory / name for name in _GIN_FILES if (directory / name).is_file()]
        if not found:
            raise UserError(
                f"'{directory}' has neither {' nor '.join(_GIN_FILES)}, so that the model of its "
                "checkpoint is not known: give --model=FILE.gin with the macro MODEL."
            )
        model = found[0]
    config = write_gin.build_model(model)
    sources = own.open_own_checkpoint(step_dir)
    info = _param_info(config)
    shapes = {name: source.shape for name, source in sources.items()}
    matching.check_match(shapes, info, what=str(step_dir))
    return _of_sources("own", directory, config, info, sources, step=int(step_dir.name))


def _open_t5x(path: epath.Path, model: str | Path | None) -> Weights:
    if model is None:
        raise UserError(
            f"'{path}' is a checkpoint of T5X, which does not say its model in a way that can be "
            "read here: give --model=FILE.gin, such as gin/models/t5_1_1/small.gin."
        )
    config = write_gin.build_model(model)
    info = _param_info(config)
    opened = t5x_legacy.open_t5x_checkpoint(path)
    sources = t5x_legacy.match(opened.params, info)
    return _of_sources("t5x", Path(path), config, info, sources, step=opened.step)


def _param_info(config: Any) -> dict[str, Any]:
    return traverse_util.flatten_dict(ModelDef(config).param_info, sep="/")


def _of_sources(
    kind: str,
    directory: Path,
    config: Any,
    info: Mapping[str, Any],
    sources: Mapping[str, Source],
    *,
    step: int,
) -> Weights:
    def read(slot: Slot) -> np.ndarray:
        source = sources[slot.name]
        value = source.read() if slot.row is None else source.take(slot.row, 0)
        if not arrays.all_finite(value):
            layer = "" if slot.row is None else f" (layer {slot.row} of the stack)"
            raise UserError(
                f"Parameter '{slot.name}'{layer} of '{directory}' holds NaN or infinite values."
            )
        return value

    def parts() -> Iterator[tuple[Slot, np.ndarray]]:
        for name in info:
            for slot in slots(name, info[name]):
                yield slot, read(slot)

    return Weights(
        kind=kind,
        directory=directory,
        config=config,
        param_info=info,
        dtypes={name: source.dtype for name, source in sources.items()},
        step=step,
        read=read,
        parts=parts,
    )


def slots(name: str, info: Any) -> list[Slot]:
    """What a parameter is written and read by: its layers, or it as a whole."""
    if info.logical_axes[0] != "layers":
        return [Slot(name, None)]
    return [Slot(name, index) for index in range(info.shape[0])]
