"""A Hugging Face directory: opened, recognised, checked against its table of names, read."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from flax import traverse_util

from t5x_like.errors import UserError
from t5x_like.interop import matching
from t5x_like.interop.hugging_face import registry
from t5x_like.interop.hugging_face.adapter import Slot, Transfer, transfers
from t5x_like.interop.hugging_face.tensor_files import DTYPES, Spec, TensorFiles, read_json
from t5x_like.interop.matching import Source
from t5x_like.models.base import ModelDef

logger = logging.getLogger(__name__)

CONFIG = "config.json"


def is_hugging_face(directory: str | epath.Path) -> bool:
    """Whether `directory` holds a config.json, by which every such directory is known."""
    return (epath.Path(directory) / CONFIG).is_file()


class HuggingFaceCheckpoint:
    """A directory with config.json and safetensors, whose tensors are those of its config.json.

    Attributes:
      config_json: its content.
      family: the adapter.
      config: our model config.
      param_info: flat, `ParamInfo` by our name.
      transfers: which of their tensors is which of our parameters.
    """

    def __init__(self, directory: str | epath.Path) -> None:
        """Opens; no tensor is read.

        Raises:
          UserError: an unknown architecture, a setting that we do not have, damaged files,
            missing, superfluous or mis-shaped tensors (all of them in one line).
        """
        self.directory = Path(directory)
        self.config_json = read_json(self.directory / CONFIG)
        registry.find_family(self.config_json)  # Before any file is opened.
        self._files = TensorFiles(self.directory)
        self.family, self.config = registry.our_config(
            self.config_json, names_in_files=self._files.specs
        )
        model = ModelDef(self.config)
        self.param_info = traverse_util.flatten_dict(model.param_info, sep="/")
        self.transfers = transfers(self.family.entries(self.config), self.config)
        self._in_file = self._names()
        self._check()

    def _names(self) -> dict[str, str]:
        """Name in the table -> name in the files."""
        names: dict[str, str] = {}
        for name in self._files.specs:
            canonical = self.family.canonical(name)
            if canonical in names:
                raise UserError(
                    f"'{self.directory}' holds '{canonical}' twice: as '{names[canonical]}' and "
                    f"as '{name}'."
                )
            names[canonical] = name
        return names

    def _check(self) -> None:
        aliases = {alias for t in self.transfers for alias in t.aliases}
        wanted = {
            name: Spec(shape, "")
            for t in self.transfers
            for name, shape in zip(t.theirs, t.theirs_shapes(self.param_info), strict=True)
        }
        found = {
            name: self._files.specs[in_file].shape
            for name, in_file in self._in_file.items()
            if name not in aliases and not self.family.is_ignored(name)
        }
        for t in self.transfers:  # A tied tensor may be there under its other name only.
            if len(t.theirs) == 1 and t.theirs[0] not in found:
                for alias in t.aliases:
                    if alias in self._in_file:
                        self._in_file[t.theirs[0]] = self._in_file[alias]
                        found[t.theirs[0]] = self._files.specs[self._in_file[alias]].shape
                        break
        matching.check_match(found, wanted, what=str(self.directory))
        unusable = [n for n in wanted if self._spec(n).dtype not in DTYPES]
        if unusable:
            types = ", ".join(f"{n} ({self._spec(n).dtype})" for n in unusable)
            raise UserError(
                f"'{self.directory}' has weights of types that cannot be read (readable are "
                f"{', '.join(DTYPES)}; dequantise first): {types}."
            )

    def dtypes(self) -> dict[str, np.dtype]:
        """The dtype in which each of our parameters is stored; float32 where its layers differ."""
        found: dict[str, set[np.dtype]] = defaultdict(set)
        for t in self.transfers:
            for slot in t.ours:
                found[slot.name] |= {DTYPES[self._spec(name).dtype] for name in t.theirs}
        return {n: d.pop() if len(d) == 1 else np.dtype(np.float32) for n, d in found.items()}

    def _spec(self, name: str) -> Spec:
        return self._files.specs[self._in_file[name]]

    def read(self, transfer: Transfer) -> tuple[np.ndarray, ...]:
        """Our arrays of a transfer, one a slot; UserError for what cannot be a weight."""
        theirs = [self._files.read(self._in_file[name]) for name in transfer.theirs]
        for alias in transfer.aliases:
            if alias in self._in_file:
                self._check_equal(transfer.theirs[0], theirs[0], alias)
        return transfer.to_ours(*theirs)

    def _check_equal(self, name: str, value: np.ndarray, alias: str) -> None:
        same = self._in_file[alias] == self._in_file[name]
        if not same and not self._files.equals(self._in_file[alias], value):
            raise UserError(
                f"Tensors '{name}' and '{alias}' of '{self.directory}' differ, but its config.json "
                "says that they are one."
            )

    def sources(self) -> dict[str, Source]:
        """Every parameter of ours, read (all layers of a stack) when it is asked for."""
        parts: dict[str, list[tuple[Transfer, int, Slot]]] = defaultdict(list)
        for transfer in self.transfers:
            for position, slot in enumerate(transfer.ours):
                parts[slot.name].append((transfer, position, slot))
        dtypes = self.dtypes()

        def source(name: str) -> Source:
            info = self.param_info[name]

            def read() -> np.ndarray:
                value = np.empty(info.shape, dtypes[name])
                for transfer, position, slot in parts[name]:
                    row = ... if slot.row is None else slot.row
                    value[row] = self.read(transfer)[position]
                return value

            return Source(
                shape=info.shape,
                dtype=dtypes[name],
                read=read,
                take=lambda i, axis: np.take(read(), i, axis),
            )

        return {name: source(name) for name in self.param_info}


def load_params(
    directory: str | epath.Path,
    param_info: Mapping[str, Any],
    *,
    shardings: Mapping[str, Any] | None = None,
    config: Any = None,
) -> dict[str, Any]:
    """Reads the parameters of a Hugging Face directory, one of our (stacked) arrays at a time.

    Args:
      directory: with config.json and safetensors.
      param_info: nested dict of `ParamInfo` of the model that is to be filled.
      shardings: nested dict of `jax.sharding.Sharding`: arrays are put there as they are read.
      config: of that model; where it differs from what config.json says, a warning is logged.

    Returns:
      Nested dict of numpy arrays, or of global `jax.Array`s if there are shardings.

    Raises:
      UserError: see `HuggingFaceCheckpoint`; a model of other parameters.
    """
    checkpoint = HuggingFaceCheckpoint(directory)
    wanted = traverse_util.flatten_dict(param_info, sep="/")
    shapes = {name: info.shape for name, info in checkpoint.param_info.items()}
    matching.check_match(shapes, wanted, what=str(directory))
    if config is not None and (others := list(registry.differences(config, checkpoint.config))):
        logger.warning("The model is not quite that of '%s': %s", directory, "; ".join(others))
    where = traverse_util.flatten_dict(shardings or {}, sep="/")
    sources = checkpoint.sources()
    arrays = {
        name: matching.place(np.asarray(sources[name].read(), info.dtype), where.get(name))
        for name, info in wanted.items()
    }
    return traverse_util.unflatten_dict(arrays, sep="/")
