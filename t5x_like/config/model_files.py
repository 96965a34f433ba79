"""The gin files of a run that asks a model: its own, then those that say what the model is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from t5x_like.config import gin_config, statements
from t5x_like.config.gin_config import GinConfig
from t5x_like.config.statements import Statements
from t5x_like.errors import UserError

_NAMES = ("config.gin", "model.gin")  # What training and `convert` leave in a model's directory.


def parse(
    run_file: str,
    *,
    model_dir: str | None,
    gin_files: Sequence[str] = (),
    bindings: Sequence[str] = (),
    search_paths: Sequence[str] = (),
) -> GinConfig:
    """Reads `run_file`, then the file of `model_dir`, then `gin_files`, then the bindings.

    The file of `model_dir` is left out where `gin_files` say which model it is (macro MODEL).

    config.gin gives every value with the scope that it was used in, so that a binding without a
    scope would change nothing; here it holds in every scope.

    Raises:
      UserError: no directory, nothing in it that says which model it is of, or what
        `gin_config.parse` says.
    """
    told = "MODEL" in statements.read(gin_files, (), search_paths=search_paths).macros()
    files = [run_file, *([] if told else [_model_file(model_dir)]), *gin_files]
    config = gin_config.parse(files, bindings, search_paths=search_paths)
    scoped = list(_in_every_scope(config.statements, bindings))
    if told or not scoped:
        return config
    return gin_config.parse(files, [*bindings, *scoped], search_paths=search_paths)


def _model_file(model_dir: str | None) -> str:
    if model_dir is None:
        raise UserError("Which model? Give MODEL_DIR, or gin files (--gin_file) that say it.")
    directory = Path(model_dir).expanduser()
    for name in _NAMES:
        if (directory / name).is_file():
            return str(directory / name)
    what = f"has neither {' nor '.join(_NAMES)}" if directory.is_dir() else "is no directory"
    raise UserError(
        f"MODEL_DIR '{directory}' {what}: give a directory that training or `t5x_like convert` "
        "wrote, or --gin_file=FILE with the macro MODEL."
    )


def _in_every_scope(found: Statements, bindings: Sequence[str]) -> Iterator[str]:
    """`Class.parameter=value` -> `scope/Class.parameter=value` for each scope that binds it."""
    for binding in bindings:
        name, _, value = binding.partition("=")
        selector, _, parameter = name.strip().rpartition(".")
        if selector and "/" not in selector:
            for other in found.bindings:
                same = f".{other.selector}".endswith(f".{selector}")
                if other.scope and same and other.parameter == parameter:
                    yield f"{other.scope}/{other.selector}.{parameter}={value}"
