"""Real processes over loopback: the same losses as one process, resumable by another number."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import QUICK_COMPILE
from tests.training.small import SMALL

ROOT = Path(__file__).parents[2]
DEVICES = 4


def launch(model_dir: Path, cache: Path, *, processes: int, steps: int) -> list[list[str]]:
    """Trains with 4 simulated devices in all; returns each process's batch hashes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running, hashes = [], []
    for index in range(processes):
        hashes.append(model_dir.parent / f"{model_dir.name}-{processes}-{steps}-{index}.hashes")
        environment = dict(
            os.environ,
            PYTHONPATH=str(ROOT),
            JAX_PLATFORMS="cpu",
            XLA_FLAGS=f"{QUICK_COMPILE} "
            f"--xla_force_host_platform_device_count={DEVICES // processes}",
        )
        if processes > 1:
            environment |= {
                "COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "NUM_PROCESSES": str(processes),
                "PROCESS_ID": str(index),
            }
        command = [
            *(sys.executable, str(ROOT / "tests/training/driver.py"), str(hashes[-1]), "-1"),
            *("train", *SMALL, f"--gin.MODEL_DIR={model_dir}"),
            *(f"--gin.CACHE_DIR={cache}", f"--gin.TRAIN_STEPS={steps}", "--gin.EVAL_STEPS=1"),
            "--gin.MESH={'data': 2, 'fsdp': 2}",
        ]
        running.append(
            subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        )
    for process in running:
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr[-3000:]
    return [path.read_text().splitlines() for path in hashes]


def losses(model_dir: Path, name: str = "train") -> dict[int, float]:
    lines = (model_dir / name / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line["loss"] for line in map(json.loads, lines)}


@pytest.mark.slow
def test_two_processes_train_what_one_does_and_one_goes_on_from_their_checkpoint(
    tmp_path, kjv_cache
):
    one = launch(tmp_path / "one", kjv_cache, processes=1, steps=6)
    two = launch(tmp_path / "two", kjv_cache, processes=2, steps=3)
    assert len(one[0]) == 6 and len(two[0]) == len(two[1]) == 3
    assert two[0] != two[1]  # Each reads its own rows only.
    launch(tmp_path / "two", kjv_cache, processes=1, steps=6)
    want, got = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert got.keys() == want.keys() == set(range(1, 7))
    for step, loss in want.items():
        assert got[step] == pytest.approx(loss, rel=1e-5), step
    evals = "training_eval/kjv_span_corruption"
    want, got = losses(tmp_path / "one", evals), losses(tmp_path / "two", evals)
    assert got[6] == pytest.approx(want[6], rel=1e-5)
