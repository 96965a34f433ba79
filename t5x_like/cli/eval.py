"""`t5x_like eval`: evaluates checkpoints on generated text."""

from __future__ import annotations

import argparse

from t5x_like.cli import model_verbs

_SHORTHANDS = {
    "steps": ("CHECKPOINT_STEPS", "latest, all, or a list such as [1000,2000]"),
    "tasks": ("INFERENCE_EVAL_TASKS", "Task or Mixture, or a list of them"),
    "module": ("MIXTURE_OR_TASK_MODULE", "Python module that registers them"),
    "split": ("INFERENCE_EVAL_SPLIT", "of the Tasks"),
    "input": ("INPUT_FILE", 'JSON Lines with "inputs" and "targets", in place of Tasks'),
    "metrics": ("METRICS", "a list such as ['exact_match','bleu'], in place of the Tasks' own"),
}
_EPILOG = """\
examples:
  t5x_like eval /data/run1 --tasks=embedded_held_out --steps=all
  t5x_like eval /data/run1 --tasks=embedded_held_out --follow
  t5x_like eval /data/run1 --input=questions.jsonl --metrics="['squad']"

The metrics of each Task come to MODEL_DIR/inference_eval/<task>/metrics.jsonl, inputs, targets and
predictions to <step>.jsonl beside it. Steps that are there already are not done again.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `eval` besides the gin flags."""
    parser.epilog = f"{_EPILOG}\n{parser.epilog or ''}"
    model_verbs.add_arguments(parser, _SHORTHANDS)
    parser.add_argument(
        "--follow", action="store_true", help="wait for the checkpoints of a live run (FOLLOW)"
    )


def run(args: argparse.Namespace) -> int:
    """Evaluates; returns 0. Raises UserError: see `eval_run.execute`."""
    if args.follow:
        args.gin_bindings = [*args.gin_bindings, "FOLLOW=True"]
    config = model_verbs.parse(args, run_file="gin/runs/eval.gin", shorthands=_SHORTHANDS)
    from t5x_like.evaluation.eval_run import EvalRun, execute

    model_verbs.start(args)
    eval_run = config.build(EvalRun)
    if args.dry_run:
        print(config.operative_text())
        return 0
    return execute(eval_run)
