"""INITIAL_CHECKPOINT_PATH and model.gin of a converted model, through the command line."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from t5x_like.cli.main import main
from t5x_like.config import write_gin
from t5x_like.interop.initial import load_initial_params
from t5x_like.models.base import ModelDef
from tests.training.test_from_t5x import params, text  # noqa: F401

from .test_t5x_export import MODEL


@pytest.mark.parametrize("kind", ["hf", "own"])
def test_training_goes_on(kind, text, oracle_dir, tmp_path):  # noqa: F811
    (tmp_path / "oracle.gin").write_text(MODEL)
    source = oracle_dir / "t5_1_1_tiny/legacy_trained"
    flags = [f"--from={source}", f"--model={tmp_path / 'oracle.gin'}"]
    assert main(["convert", *flags, f"--to={tmp_path / 'hf'}", "--format=hf"]) == 0
    own = [f"--from={tmp_path / 'hf'}", f"--to={tmp_path / 'own'}"]
    assert main(["convert", *own]) == 0
    code = main(
        [
            "train",
            "--gin_file=gin/recipes/t5_tiny_cpu.gin",
            f"--gin_file={tmp_path / 'own/model.gin'}",
            "--gin.TASK_FEATURE_LENGTHS={'inputs': 24, 'targets': 16}",
            "--gin.BATCH_SIZE=8",
            "--gin.EVAL_STEPS=1",
            "--gin.LOG_PERIOD=1",
            "--gin.MIXTURE_OR_TASK_MODULE=tasks.user",
            "--gin.MIXTURE_OR_TASK_NAME=text_span_corruption",
            "--gin.DROPOUT_RATE=0.0",
            *text,
            f"--gin.MODEL_DIR={tmp_path / 'run'}",
            "--gin.TRAIN_STEPS=2",
            f"--gin.INITIAL_CHECKPOINT_PATH={tmp_path / kind}",
        ]
    )
    assert code == 0
    lines = (tmp_path / "run/train/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    started = params(tmp_path / "run", 0)
    info = ModelDef(write_gin.build_model(tmp_path / "own/model.gin")).param_info
    jax.tree.map(np.testing.assert_array_equal, started, load_initial_params(source, info))
