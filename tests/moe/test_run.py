"""A training run with experts writes what they do: scalars a group of layers, and a heat map."""

from __future__ import annotations

import gin
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from t5x_like.cli.main import main
from t5x_like.training.metrics import read_scalars

from ..cli.test_bad_input import EXPERTS_GIN, ROOT, SMALL, train

NAMES = ("load_balance_loss", "router_z_loss", "router_entropy", "router_confidence")
PATHS = ("encoder/layers", "decoder/layers")


def test_metrics_and_heat_map(tmp_path, kjv_cache, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    file = tmp_path / "experts.gin"
    file.write_text(EXPERTS_GIN)
    flags = ["--gin.TRAIN_STEPS=3", "--gin.LOG_PERIOD=1", "--gin.EVAL_PERIOD=2"]
    arguments = train(tmp_path / "run", kjv_cache, f"--gin_file={file}", *SMALL, *flags)
    try:
        assert main(arguments) == 0
    finally:
        gin.clear_config()
    lines = read_scalars(tmp_path / "run" / "train")
    assert [line["step"] for line in lines] == [1, 2, 3]
    for name in (*NAMES, "dropped_fraction", "max_expert_load"):
        assert all(f"moe/{path}/{name}" in lines[-1] for path in PATHS)
        assert f"moe/{name}" in lines[-1]
    assert lines[-1]["moe/max_expert_load"] >= 1
    assert not [name for name in lines[-1] if name.startswith("moe_loads")]
    events = EventAccumulator(str(tmp_path / "run" / "train")).Reload()
    images = events.Images("moe/encoder/layers/expert_load")
    # One layer of six experts, squares of 8 pixels; two steps so far, then three.
    assert [(i.step, i.width, i.height) for i in images] == [(2, 16, 48), (3, 24, 48)]
