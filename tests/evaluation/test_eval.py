"""`t5x_like eval`: several checkpoints, going on where it was, following, files, bad input."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path

import pytest

from t5x_like.cli.main import main
from t5x_like.evaluation import eval_run


@pytest.fixture
def model_dir(pretrained, tmp_path) -> Path:
    """A copy, whose files the test may change."""
    return Path(shutil.copytree(pretrained, tmp_path / "run"))


@pytest.fixture
def evaluate(tiny_cache, capsys):
    """Runs `t5x_like eval`; returns (exit code, stdout, last line of stderr)."""

    def run(model_dir: Path, *flags: str) -> tuple[int, str, str]:
        fixed = [f"--gin.CACHE_DIR={tiny_cache}", "--gin.MAX_NEW_TOKENS=4"]
        code = main(["eval", str(model_dir), *fixed, *flags])
        said = capsys.readouterr()
        return code, said.out, (said.err.strip().splitlines() or [""])[-1]

    return run


def steps(model_dir: Path, task: str) -> list[int]:
    path = model_dir / "inference_eval" / task / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_checkpoints_one_several_all(model_dir, evaluate) -> None:
    code, out, _ = evaluate(model_dir, "--tasks=tiny_copy")
    assert code == 0 and "step 4  tiny_copy: accuracy" in out
    assert evaluate(model_dir, "--tasks=tiny_copy", "--steps=[0]")[0] == 0
    assert steps(model_dir, "tiny_copy") == [4, 0]
    # What is there is not done again, unless another Task is asked for, too.
    assert evaluate(model_dir, "--tasks=tiny_copy", "--steps=all")[0] == 0
    assert steps(model_dir, "tiny_copy") == [4, 0, 2]
    code, out, _ = evaluate(model_dir, "--tasks=tiny_copy", "--steps=all")
    assert code == 0 and "Nothing to do" in out
    for step in (0, 2, 4):
        assert (model_dir / "inference_eval" / "tiny_copy" / f"{step}.jsonl").exists()


def test_metrics_by_name_in_place_of_the_tasks_own(model_dir, evaluate) -> None:
    flags = ["--tasks=tiny_unscored", "--metrics=['edit_distance', 'perplexity']"]
    code, out, _ = evaluate(model_dir, *flags)
    assert code == 0 and "edit_distance" in out and "perplexity" in out


def test_a_follower_of_a_live_run(model_dir, evaluate, monkeypatch) -> None:
    """Checkpoints appear while it waits; the run's last step, 4, ends it."""
    monkeypatch.setattr(eval_run, "_POLL_SECONDS", 0.05)
    saved = model_dir / "checkpoints"
    later = model_dir.with_name("later")
    later.mkdir()
    for step in (2, 4):
        (saved / str(step)).rename(later / str(step))

    def save() -> None:
        for step in (2, 4):
            while step - 2 not in evaluated():
                time.sleep(0.05)
            (later / str(step)).rename(saved / str(step))

    def evaluated() -> list[int]:
        path = model_dir / "inference_eval" / "tiny_copy" / "metrics.jsonl"
        return steps(model_dir, "tiny_copy") if path.exists() else []

    writer = threading.Thread(target=save, daemon=True)
    writer.start()
    flags = ["--tasks=tiny_copy", "--follow", "--steps=all", "--gin.FOLLOW_TIMEOUT=60.0"]
    assert evaluate(model_dir, *flags)[0] == 0
    writer.join(timeout=5)
    assert steps(model_dir, "tiny_copy") == [0, 2, 4]


def test_a_follower_gives_up(model_dir, evaluate, monkeypatch) -> None:
    monkeypatch.setattr(eval_run, "_POLL_SECONDS", 0.05)
    shutil.rmtree(model_dir / "checkpoints" / "4")
    start = time.monotonic()
    flags = ["--tasks=tiny_copy", "--follow", "--gin.FOLLOW_TIMEOUT=0.2"]
    assert evaluate(model_dir, *flags)[0] == 0
    assert steps(model_dir, "tiny_copy") == [2] and time.monotonic() - start < 60


def test_a_file(model_dir, evaluate, tmp_path) -> None:
    path = tmp_path / "asked.jsonl"
    path.write_text(
        '{"inputs": "say ox", "targets": "ox"}\n'
        '"text"\n'
        '{"inputs": "say hen"}\n'
        '{"inputs": "say bee", "targets": "bee"}\n'
    )
    flags = [f"--input={path}", "--metrics=['squad','bits_per_byte']"]
    code, out, line = evaluate(model_dir, *flags)
    assert code == 2 and "2 of 4 lines" in line and f"{path}:2: a JSON str" in line
    assert "refused 2" in out
    written = (model_dir / "inference_eval" / "asked" / "4.jsonl").read_text().splitlines()
    assert [json.loads(row)["targets"] for row in written] == ["ox", "bee"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--tasks=tiny_copy", "--metrics=['blue']"], ["'blue'", "Did you mean 'bleu'"]),
        (["--tasks=tiny_unscored"], ["tiny_unscored", "has metrics", "METRICS"]),
        (["--tasks=()"], ["INFERENCE_EVAL_TASKS"]),
        (["--tasks=tiny_copy", "--steps=[3]"], ["step 3", "0, 2, 4"]),
        (["--tasks=tiny_copy", "--steps=last"], ["'last'", "CHECKPOINT_STEPS"]),
        (["--tasks=tiny_copy", "--split=test"], ["'test'"]),
        (["--input=/nowhere.jsonl", "--metrics=['squad']"], ["/nowhere.jsonl"]),
        (["--input=/nowhere.jsonl"], ["METRICS"]),
        (
            ["--tasks=tiny_copy", "--steps=all", "--gin.CHECKPOINT_PATH=/x"],
            ["CHECKPOINT_PATH", "CHECKPOINT_STEPS"],
        ),
        (
            ["--tasks=tiny_copy", "--gin.block.BlockConfig.embed_dim=16"],
            ["of another model", "decoder/decoder_norm/scale is (32,) there"],
        ),
    ],
)
def test_refused(flags, says, model_dir, evaluate) -> None:
    code, out, line = evaluate(model_dir, *flags)
    assert code == 2 and out == "" and line.startswith("t5x_like: error: ")
    assert [text for text in says if text not in line] == [], line
    assert not (model_dir / "inference_eval").exists()


def test_a_file_without_a_good_line(model_dir, evaluate, tmp_path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("[]\n")
    code, _, line = evaluate(model_dir, f"--input={path}", "--metrics=['squad']")
    assert code == 2 and "nothing that can be evaluated" in line and f"{path}:1" in line
