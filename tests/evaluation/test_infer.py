"""`t5x_like infer` and `chat`: T5X's lines, order, restart after a kill, shards, bad input."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from t5x_like.cli.main import main
from t5x_like.evaluation import infer_run
from tests.conftest import QUICK_COMPILE
from tests.evaluation.conftest import MODULES, ROOT, TASKS

WORDS = ["ox", "a dove", "the lion is here", "fish", "bee and hen", "ant"]


class Killed(BaseException):
    """Stands for a signal: nothing handles it."""


@pytest.fixture
def infer(tiny_cache, pretrained, capsys):
    """Runs `t5x_like infer` in small batches; returns exit code, stdout, last line of stderr."""

    def run(*flags: str, model_dir: Path = pretrained) -> tuple[int, str, str]:
        fixed = [f"--gin.CACHE_DIR={tiny_cache}", "--gin.BATCH_SIZE=4", "--gin.MAX_NEW_TOKENS=5"]
        code = main(["infer", str(model_dir), *fixed, "--gin.CHUNK_BATCHES=1", *flags])
        said = capsys.readouterr()
        return code, said.out, (said.err.strip().splitlines() or [""])[-1]

    return run


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text("".join(f"say {word}\n" for word in WORDS * 3))
    return path


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- Tasks.


def test_a_task(infer, tmp_path) -> None:
    code, _, _ = infer("--task=tiny_copy", f"--gin.INFER_OUTPUT_DIR={tmp_path}")
    assert code == 0
    found = rows(tmp_path / "tiny_copy-predict.jsonl-00000-of-00001")
    assert [row["inputs"]["inputs_pretokenized"] for row in found[:2]] == ["say ox 0", "say ram 1"]
    assert found[0]["inputs"]["targets_pretokenized"] == "ox" and len(found) == 12
    assert all(row.keys() == {"inputs", "prediction"} for row in found)
    # Streamed through SeqIO, the same.
    code, _, _ = infer("--task=tiny_streamed", f"--gin.INFER_OUTPUT_DIR={tmp_path}")
    streamed = rows(tmp_path / "tiny_streamed-predict.jsonl-00000-of-00001")
    assert code == 0 and streamed == found


def test_scores_are_those_of_teacher_forcing(infer, tmp_path, pretrained) -> None:
    """The mean over all target tokens is the loss that training logged for the same checkpoint."""
    output = tmp_path / "scores.jsonl"
    code, _, _ = infer("--task=tiny_copy", "--mode=score", f"--output={output}")
    assert code == 0
    found = rows(output)
    logged = rows(pretrained / "training_eval" / "tiny_copy" / "metrics.jsonl")[-1]
    tokens = [len(row["inputs"]["targets_pretokenized"]) + 1 for row in found]
    # Training evaluated one batch, the first eight examples.
    mean = -sum(row["score"] for row in found[:8]) / sum(tokens[:8])
    assert mean == pytest.approx(logged["cross_ent_loss"], rel=1e-5)


# ---- Text, in order, shard by shard.


def test_order_and_shards(infer, text, tmp_path) -> None:
    whole = tmp_path / "whole.jsonl"
    assert infer(f"--input={text}", f"--output={whole}")[0] == 0
    expected = rows(whole)
    assert [row["inputs"]["inputs_pretokenized"] for row in expected] == [
        f"say {word}" for word in WORDS * 3
    ]
    # What a prompt gets does not depend on its neighbours.
    assert expected[:6] == expected[6:12] == expected[12:]
    for shard in (0, 1):
        flags = [f"--gin.SHARD_ID={shard}", "--gin.NUM_SHARDS=2"]
        assert infer(f"--input={text}", f"--gin.INFER_OUTPUT_DIR={tmp_path}", *flags)[0] == 0
        part = rows(tmp_path / f"words-predict.jsonl-0000{shard}-of-00002")
        assert part == expected[shard::2]


def test_standard_input(infer, monkeypatch) -> None:
    lines = b'{"inputs": "say ox"}\n{"inputs": "say hen"}\n'
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines)))
    code, out, _ = infer("--input=-", "--mode=predict_with_aux", "--gin.NUM_SAMPLES=2")
    found = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [row["inputs"]["inputs"] for row in found] == ["say ox", "say hen"]
    assert all(len(row["prediction"]) == len(row["aux"]["scores"]) == 2 for row in found)


# ---- A kill.


def test_a_killed_run_goes_on_and_ends_with_the_same_file(
    infer, text, tmp_path, monkeypatch
) -> None:
    drawn = [f"--input={text}", "--gin.TEMPERATURE=1.0"]
    assert infer(*drawn, f"--output={tmp_path / 'a' / 'out.jsonl'}")[0] == 0
    answer, calls = infer_run._Worker._answer, []

    def die_in_the_third_chunk(self, chunk):
        calls.append(len(chunk))
        if len(calls) == 3:
            raise Killed
        return answer(self, chunk)

    output = tmp_path / "b" / "out.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(infer_run._Worker, "_answer", die_in_the_third_chunk)
        with pytest.raises(Killed):
            infer(*drawn, f"--output={output}")
    assert not output.exists()
    with output.with_name("out.jsonl.partial").open("a") as file:
        file.write('{"inputs": torn')  # As a write that was cut short would leave it.
    with monkeypatch.context() as patch:
        patch.setattr(infer_run._Worker, "_answer", lambda s, c: calls.append("n") or answer(s, c))
        assert infer(*drawn, f"--output={output}")[0] == 0
    assert calls == [4, 4, 4, "n", "n", "n"]  # 18 prompts in chunks of 4; two were done.
    assert output.read_bytes() == (tmp_path / "a" / "out.jsonl").read_bytes()
    assert not output.with_name("out.jsonl.partial").exists()
    # Complete: nothing is done again; another request does not get this one's results.
    before = output.stat().st_mtime_ns
    assert infer(*drawn, f"--output={output}")[0] == 0 and output.stat().st_mtime_ns == before
    code, _, line = infer(*drawn, f"--output={output}", "--gin.RANDOM_SEED=1")
    assert code == 2 and "another model, input or setting" in line and str(output) in line


# ---- Bad input.


def test_refused_prompts_have_their_place(infer, tmp_path) -> None:
    path = tmp_path / "mixed.jsonl"
    path.write_text('{"inputs": "say ox"}\n[1]\n\n{"inputs": "say hen", "id": 3}\n')
    output = tmp_path / "out.jsonl"
    code, _, line = infer(f"--input={path}", f"--output={output}")
    assert code == 2 and "2 of 4 prompts were refused" in line and f"{path}:2" in line
    found = rows(output)
    assert ["error" in row for row in found] == [False, True, True, False]
    assert found[3]["inputs"] == {"inputs": "say hen", "id": 3} and "prediction" in found[3]
    # Started again it says the same, and does nothing.
    assert infer(f"--input={path}", f"--output={output}")[::2] == (2, line)


def test_long_prompts(infer, tmp_path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("say ox and much more\nsay ox\n")
    limit = [f"--input={path}", "--gin.MAX_INPUT_LENGTH=7"]
    code, out, line = infer(*limit, "--output=-")
    assert code == 2 and "21 tokens, and 7 are allowed" in line
    assert "prediction" in out.splitlines()[1]
    code, out, _ = infer(*limit, "--output=-", "--gin.TRUNCATE=end")
    first, second = (json.loads(row) for row in out.splitlines())
    assert code == 0 and first["prediction"] == second["prediction"]  # Both are "say ox".


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], ["INFER_TASK", "INPUT_FILE"]),
        (["--task=tiny_copy", "--input=-"], ["INFER_TASK", "INPUT_FILE", "not both"]),
        (["--input=/nowhere/x.txt"], ["/nowhere/x.txt", "INPUT_FILE"]),
        (["--task=tiny_copy", "--split=test"], ["'test'", "validation"]),
        (["--input=-", "--mode=predicts"], ["'predicts'", "'predict_with_aux'"]),
        (["--input=-", "--gin.TRUNCATE=left"], ["'left'", "'refuse', 'start', 'end'"]),
        (["--input=-", "--gin.SHARD_ID=2"], ["SHARD_ID 2", "NUM_SHARDS"]),
        (["--input=-", "--gin.CHECKPOINT_PATH=/nowhere"], ["/nowhere", "CHECKPOINT_PATH"]),
        (["--input=-", "--gin.VOCABULARY=/no.model"], ["/no.model"]),
        (["--input=-", "--gin.TEMPERATURE=-1.0"], ["temperature"]),
        (["--input=-", "--gin.NUM_SAMPLES=0"], ["num_samples"]),
        (["--input=-", "--gin.sampling.Sampling.top_p=2.0"], ["top_p"]),
    ],
)
def test_refused(flags, says, infer, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"say ox\n")))
    code, out, line = infer(*flags)
    assert code == 2 and out == "" and line.startswith("t5x_like: error: ")
    assert [text for text in says if text not in line] == [], line


def test_model_dir_of_nothing(infer, tmp_path, capsys) -> None:
    code, _, line = infer("--input=-", model_dir=tmp_path)
    assert code == 2 and str(tmp_path) in line and "config.gin" in line
    assert main(["infer", "--input=-"]) == 2
    assert "Which model?" in capsys.readouterr().err


# ---- Hosts.


@pytest.mark.slow
def test_two_processes_give_the_file_of_one(infer, text, tmp_path, pretrained, tiny_cache) -> None:
    alone, together = tmp_path / "alone.jsonl", tmp_path / "together.jsonl"
    assert infer(f"--input={text}", f"--output={alone}")[0] == 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "t5x_like", "infer", str(pretrained), f"--input={text}"),
        *(f"--output={together}", f"--gin.CACHE_DIR={tiny_cache}", "--gin.BATCH_SIZE=4"),
        *("--gin.MAX_NEW_TOKENS=5", "--gin.CHUNK_BATCHES=1", "--num_processes=2"),
        f"--coordinator_address=127.0.0.1:{port}",
    ]
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{MODULES}",
        "XLA_FLAGS": QUICK_COMPILE,
    }
    running = [
        subprocess.Popen(
            [*command, f"--process_id={i}"], env=environment, cwd=ROOT, stderr=subprocess.PIPE
        )
        for i in range(2)
    ]
    for process in running:
        _, stderr = process.communicate(timeout=200)
        assert process.returncode == 0, stderr.decode()[-2000:]
    assert together.read_bytes() == alone.read_bytes()


# ---- Chat.


def chat(monkeypatch, capsys, lines: str, *flags: str) -> tuple[int, list[str]]:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    code = main(["chat", *flags, "--max_new_tokens=4"])
    return code, capsys.readouterr().out.splitlines()


def test_chat(pretrained, decoder, monkeypatch, capsys) -> None:
    lines = "say ox\n\nsay ox\n/quit\nsay hen\n"
    code, (hello, *answers) = chat(monkeypatch, capsys, lines, str(pretrained))
    assert code == 0 and "step 4" in hello
    assert len(answers) == 2 and answers[0] == answers[1]
    # In a conversation what was said before counts, up to the model's limit.
    lines = "hi\n/reset\nhi\n" + "a long turn of a conversation that will not fit\nhi\n"
    code, (_, *answers) = chat(monkeypatch, capsys, lines, str(decoder), "--format=plain")
    assert code == 0 and answers[0] == answers[1]
    assert any("more than the 48 positions" in answer for answer in answers[2:])
    code, _ = chat(monkeypatch, capsys, "", str(decoder), "--format=plane")
    assert code == 2


def test_tasks_module_is_that_of_training(pretrained) -> None:
    """`infer` needs no --module: it is in config.gin."""
    assert TASKS in (pretrained / "config.gin").read_text()
