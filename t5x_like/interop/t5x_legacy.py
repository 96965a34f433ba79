"""Reads checkpoints that T5X wrote, in all of its layouts.

* Legacy: `checkpoint_<step>/checkpoint`, a flax msgpack of the state in which a sharded array is
  a TensorStore spec, and one zarr directory beside it for each such array (versions 2 and 3).
* Orbax: `checkpoint_<step>/state/`, one key per array in an OCDBT store or in plain directories.

Nothing is unpickled, and no array is read before somebody asks for it.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import ml_dtypes
import msgpack
import numpy as np
from etils import epath
from flax import serialization, traverse_util

from t5x_like.errors import UserError
from t5x_like.interop import arrays
from t5x_like.interop.matching import Source, check_match, place

if TYPE_CHECKING:
    from t5x_like.models.base import ParamInfo

_STEP_DIR = re.compile(r"checkpoint_(\d+)")
_LAYER = re.compile(r"/layers_(\d+)/")
_SCANNED = re.compile(r"(encoder|decoder)/\1/")


@dataclass(frozen=True, kw_only=True)
class LoadedCheckpoint:
    """A T5X train state under T5X's own tree names, unrolled or scanned as it was written.

    `params` and `opt_state` are nested dicts. Their leaves are numpy arrays, or `Source`s where
    the checkpoint was only opened. `opt_state` is T5X's `param_states` ({'m', 'v', 'v_row',
    'v_col'} under every parameter's path), None if the checkpoint holds parameters only.
    """

    params: dict[str, Any]
    step: int
    opt_state: dict[str, Any] | None


def load_t5x_checkpoint(path: str | epath.Path) -> LoadedCheckpoint:
    """Reads a whole T5X checkpoint into host memory.

    Args:
      path: a `checkpoint_<step>` directory, or a model directory (its latest step is taken).

    Raises:
      UserError: no checkpoint there, an unsupported version, or a damaged file.
    """
    opened = open_t5x_checkpoint(path)
    return LoadedCheckpoint(
        params=_read_all(opened.params),
        step=opened.step,
        opt_state=None if opened.opt_state is None else _read_all(opened.opt_state),
    )


def open_t5x_checkpoint(path: str | epath.Path) -> LoadedCheckpoint:
    """Like `load_t5x_checkpoint`, but the leaves are `Source`s that read when they are asked."""
    directory = find_t5x_checkpoint(path)
    if directory is None:
        raise UserError(
            f"No T5X checkpoint at '{path}': expected 'checkpoint' or 'state/' in it, "
            "or 'checkpoint_<step>' directories."
        )
    is_legacy = (directory / "checkpoint").exists()
    return _open_legacy(directory) if is_legacy else _open_orbax(directory)


def find_t5x_checkpoint(path: str | epath.Path) -> epath.Path | None:
    """Returns the checkpoint directory at `path` or the latest one in it, None if there is none."""
    directory = epath.Path(path)
    if not directory.is_dir():
        return None
    if _is_checkpoint(directory):
        return directory
    steps = {int(m[1]): p for p in directory.iterdir() if (m := _STEP_DIR.fullmatch(p.name))}
    complete = [step for step in sorted(steps, reverse=True) if _is_checkpoint(steps[step])]
    return steps[complete[0]] if complete else None


def _is_checkpoint(directory: epath.Path) -> bool:
    if (directory / "checkpoint").exists():
        return True
    # The step counter is `state.step` in T5X's tree and `step` in ours.
    return (directory / "state").is_dir() and any(
        name.startswith(b"target.") for name in arrays.list_arrays(directory / "state")
    )


# ---- Legacy: msgpack and zarr.


def _open_legacy(directory: epath.Path) -> LoadedCheckpoint:
    file = directory / "checkpoint"
    try:
        content = serialization.msgpack_restore(file.read_bytes())
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise UserError(
            f"'{file}' is damaged or cut short: it is no complete msgpack file "
            f"({type(error).__name__}); copy the checkpoint again."
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("optimizer"), dict):
        raise UserError(f"'{file}' is no T5X checkpoint: it holds no 'optimizer' entry.")
    version = content.get("version", 0)
    if version not in (2, 3):
        raise UserError(f"'{file}' has T5X checkpoint version {version}; readable are 2 and 3.")
    # Version 2 had no bfloat16 in its array files: it stored the bits as uint16.
    sources = {
        name: _legacy_source(directory, name, leaf, uint16_is_bfloat16=version == 2)
        for name, leaf in _leaves(content["optimizer"])
    }
    return _checkpoint(sources, where=file)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (path joined by "/", leaf); a TensorStore spec is a leaf although it is a dict."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and not {"driver", "kvstore"} <= value.keys():
            yield from _leaves(value, name + "/")
        elif value is not None:
            yield name, value


def _legacy_source(
    directory: epath.Path, name: str, leaf: Any, *, uint16_is_bfloat16: bool
) -> Source:
    if isinstance(leaf, dict):
        # Only the name of the array's directory is used. Driver and bucket are those of the
        # machine that wrote it; chunks and compressor are in the array's own `.zarray`.
        spec_path = leaf["kvstore"].get("path") or leaf.get("path", "")
        source = arrays.open_array(
            arrays.kvstore(directory / PurePosixPath(spec_path).name), name=name
        )
    else:
        source = Source.of(leaf)
    return source.view(ml_dtypes.bfloat16) if uint16_is_bfloat16 else source


# ---- Orbax.


def _open_orbax(directory: epath.Path) -> LoadedCheckpoint:
    state = directory / "state"
    return _checkpoint(arrays.open_orbax_tree(state), where=state)


# ---- Both.


def _checkpoint(sources: Mapping[str, Source], *, where: epath.Path) -> LoadedCheckpoint:
    def subtree(prefix: str) -> dict[str, Any]:
        names = {n.removeprefix(prefix): s for n, s in sources.items() if n.startswith(prefix)}
        return traverse_util.unflatten_dict(names, sep="/")

    params = subtree("target/")
    if not params or "state/step" not in sources:
        raise UserError(f"'{where}' holds no T5X train state (parameters 'target', 'state/step').")
    return LoadedCheckpoint(
        params=params,
        step=int(sources["state/step"].read()),
        opt_state=subtree("state/param_states/") or None,
    )


def _read_all(tree: dict[str, Any]) -> dict[str, Any]:
    return {k: _read_all(v) if isinstance(v, dict) else v.read() for k, v in tree.items()}


# ---- Names and shapes.


def to_stacked(
    tree: Mapping[str, Any],
    param_info: Mapping[str, Any],
    *,
    shardings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Brings T5X's parameter tree into the names and shapes of `param_info`.

    * unrolled `encoder/layers_3/x` becomes row 3 of `encoder/layers/x`;
    * scanned `encoder/encoder/x`, layers on axis 1, becomes `encoder/layers/x`, layers leading;
    * attention kernels with separate heads and head dimensions become two-dimensional.

    Args:
      tree: nested dict of arrays or `Source`s under T5X's names.
      param_info: nested dict of `ParamInfo`, as `ModelDef.param_info`.
      shardings: nested dict of `jax.sharding.Sharding`; every array is put on its devices as
        soon as it is read, so that the host holds one array at a time.

    Returns:
      Nested dict, structure, shapes and dtypes of `param_info`, of numpy arrays, or of global
      `jax.Array`s if there are shardings.

    Raises:
      UserError: one line with every missing, superfluous and mis-shaped parameter.
    """
    wanted = traverse_util.flatten_dict(param_info, sep="/")
    found = match(tree, wanted)
    where = traverse_util.flatten_dict(shardings or {}, sep="/")
    arrays = {
        name: place(np.asarray(found[name].read(), info.dtype), where.get(name))
        for name, info in wanted.items()
    }
    return traverse_util.unflatten_dict(arrays, sep="/")


