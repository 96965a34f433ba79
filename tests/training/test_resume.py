"""A killed run, resumed, is the run that was not killed: bit by bit, data order included."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.conftest import QUICK_COMPILE
from tests.training.small import SMALL

DRIVER = Path(__file__).parent / "driver.py"
ROOT = Path(__file__).parents[2]
STEPS = 16
ARGUMENTS = [
    "train",
    *SMALL,
    f"--gin.TRAIN_STEPS={STEPS}",
    "--gin.DROPOUT_RATE=0.1",
    "--gin.CHECKPOINT_PERIOD=4",
    "--gin.EVAL_PERIOD=8",
    "--gin.EVAL_STEPS=1",
    "--gin.checkpoints.CheckpointConfig.keep=None",
]


def start(model_dir: Path, cache: Path, *extra: str, kill_at: int = -1) -> subprocess.Popen:
    environment = dict(os.environ, PYTHONPATH=str(ROOT), XLA_FLAGS=QUICK_COMPILE)
    return subprocess.Popen(
        [
            sys.executable,
            str(DRIVER),
            f"{model_dir}.hashes",
            str(kill_at),
            *ARGUMENTS,
            f"--gin.MODEL_DIR={model_dir}",
            f"--gin.CACHE_DIR={cache}",
            *extra,
        ],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    _, stderr = process.communicate(timeout=300)
    return process.returncode, stderr


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, kjv_cache) -> Path:
    model_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    code, stderr = finish(start(model_dir, kjv_cache))
    assert code == 0, stderr
    return model_dir


def logged(model_dir: Path, name: str = "train") -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock or the machine."""
    lines = (model_dir / name / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(("timing/", "memory/"))}
        for line in lines
    ]


def arrays(model_dir: Path, step: int) -> dict:
    handler = ocp.PyTreeCheckpointHandler()
    tree = handler.restore(
        model_dir / "checkpoints" / str(step) / "state",
        args=ocp.args.PyTreeRestore(
            restore_args=jax.tree.map(
                lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
                handler.metadata(model_dir / "checkpoints" / str(step) / "state").tree,
            )
        ),
    )
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): leaf for path, leaf in flat}


def assert_same_run(run: Path, reference: Path) -> None:
    got, want = arrays(run, STEPS), arrays(reference, STEPS)
    assert got.keys() == want.keys() and len(want) > 50
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)
    for name in ("train", "training_eval/kjv_span_corruption"):
        assert logged(run, name) == logged(reference, name)
    assert [line["step"] for line in logged(run)] == list(range(1, STEPS + 1))
    data = f"checkpoints/{STEPS}/data/metadata"
    assert json.loads((run / data).read_text()) == json.loads((reference / data).read_text())


def batches(model_dir: Path) -> list[str]:
    return Path(f"{model_dir}.hashes").read_text().splitlines()


def test_kill_and_resume_is_bit_exact(tmp_path, kjv_cache, uninterrupted):
    run = tmp_path / "run"
    code, stderr = finish(start(run, kjv_cache, kill_at=11))
    assert code == -signal.SIGKILL, stderr
    before = batches(run)
    assert before == batches(uninterrupted)[:10]
    saved = max(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit())
    assert saved in (4, 8)  # The save of step 8 is asynchronous: the kill may have beaten it.
    code, stderr = finish(start(run, kjv_cache))
    assert code == 0, stderr
    assert batches(run)[10:] == batches(uninterrupted)[saved:]
    assert_same_run(run, uninterrupted)


def test_sigterm_saves_exits_75_and_resumes_bit_exactly(tmp_path, kjv_cache, uninterrupted):
    run = tmp_path / "run"
    process = start(run, kjv_cache)
    log = run / "train" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (log.exists() and len(log.read_text().splitlines()) >= 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    code, stderr = finish(process)
    assert code == 75, stderr
    saved = max(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit())
    assert f"saved at step {saved}" in stderr and len(batches(run)) == saved < STEPS
    code, stderr = finish(start(run, kjv_cache))
    assert code == 0, stderr
    assert batches(run) == batches(uninterrupted)
    assert_same_run(run, uninterrupted)


def test_a_model_dir_of_another_model_is_refused(uninterrupted, kjv_cache):
    before = sorted(str(p) for p in uninterrupted.rglob("*"))
    code, stderr = finish(start(uninterrupted, kjv_cache, "--gin.mlp.MlpConfig.mlp_dim=96"))
    assert code == 2
    message = stderr.strip().splitlines()[-1]
    assert "is of another model" in message and "mlp/wi_0/kernel" in message
    assert "Traceback" not in stderr
    assert sorted(str(p) for p in uninterrupted.rglob("*")) == before


def test_data_of_another_batch_size_is_refused(uninterrupted, kjv_cache):
    code, stderr = finish(
        start(uninterrupted, kjv_cache, "--gin.BATCH_SIZE=4", "--gin.TRAIN_STEPS=20")
    )
    assert code == 2
    assert "batch_size" in stderr.strip().splitlines()[-1]
