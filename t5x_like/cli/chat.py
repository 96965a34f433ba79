"""`t5x_like chat`: a prompt in the terminal, to try a model."""

from __future__ import annotations

import argparse

from t5x_like.cli import model_verbs

_SHORTHANDS = {
    "format": ("CHAT_FORMAT", "chatml, gemma, llama2, llama3, phi3 or plain: a conversation"),
    "temperature": ("TEMPERATURE", "0 takes the likeliest token"),
    "max_new_tokens": ("MAX_NEW_TOKENS", "length of an answer"),
}
_EPILOG = """\
examples:
  t5x_like chat /data/run1
  t5x_like chat /data/llama3 --format=llama3 --temperature=0.7

Every line is a prompt of its own, or, with a format, a turn of a conversation. /reset forgets the
conversation, /quit or the end of input ends it.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `chat` besides the gin flags."""
    parser.epilog = f"{_EPILOG}\n{parser.epilog or ''}"
    model_verbs.add_arguments(parser, _SHORTHANDS)


def run(args: argparse.Namespace) -> int:
    """Chats until the end of input; returns 0. Raises UserError: see `chat_run.chat`."""
    args.gin_bindings = ["BATCH_SIZE=1", *args.gin_bindings]
    config = model_verbs.parse(args, run_file="gin/runs/infer.gin", shorthands=_SHORTHANDS)
    from t5x_like.evaluation.chat_run import chat
    from t5x_like.evaluation.infer_run import InferRun

    model_verbs.start(args)
    infer_run = config.build(InferRun)
    if args.dry_run:
        print(config.operative_text())
        return 0
    return chat(infer_run)