def match(tree: Mapping[str, Any], wanted: Mapping[str, ParamInfo]) -> dict[str, Source]:
    """What `to_stacked` says, but nothing is read, and names are flat."""
    found = by_our_names(tree, wanted)
    check_match({n: s.shape for n, s in found.items()}, wanted)
    return found


def by_our_names(tree: Mapping[str, Any], wanted: Mapping[str, ParamInfo]) -> dict[str, Source]:
    """All of `tree` under our names, in the shapes of `wanted` where it has them; not checked."""
    found = _canonical(traverse_util.flatten_dict(tree, sep="/"))
    for side in ("encoder", "decoder"):
        shared, layers = (f"{side}/{place}relpos_bias/rel_embedding" for place in ("", "layers/"))
        if shared in wanted and layers in found and shared not in found:
            found[shared] = _one_for_all(layers, found.pop(layers))
    return {n: _merge_heads(s, wanted[n]) if n in wanted else s for n, s in found.items()}


def _one_for_all(name: str, source: Source) -> Source:
    """The one table that all layers have: T5X's scanned and decoder-only models repeat it."""
    tables = source.read()
    if not (tables == tables[:1]).all():
        raise UserError(
            f"The checkpoint's layers have different tables '{name}', the model has one for all: "
            "set RelativePositionsConfig.per_layer = True."
        )
    return Source.of(tables[0])


