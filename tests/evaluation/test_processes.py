"""Live runs and jobs of two processes: a follower, `eval`, and evaluation as training goes."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from t5x_like.cli.main import main
from t5x_like.evaluation import eval_run
from tests.evaluation.conftest import FINETUNE, PRETRAIN, SMALL, T5
from tests.evaluation.processes import finish, run_two, start

pytestmark = pytest.mark.slow


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_follower_of_a_live_trainer(tmp_path, tiny_cache, monkeypatch) -> None:
    monkeypatch.setattr(eval_run, "_POLL_SECONDS", 0.2)
    model_dir = tmp_path / "run"
    flags = [
        *(*T5, *PRETRAIN, *SMALL, "--gin.MIXTURE_OR_TASK_NAME=tiny_copy", "--gin.TRAIN_STEPS=6"),
        *("--gin.CHECKPOINT_PERIOD=2", f"--gin.MODEL_DIR={model_dir}"),
        f"--gin.CACHE_DIR={tiny_cache}",
    ]
    trainer = start("train", *flags)
    deadline = time.monotonic() + 200
    while not (model_dir / "config.gin").exists():
        assert time.monotonic() < deadline and trainer.poll() is None
        time.sleep(0.1)
    follow = ["--follow", "--steps=all", "--gin.FOLLOW_TIMEOUT=200.0", "--tasks=tiny_copy"]
    place = [f"--gin.CACHE_DIR={tiny_cache}", "--gin.MAX_NEW_TOKENS=3"]
    assert main(["eval", str(model_dir), *follow, *place]) == 0
    finish(trainer)
    logged = lines(model_dir / "inference_eval" / "tiny_copy" / "metrics.jsonl")
    assert [line["step"] for line in logged] == [0, 2, 4, 6]
    # Each was evaluated with its own parameters.
    assert len({line["bits_per_byte"] for line in logged}) == 4


def test_eval_by_two_processes(pretrained, tiny_cache, tmp_path) -> None:
    """Generated text and scores, of a Task and a Mixture, are those of one process."""
    flags = [
        *(str(pretrained), "--tasks=['tiny_mixture', 'tiny_choice']", "--gin.BATCH_SIZE=4"),
        *(f"--gin.CACHE_DIR={tiny_cache}", "--gin.MAX_NEW_TOKENS=4"),
    ]
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert main(["eval", *flags, f"--gin.EVAL_OUTPUT_DIR={alone}"]) == 0
    run_two("eval", *flags, f"--gin.EVAL_OUTPUT_DIR={together}")
    for task in ("tiny_copy", "tiny_shout", "tiny_choice"):
        ones, twos = (lines(directory / task / "4.jsonl") for directory in (alone, together))
        assert len(ones) == 12
        for one, two in zip(ones, twos, strict=True):
            for name in one:
                # Summed in another order, over a few float32 numbers.
                is_number = name in ("score", "log_prob")
                assert two[name] == (pytest.approx(one[name], abs=1e-4) if is_number else one[name])
    for task in ("tiny_copy", "tiny_shout", "tiny_choice", "tiny_mixture"):
        (one,), (two,) = (lines(d / task / "metrics.jsonl") for d in (alone, together))
        assert two == pytest.approx(one, rel=1e-5)


def test_evaluation_as_two_processes_train(pretrained, tiny_cache, tmp_path) -> None:
    flags = [
        *(*T5, *FINETUNE, *SMALL, "--gin.MIXTURE_OR_TASK_NAME=tiny_copy"),
        *("--gin.TRAIN_STEPS_RELATIVE=2", "--gin.EVAL_PERIOD=2", "--gin.DROPOUT_RATE=0.0"),
        *(f"--gin.INITIAL_CHECKPOINT_PATH={pretrained}", f"--gin.CACHE_DIR={tiny_cache}"),
        *("--gin.INFERENCE_EVAL_TASKS=['tiny_mixture', 'tiny_choice']", "--gin.KEEP_BEST=1"),
        *("--gin.BEST_METRIC=inference_eval/tiny_copy/bits_per_byte", "--gin.PATIENCE=5"),
    ]
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert main(["train", *flags, f"--gin.MODEL_DIR={alone}"]) == 0
    run_two("train", *flags, f"--gin.MODEL_DIR={together}")
    for task in ("tiny_copy", "tiny_shout", "tiny_choice", "tiny_mixture"):
        one, two = (lines(d / "inference_eval" / task / "metrics.jsonl") for d in (alone, together))
        assert [line["step"] for line in two] == [line["step"] for line in one] == [4, 6]
    one, two = (lines(d / "inference_eval" / "tiny_copy" / "6.jsonl") for d in (alone, together))
    # In the order of the Task; the parameters are those of one process up to float32.
    assert [line["inputs"] for line in two] == [line["inputs"] for line in one]
    scores = [line["score"] for line in one]
    assert [line["score"] for line in two] == pytest.approx(scores, rel=1e-4)
