"""Where scalars go: TensorBoard events and one JSON object a step in metrics.jsonl."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from t5x_like.quick_import import without

with without("torch"):  # Which tensorboardX wants for the sake of one type.
    from tensorboardX import SummaryWriter


class MetricWriter:
    """Writes scalars and text of one directory, as `train/` or `training_eval/<task>/`.

    After a restart at step `first_step`, what a killed run had logged beyond it is dropped, so that
    metrics.jsonl of an interrupted run has the same steps as that of an uninterrupted one.
    """

    def __init__(self, directory: Path, *, first_step: int | None) -> None:
        """`first_step`: None keeps every line, whatever its step."""
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / "metrics.jsonl"
        if self._path.exists():
            lines = self._path.read_text().splitlines()
            kept = [line for line in lines if _keeps(line, first_step)]
            temporary = self._path.with_suffix(".tmp")
            temporary.write_text("".join(line + "\n" for line in kept))
            temporary.replace(self._path)
        self._file = self._path.open("a", buffering=1)
        # The suffix keeps apart the files of restarts within one second.
        self._events = SummaryWriter(
            str(directory),
            purge_step=first_step + 1 if first_step else None,
            filename_suffix=f".{first_step}",
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line to metrics.jsonl and one event a value."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        self._events.flush()

    def text(self, step: int, name: str, text: str) -> None:
        """Shows `text` verbatim under TensorBoard's Text tab."""
        indented = "".join(f"    {line}\n" for line in text.splitlines())
        self._events.add_text(name, indented, step)
        self._events.flush()

    def image(
        self, step: int, name: str, grey: UInt8[np.ndarray, "rows columns"], *, zoom: int = 8
    ) -> None:
        """Shows a grey picture, every value a square of `zoom` pixels, under the Images tab."""
        large = np.kron(grey, np.ones((zoom, zoom), np.uint8))
        self._events.add_image(name, large, step, dataformats="HW")
        self._events.flush()

    def close(self) -> None:
        self._file.close()
        self._events.close()


def read_scalars(directory: Path) -> list[dict[str, float]]:
    """The lines of a directory's metrics.jsonl; none where there is no file."""
    path = directory / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if _keeps(line, None)]


def _keeps(line: str, first_step: int | None) -> bool:
    """Whether a logged line survives a restart; a line cut short by a kill does not."""
    try:
        step = int(json.loads(line)["step"])
        return first_step is None or step <= first_step
    except (ValueError, KeyError, TypeError):
        return False
