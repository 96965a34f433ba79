"""Checkpoints from one system's form into another's, a layer at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import t5x_like
from t5x_like.config import write_gin
from t5x_like.errors import UserError
from t5x_like.interop import own, t5x_export
from t5x_like.interop.destination import carry_files, check_new, new_directory
from t5x_like.interop.hugging_face import registry
from t5x_like.interop.hugging_face.adapter import transfers
from t5x_like.interop.hugging_face.checkpoint import CONFIG
from t5x_like.interop.hugging_face.tensor_files import (
    SHARD_BYTES,
    Spec,
    TensorWriter,
    dtype_name,
    read_json,
)
from t5x_like.interop.weights import KINDS, Weights, open_weights

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
# Their config.json in a directory of ours: what ours does not say (token ids, ...) stays in it.
_CARRIED_CONFIG = "hugging_face_config.json"


def convert(
    source: str | Path,
    target: str | Path,
    *,
    format: str | None = None,
    dtype: str | None = None,
    model: str | Path | None = None,
    scanned: bool = False,
) -> Weights:
    """Writes the checkpoint at `source` in another form into the new directory `target`.

    Args:
      source: a checkpoint of ours, of Hugging Face or of T5X; see `weights.find_kind`.
      format: a key of `weights.KINDS`; None is ours for a foreign source.
      dtype: a key of `DTYPES`; None keeps what the source has.
      model: see `weights.open_weights`.
      scanned: for T5X: the layout of its scanned models.

    Returns:
      What was read.

    Raises:
      UserError: bad arguments or a bad source; then `target` is not there.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype={dtype} is not known: give {' or '.join(DTYPES)}.")
    if format is not None and format not in KINDS:
        raise UserError(f"--format={format} is not known: give {', '.join(KINDS)}.")
    if scanned and format != "t5x":
        raise UserError("--scanned is a layout of T5X: give it with --format=t5x.")
    check_new(target)
    weights = open_weights(source, model=model)
    if format is None and weights.kind == "own":
        raise UserError(f"'{source}' is a checkpoint of t5x_like: give --format=hf or t5x.")
    with new_directory(target) as directory:
        wanted = DTYPES[dtype] if dtype else None
        if format == "hf":
            _write_hugging_face(weights, directory, dtype=wanted)
        elif format == "t5x":
            t5x_export.write(weights, directory, dtype=wanted, scanned=scanned)
        else:
            _write_own(weights, directory, dtype=wanted)
        carry_files(weights.directory, directory)
    return weights


def from_hugging_face(
    source: str | Path, target: str | Path, *, dtype: str | None = None
) -> Weights:
    """`convert` from a Hugging Face directory to a checkpoint of ours."""
    return convert(source, target, format="own", dtype=dtype)


def to_hugging_face(
    source: str | Path,
    target: str | Path,
    *,
    dtype: str | None = None,
    model: str | Path | None = None,
) -> Weights:
    """`convert` to a Hugging Face directory."""
    return convert(source, target, format="hf", dtype=dtype, model=model)


def _write_own(weights: Weights, directory: Path, *, dtype: np.dtype | None) -> None:
    carried = _config_json(weights)
    origin = f"{KINDS[weights.kind]} checkpoint {weights.directory.name}"
    text = write_gin.model_text(weights.config, comment=f"Made by t5x_like convert: {origin}")
    writer = own.OwnWriter(
        directory,
        weights.param_info,
        _dtypes(weights, dtype),
        step=weights.step,
        metadata={"gin": text, "converted_from": origin, "t5x_like": t5x_like.__version__},
    )
    for slot, value in weights.parts():
        writer.write(slot.name, slot.row, value)
        del value  # Before the next one is read.
    (directory / "model.gin").write_text(text, encoding="utf-8")
    if carried is not None:
        _write_json(directory / _CARRIED_CONFIG, carried)


def _write_hugging_face(
    weights: Weights,
    directory: Path,
    *,
    dtype: np.dtype | None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    family, config_json = registry.their_config(weights.config, carried=_config_json(weights))
    table = transfers(family.entries(weights.config), weights.config)
    specs: dict[str, Spec] = {}
    dtypes = _dtypes(weights, dtype)
    for t in table:
        stored = {dtypes[slot.name] for slot in t.ours}
        kept = stored.pop() if len(stored) == 1 else np.dtype(np.float32)
        for name, shape in zip(t.theirs, t.theirs_shapes(weights.param_info), strict=True):
            for written in (name, *t.copies):
                specs[written] = Spec(shape, dtype_name(kept))
    writer = TensorWriter(directory, specs, shard_bytes=shard_bytes)
    for t in table:
        theirs = t.to_theirs(*[weights.read(slot) for slot in t.ours])
        for name, value in zip(t.theirs, theirs, strict=True):
            for written in (name, *t.copies):
                writer.write(written, value)
        del theirs, value  # Before the next one is read.
    writer.close()
    # The name that all releases of transformers read.
    main = max(specs.values(), key=lambda spec: int(np.prod(spec.shape))).dtype
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    _write_json(directory / CONFIG, {**config_json, "torch_dtype": names[main]})


def _dtypes(weights: Weights, wanted: np.dtype | None) -> dict[str, np.dtype]:
    """In which every parameter is written; what is not trained (a balance bias) stays exact."""
    return {
        name: wanted if wanted is not None and weights.param_info[name].trained else stored
        for name, stored in weights.dtypes.items()
    }


def _config_json(weights: Weights) -> dict[str, Any] | None:
    """The config.json that the weights came with, if they did, without what is written anew."""
    file = weights.directory / (CONFIG if weights.kind == "hf" else _CARRIED_CONFIG)
    if not file.is_file():
        return None
    anew = ("dtype", "torch_dtype", "transformers_version", "_name_or_path")
    return {key: value for key, value in read_json(file).items() if key not in anew}


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
