"""Writes checkpoints as T5X's legacy Checkpointer does: parameters and step (version 3)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import tensorstore as ts
from etils import epath
from flax import serialization, traverse_util

from t5x_like.errors import UserError
from t5x_like.interop import arrays
from t5x_like.interop.hugging_face.adapter import Slot, num_layers

if TYPE_CHECKING:
    from t5x_like.interop.weights import Weights

CHUNK_BYTES = 64 << 20  # T5X's `_DESIRED_CHUNK_SIZE_BYTES`.
_COMPRESSOR = {"id": "gzip", "level": 1}
_HEADS = re.compile(r"/(query|key|value|out)/kernel$")
# What T5X's models are made of; it has no other parameters.
_KNOWN = re.compile(
    r"token_embedder/embedding|decoder/logits_dense/kernel|(en|de)coder/(en|de)coder_norm/scale"
    r"|(encoder|decoder)/(layers/)?relpos_bias/rel_embedding"
    r"|(encoder|decoder)/layers/(pre_\w+_layer_norm/scale|mlp/w[io](_\d)?/kernel"
    r"|(attention|self_attention|encoder_decoder_attention)/(query|key|value|out)/kernel)"
)


def write(weights: Weights, directory: Path, *, dtype: np.dtype | None, scanned: bool) -> None:
    """Writes `directory/checkpoint_<step>`.

    Args:
      dtype: in which all parameters are stored; None keeps what they have.
      scanned: the layout of T5X's scanned models: the layers on axis 1 of one array, heads and
        head_dim on axes of their own; otherwise one array a layer.

    Raises:
      UserError: T5X has no such model.
    """
    config = weights.config
    blocks = {config.block, getattr(config, "encoder_block", None) or config.block}
    foreign = sorted(name for name in weights.param_info if not _KNOWN.fullmatch(name))
    foreign += [
        f"{b.attention.num_kv_heads} of {b.attention.num_heads} heads for keys"
        for b in blocks
        if not foreign and b.attention.num_kv_heads not in (None, b.attention.num_heads)
    ]
    if foreign:
        rest = f" and {len(foreign) - 4} more" if len(foreign) > 4 else ""
        raise UserError(
            f"T5X has no model with {', '.join(foreign[:4])}{rest}: keep it in the format of this "
            "system."
        )
    decoder_only = not any(name.startswith("encoder/") for name in weights.param_info)
    if scanned and decoder_only:
        raise UserError("T5X's decoder-only model has no scanned layout: leave --scanned out.")
    step_dir = directory / f"checkpoint_{weights.step}"
    step_dir.mkdir()
    specs = {}
    for leaf in _leaves(weights, scanned=scanned, decoder_only=decoder_only):
        array, specs[leaf.name] = _create(step_dir, leaf, dtype or weights.dtypes[leaf.ours])
        for slot, index in leaf.parts:
            value = weights.read(slot)
            part = array[(slice(None), index)] if leaf.scanned else array
            arrays.write_blocks(part, value.reshape(part.shape))
            del value  # Before the next one is read.
    target = traverse_util.unflatten_dict(dict(sorted(specs.items())), sep="/")
    step = np.asarray(weights.step, np.int32)
    content = {"version": 3, "optimizer": {"state": {"step": step}, "target": target}}
    (step_dir / "checkpoint").write_bytes(serialization.msgpack_serialize(content, in_place=True))


class _Leaf(NamedTuple):
    """An array of T5X's: which of ours it is made of, and where each part goes on axis 1."""

    name: str
    shape: tuple[int, ...]
    ours: str
    parts: list[tuple[Slot, int]]
    scanned: bool = False


def _leaves(weights: Weights, *, scanned: bool, decoder_only: bool) -> Iterator[_Leaf]:
    for name, info in weights.param_info.items():
        side, _, rest = name.partition("/")
        shape, slot = tuple(info.shape), Slot(name, None)
        if name == "token_embedder/embedding" and decoder_only:
            yield _Leaf(f"decoder/{name}", shape, name, [(slot, 0)])
        elif rest.startswith("layers/"):
            rest = rest.removeprefix("layers/")
            slots = [Slot(name, layer) for layer in range(shape[0])]
            yield from _layers(weights, side, rest, shape[1:], slots, scanned=scanned)
        elif rest.startswith("relpos_bias/") and (scanned or decoder_only):
            # These models of T5X have a table in every layer, ours the one table for all.
            slots = [slot] * num_layers(weights.config, side)
            yield from _layers(weights, side, rest, shape, slots, scanned=scanned)
        else:
            yield _Leaf(name, shape, name, [(slot, 0)])


def _layers(
    weights: Weights,
    side: str,
    rest: str,
    shape: tuple[int, ...],
    slots: list[Slot],
    *,
    scanned: bool,
) -> Iterator[_Leaf]:
    """One array a layer, or all layers on axis 1 of one array."""
    ours = slots[0].name
    if not scanned:
        for layer, slot in enumerate(slots):
            yield _Leaf(f"{side}/layers_{layer}/{rest}", shape, ours, [(slot, 0)])
        return
    if heads := _HEADS.search(rest):
        num_heads = weights.config.block.attention.num_heads
        joined = 0 if heads[1] == "out" else 1
        pair = (num_heads, shape[joined] // num_heads)
        shape = (*shape[:joined], *pair, *shape[joined + 1 :])
    shape = (shape[0], len(slots), *shape[1:])
    parts = [(slot, layer) for layer, slot in enumerate(slots)]
    yield _Leaf(f"{side}/{side}/{rest}", shape, ours, parts, scanned=True)


def _create(step_dir: Path, leaf: _Leaf, dtype: np.dtype) -> tuple[Any, dict[str, Any]]:
    """The array, and the specification of it that T5X keeps in its msgpack file."""
    layer = (leaf.shape[0], *leaf.shape[2:]) if leaf.scanned else leaf.shape
    chunks = chunk_shape(layer, CHUNK_BYTES // dtype.itemsize)
    if leaf.scanned:
        chunks.insert(1, 1)  # T5X reads any chunks; these are written one layer at a time.
    metadata = {"chunks": chunks, "compressor": _COMPRESSOR, "shape": list(leaf.shape)}
    path = f"target.{leaf.name.replace('/', '.')}"
    array = ts.open(
        {
            "driver": "zarr",
            "kvstore": arrays.kvstore(epath.Path(step_dir / path)),
            "metadata": {**metadata, "dtype": arrays.zarr_dtype(dtype)},
        },
        create=True,
    ).result()
    kvstore = {"driver": "file", "path": f"{path}/"}
    return array, {
        "driver": "zarr",
        "dtype": dtype.name,
        "kvstore": kvstore,
        "metadata": metadata,
    }


def chunk_shape(shape: tuple[int, ...], max_elements: int) -> list[int]:
    """T5X's choice: the longest side goes to its next smaller divisor until the chunk fits."""
    chunk = list(shape)
    while math.prod(chunk) > max_elements:
        axis = chunk.index(max(chunk))
        smaller = range(chunk[axis] - 1, 0, -1)
        chunk[axis] = next(size for size in smaller if shape[axis] % size == 0)
    return chunk