def _canonical(flat: Mapping[str, Any]) -> dict[str, Source]:
    """Renames T5X's parameters to ours and puts unrolled and scanned layers on a leading axis."""
    plain: dict[str, Source] = {}
    unrolled: dict[str, dict[int, Source]] = defaultdict(dict)
    for name, leaf in flat.items():
        source = Source.of(leaf)
        # T5X's decoder-only model keeps its embedding inside the decoder.
        name = name.replace("decoder/token_embedder/", "token_embedder/")
        if layer := _LAYER.search(name):
            unrolled[_LAYER.sub("/layers/", name)][int(layer[1])] = source
        elif _SCANNED.match(name):
            plain[_SCANNED.sub(r"\1/layers/", name)] = _layers_first(source)
        else:
            plain[name] = source
    return plain | {name: _stack(name, layers) for name, layers in unrolled.items()}


def _stack(name: str, layers: Mapping[int, Source]) -> Source:
    shapes = {source.shape for source in layers.values()}
    if sorted(layers) != list(range(len(layers))) or len(shapes) != 1:
        listing = ", ".join(f"{i}: {layers[i].shape}" for i in sorted(layers))
        raise UserError(
            f"The checkpoint's layers of '{name}' are not 0, 1, 2, ... of one shape ({listing})."
        )

    def read() -> np.ndarray:
        out = np.empty(shape, layers[0].dtype)
        for i, source in layers.items():
            out[i] = source.read()
        return out

    def take(i: int, axis: int) -> np.ndarray:
        return layers[i].read() if axis == 0 else read().take(i, axis)

    shape = (len(layers), *layers[0].shape)
    return Source(shape=shape, dtype=layers[0].dtype, read=read, take=take)


def _layers_first(source: Source) -> Source:
    if len(source.shape) < 2:
        return source
    first, layers, *rest = source.shape
    return Source(
        shape=(layers, first, *rest),
        dtype=source.dtype,
        read=lambda: np.moveaxis(source.read(), 1, 0),
        take=lambda i, axis: source.take(i, {0: 1, 1: 0}.get(axis, axis)),
    )


def _merge_heads(source: Source, info: ParamInfo) -> Source:
    """Merges (heads, head_dim) where our kernel has the one joined dimension for both."""
    axes = [a for a in ("heads", "kv_heads") if a in info.logical_axes]
    if len(source.shape) != len(info.shape) + 1 or not axes:
        return source
    joined = info.logical_axes.index(axes[0])
    pair = source.shape[joined : joined + 2]
    shape = (*source.shape[:joined], math.prod(pair), *source.shape[joined + 2 :])

    def merge(x: np.ndarray) -> np.ndarray:
        return x.reshape(shape[len(shape) - (x.ndim - 1) :])

    return source.map(merge, shape=shape)
