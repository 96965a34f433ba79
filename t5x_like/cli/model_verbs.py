"""What the verbs that ask a model (eval, infer, chat) have in common: where its gin files are."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from t5x_like.config.gin_config import GinConfig


def add_arguments(
    parser: argparse.ArgumentParser, shorthands: Mapping[str, tuple[str, str]]
) -> None:
    """Adds MODEL_DIR, the flags of a job of several processes, and shorthands of macros.

    Args:
      shorthands: flag without its dashes -> (macro, help).
    """
    from t5x_like.cli import train

    parser.add_argument("model_dir", nargs="?", metavar="MODEL_DIR", help="of training or convert")
    group = parser.add_argument_group("shorthands")
    for flag, (macro, text) in shorthands.items():
        group.add_argument(f"--{flag}", metavar=macro, dest=macro, help=f"{text} (--gin.{macro})")
    train.add_arguments(parser)


def parse(
    args: argparse.Namespace, *, run_file: str, shorthands: Mapping[str, tuple[str, str]]
) -> GinConfig:
    """The gin files of the verb, of the model and of the user, in this order, and the bindings.

    Raises:
      UserError: see `model_files.parse`.
    """
    from t5x_like.config import model_files

    given = {macro: getattr(args, macro) for macro, _ in shorthands.values()}
    bindings = [f"{macro}={_quoted(value)}" for macro, value in given.items() if value is not None]
    if args.model_dir is not None:
        bindings.append(f"MODEL_DIR={args.model_dir!r}")
    bindings = [*args.gin_bindings, *bindings]
    return model_files.parse(
        run_file,
        model_dir=_model_dir(bindings),
        gin_files=args.gin_file,
        bindings=bindings,
        search_paths=args.gin_search_paths,
    )


def _quoted(text: str) -> Any:
    """A flag's value as gin has it: a literal (a number, a list), else a string."""
    try:
        return repr(ast.literal_eval(text))
    except (ValueError, SyntaxError):
        return repr(text)


def _model_dir(bindings: list[str]) -> str | None:
    for binding in reversed(bindings):
        name, _, value = binding.partition("=")
        if name.strip() == "MODEL_DIR":
            return value.strip().strip("'\"")
    return None


def start(args: argparse.Namespace) -> None:
    """Joins the other processes, if there are any, and turns the compilation cache on."""
    from t5x_like.cli import train
    from t5x_like.parallel import multihost

    train.use_compilation_cache()
    multihost.initialize(
        coordinator_address=args.coordinator_address,
        num_processes=args.num_processes,
        process_id=args.process_id,
        auto=args.multihost,
    )
