"""The command line: finds the verb, reads its flags, and turns errors into exit codes.

Exit codes: 0 done, 1 a bug (traceback), 2 a mistake of the user (one line), 75 preempted after a
clean save (restart me), 130 interrupted.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

import t5x_like
from t5x_like.errors import UserError, did_you_mean


class Verb(NamedTuple):
    """A verb is a module with `add_arguments(parser)` and `run(args) -> exit code`.

    The module imports nothing heavy at its top: `--help` answers within a second.
    """

    module: str
    help: str
    gin: bool


VERBS = {
    "train": Verb("t5x_like.cli.train", "train a model, or go on training it", gin=True),
    "eval": Verb("t5x_like.cli.eval", "score checkpoints on generated text", gin=True),
    "infer": Verb(
        "t5x_like.cli.infer", "predict or score a task, a file or standard input", gin=True
    ),
    "chat": Verb("t5x_like.cli.chat", "try a model in the terminal", gin=True),
    "cache": Verb("t5x_like.cli.cache", "tokenise a task once, for all runs", gin=False),
    "convert": Verb(
        "t5x_like.cli.convert", "bring checkpoints from and to Hugging Face and T5X", gin=False
    ),
}

_OVERVIEW = """\
verbs:
{verbs}

t5x_like VERB --help says more. An example:
  t5x_like train --gin_file=gin/recipes/t5_tiny_cpu.gin --gin.MODEL_DIR=/tmp/run1
"""

_GIN_HELP = """\
gin:
  --gin.NAME=VALUE sets a macro, --gin.Class.parameter=VALUE anything else; the last one wins.
  Strings may be bare (--gin.MODEL_DIR=/data/run1) or quoted as gin quotes them; numbers, lists,
  dicts, True, None, @references and %macros are gin's. Gin files are looked for in the working
  directory, then in --gin_search_paths, then among the shipped ones (gin/recipes/...).

macros of the shipped recipes:
{macros}
"""

# What the file system says of a path that the user gave: no fault of the program.
_USER_ERRNOS = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
}
_INTERRUPTED = 130
_BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the verb of `argv` (default: the command line) and returns the exit code."""
    try:
        code = _main(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except UserError as error:
        return _fail(str(error).partition("\n")[0])  # gin adds lines to what passes through it
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output is gone; Python would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except OSError as error:
        if error.errno not in _USER_ERRNOS or error.filename is None:
            raise
        return _fail(f"Cannot use '{os.fsdecode(error.filename)}': {error.strerror}.")


def _fail(message: str) -> int:
    print(f"t5x_like: error: {message}", file=sys.stderr)
    return 2


def _main(argv: list[str]) -> int:
    for argument in argv:
        if any("\udc80" <= char <= "\udcff" for char in argument):
            raise UserError(f"Argument {os.fsencode(argument)!r} is not UTF-8.")
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(t5x_like.__version__)
        return 0
    name = argv[0]
    if name not in VERBS:
        near = did_you_mean(name, VERBS) or f" Verbs: {', '.join(VERBS)}."
        raise UserError(f"Unknown verb '{name}'.{near}")
    verb = VERBS[name]
    module = importlib.import_module(verb.module)
    parser = _parser(name, verb)
    module.add_arguments(parser)
    args = parser.parse_args(_join_gin_flags(argv[1:]))
    _set_verbosity(args.verbosity)
    return module.run(args)


def _overview() -> str:
    verbs = "\n".join(f"  {name:<8} {verb.help}" for name, verb in VERBS.items())
    return f"usage: t5x_like VERB [flags]\n\n{t5x_like.__doc__}\n\n{_OVERVIEW.format(verbs=verbs)}"


def _parser(name: str, verb: Verb) -> argparse.ArgumentParser:
    from t5x_like.config import macros

    parser = argparse.ArgumentParser(
        prog=f"t5x_like {name}",
        description=f"{verb.help[0].upper()}{verb.help[1:]}.",
        epilog=_GIN_HELP.format(macros=macros.table()) if verb.gin else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--verbosity",
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="what is logged (default: info)",
    )
    if verb.gin:
        _add_gin_arguments(parser)
    return parser


def _add_gin_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("gin")
    group.add_argument(
        "--gin_file", action="append", default=[], metavar="FILE", help="may be repeated"
    )
    group.add_argument(
        "--gin_bindings",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="as --gin.NAME=VALUE, or several gin lines",
    )
    group.add_argument(
        "--gin_search_paths",
        action="extend",
        type=lambda text: [path for path in text.split(",") if path],
        default=[],
        metavar="DIR,DIR",
        help="where gin files are looked for besides",
    )
    group.add_argument(
        "--dry_run",
        action="store_true",
        help="build everything, shapes only, print the plan, write nothing",
    )


def _join_gin_flags(arguments: Sequence[str]) -> list[str]:
    """`--gin.NAME=VALUE` -> `--gin_bindings=NAME=VALUE`, so that the order of both counts."""
    prefix = "--gin."
    return [
        f"--gin_bindings={arg.removeprefix(prefix)}" if arg.startswith(prefix) else arg
        for arg in arguments
    ]


def _set_verbosity(name: str) -> None:
    logging.basicConfig(
        level=name.upper(), format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"
    )
    # Chatty libraries speak one level later than we do.
    quiet = logging.DEBUG if name == "debug" else logging.WARNING
    for library in ("absl", "jax", "orbax", "tensorflow", "etils", "urllib3"):
        logging.getLogger(library).setLevel(quiet)
