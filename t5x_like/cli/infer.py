"""`t5x_like infer`: predictions or scores for a Task, a file or standard input."""

from __future__ import annotations

import argparse

from t5x_like.cli import model_verbs

_SHORTHANDS = {
    "input": ("INPUT_FILE", "text, a prompt a line; .jsonl with inputs and targets; - for stdin"),
    "task": ("INFER_TASK", "SeqIO Task or Mixture in place of a file"),
    "module": ("MIXTURE_OR_TASK_MODULE", "Python module that registers it"),
    "split": ("INFER_SPLIT", "of the Task"),
    "output": (
        "OUTPUT_FILE",
        "default: MODEL_DIR/inference/<name>-predict.jsonl-...; - for stdout",
    ),
    "mode": ("MODE", "predict, predict_with_aux or score"),
}
_EPILOG = """\
examples:
  t5x_like infer /data/run1 --input=prompts.txt
  echo "In the beginning" | t5x_like infer /data/run1 --input=- --gin.MAX_NEW_TOKENS=20
  t5x_like infer /data/run1 --task=embedded_book --split=validation --mode=score
  t5x_like infer /data/llama --input=questions.jsonl --gin.NUM_SAMPLES=4 --gin.TEMPERATURE=0.8

A run that was killed goes on where it was when it is started again.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `infer` besides the gin flags."""
    parser.epilog = f"{_EPILOG}\n{parser.epilog or ''}"
    model_verbs.add_arguments(parser, _SHORTHANDS)


def run(args: argparse.Namespace) -> int:
    """Runs inference; returns 0. Raises UserError: see `infer_run.execute`."""
    config = model_verbs.parse(args, run_file="gin/runs/infer.gin", shorthands=_SHORTHANDS)
    from t5x_like.evaluation.infer_run import InferRun, execute

    model_verbs.start(args)
    infer_run = config.build(InferRun)
    if args.dry_run:
        print(config.operative_text())
        return 0
    return execute(infer_run)
