"""Which gin file in a model's directory says what the model is."""

from __future__ import annotations

from pathlib import Path

from t5x_like.errors import UserError

_NAMES = ("config.gin", "model.gin")  # What training and `convert` leave there.


def model_gin_files(model_dir: str | Path | None) -> list[str]:
    """The file with the macro MODEL in a directory that training or `convert` wrote.

    Raises:
      UserError: no directory, or nothing in it says which model it is of.
    """
    if model_dir is None:
        raise UserError("Which model? Give MODEL_DIR, or gin files (--gin_file) that say it.")
    directory = Path(model_dir).expanduser()
    for name in _NAMES:
        if (directory / name).is_file():
            return [str(directory / name)]
    what = f"has neither {' nor '.join(_NAMES)}" if directory.is_dir() else "is no directory"
    raise UserError(
        f"MODEL_DIR '{directory}' {what}: give a directory that training or `t5x_like convert` "
        "wrote, or --gin_file=FILE with the macro MODEL."
    )
