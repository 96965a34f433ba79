"""A training run with experts starts as copies of a dense one, and writes what they do: scalars a
group of layers, and a heat map."""

from __future__ import annotations

from pathlib import Path

import gin
import numpy as np
import pytest
from etils import epath
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from t5x_like.cli.main import main
from t5x_like.interop.arrays import open_orbax_tree
from t5x_like.training.metrics import read_scalars

from ..cli.test_bad_input import EXPERTS_GIN, ROOT, SMALL, train

NAMES = ("load_balance_loss", "router_z_loss", "router_entropy", "router_confidence")
PATHS = ("encoder/layers", "decoder/layers")


STEPS = (
    *("--gin.LOG_PERIOD=1", "--gin.EVAL_PERIOD=2"),
    "--gin.adafactor.AdafactorConfig.min_dim_size_to_factor=16",
)


def run_of(directory: Path, cache: Path, *flags: str) -> Path:
    try:
        assert main(train(directory, cache, *SMALL[:-1], *STEPS, *flags)) == 0
    finally:
        gin.clear_config()
    return directory


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, kjv_cache) -> Path:
    """Two steps of the dense twin."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        directory = tmp_path_factory.mktemp("dense") / "run"
        return run_of(directory, kjv_cache, "--gin.TRAIN_STEPS=2")


@pytest.fixture(scope="module")
def upcycled(tmp_path_factory: pytest.TempPathFactory, kjv_cache, dense) -> Path:
    """Three more steps with experts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        directory = tmp_path_factory.mktemp("upcycled") / "run"
        file = directory.with_name("experts.gin")
        file.write_text(EXPERTS_GIN)
        flags = ["--gin.TRAIN_STEPS=5", f"--gin.INITIAL_CHECKPOINT_PATH={dense}"]
        flags += ["--gin.routers.TopKRouter.renormalize=True"]
        return run_of(directory, kjv_cache, f"--gin_file={file}", "--gin.UPCYCLE=state", *flags)


def test_metrics_and_heat_map(upcycled):
    lines = read_scalars(upcycled / "train")
    assert [line["step"] for line in lines] == [3, 4, 5]
    for name in (*NAMES, "dropped_fraction", "max_expert_load"):
        assert all(f"moe/{path}/{name}" in lines[-1] for path in PATHS)
        assert f"moe/{name}" in lines[-1]
    assert lines[-1]["moe/max_expert_load"] >= 1
    assert not [name for name in lines[-1] if name.startswith("moe_loads")]
    events = EventAccumulator(str(upcycled / "train")).Reload()
    images = events.Images("moe/encoder/layers/expert_load")
    # One layer of six experts, squares of 8 pixels; two steps so far, then three.
    assert [(i.step, i.width, i.height) for i in images] == [(4, 16, 48), (5, 24, 48)]


def test_starts_as_the_dense_model(dense, upcycled):
    """Two experts whose weights add up to one, and which are the same: the same model."""
    task = Path("training_eval/kjv_span_corruption")
    (before,) = [line for line in read_scalars(dense / task) if line["step"] == 2]
    first = read_scalars(upcycled / task)[0]
    assert first["step"] == 2
    assert first["cross_ent_loss"] == pytest.approx(before["cross_ent_loss"], rel=1e-5)


def test_every_expert_and_its_optimizer_state_is_a_copy(dense, upcycled):
    there, here = (
        open_orbax_tree(epath.Path(run) / "checkpoints" / "2" / "state")
        for run in (dense, upcycled)
    )
    fresh, copied = set(), 0
    for name, source in here.items():
        if "/mlp/router/" in name:
            fresh.add(name.split("/")[0])
            continue
        value, of_dense = source.read(), there[name.replace("mlp/experts/", "mlp/")].read()
        if "mlp/experts/" in name:
            copied += 1
            of_dense = np.repeat(of_dense[:, None], 6, axis=1)
        np.testing.assert_array_equal(value, of_dense, err_msg=name)
    # Kernels of two stacks, three each; of every kernel Adafactor has moments of rows, of columns.
    assert fresh == {"params", "opt_state"} and copied == 6 * 3


def test_t5x_has_no_experts(upcycled, tmp_path, capsys):
    flags = [f"--from={upcycled}", f"--to={tmp_path / 'out'}", "--format=t5x"]
    assert main(["convert", *flags]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "T5X has no model with decoder/layers/mlp/experts/wi_0/kernel" in line
    assert "and 4 more: keep it in the format of this system" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--gin.UPCYCLE=all"], ["'all'", "'params', 'state'"]),
        (["--gin.UPCYCLE=params"], ["goes with INITIAL_CHECKPOINT_PATH, which is None"]),
        (["--gin.UPCYCLE=params", "FROM"], ["no block of the model has experts"]),
        (
            ["--gin.UPCYCLE=params", "FROM", "EXPERTS", "--gin.mlp.MlpConfig.mlp_dim=48"],
            ["is of another model", "48) in the model"],
        ),
    ],
)
def test_refused(flags, says, dense, tmp_path, kjv_cache, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    file = tmp_path / "experts.gin"
    file.write_text(EXPERTS_GIN)
    meant = {"FROM": f"--gin.INITIAL_CHECKPOINT_PATH={dense}", "EXPERTS": f"--gin_file={file}"}
    given = [meant.get(flag, flag) for flag in flags]
    try:
        assert main(train(tmp_path / "run", kjv_cache, *SMALL, *given)) == 2
    finally:
        gin.clear_config()
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(part in line for part in says), line
    assert not (tmp_path / "run").exists()
