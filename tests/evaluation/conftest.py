"""A tiny encoder-decoder and decoder over bytes, trained for a few steps by the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import gin
import pytest

from t5x_like.cli.main import main
from t5x_like.data import cache_job

ROOT = Path(__file__).parents[2]
# A top-level module: caches are made anew when a file of the package of their module changes.
MODULES = Path(__file__).parent / "modules"
sys.path.append(str(MODULES))
TASKS = "tiny_tasks"
SMALL = [
    "--gin.VOCAB_SIZE=384",
    "--gin.block.BlockConfig.embed_dim=32",
    "--gin.attention.AttentionConfig.num_heads=2",
    "--gin.mlp.MlpConfig.mlp_dim=32",
    f"--gin.MIXTURE_OR_TASK_MODULE={TASKS}",
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 24, 'targets': 16}",
    "--gin.BATCH_SIZE=8",
    "--gin.LOG_PERIOD=1",
    "--gin.EVAL_STEPS=1",
    "--gin.MAX_NEW_TOKENS=6",
    "--gin.dataset.DatasetConfig.pack=False",
]
T5 = [
    "--gin_file=gin/models/t5_1_1/tiny.gin",
    "--gin_file=gin/objectives/seq2seq.gin",
    "--gin_file=gin/parallel/data.gin",
    "--gin.attention.AttentionConfig.head_dim=16",
    "--gin.encoder_decoder.EncoderDecoderConfig.num_encoder_layers=1",
    "--gin.encoder_decoder.EncoderDecoderConfig.num_decoder_layers=1",
]
PRETRAIN = [
    "--gin_file=gin/optimizers/adafactor.gin",
    "--gin_file=gin/runs/pretrain.gin",
    "--gin_file=gin/decoding/greedy.gin",  # For MAX_NEW_TOKENS, which fine-tuning has.
]
# Loss on the answers of a decoder alone.
ANSWERS = """
from __gin__ import dynamic_registration
from t5x_like.data import instruct_converters
include 'gin/objectives/causal_lm.gin'
FEATURE_CONVERTER = @instruct_converters.TargetsLMConverter()
"""
FINETUNE = ["--gin_file=gin/runs/finetune.gin"]


@pytest.fixture(autouse=True)
def _from_the_checkout(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    yield
    gin.clear_config()


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CACHE_DIR of the Tasks of `tiny_tasks`."""
    directory = tmp_path_factory.mktemp("tiny_cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for name in ("tiny_mixture", "tiny_choice", "tiny_unscored", "tiny_streamed", "tiny_lm"):
            cache_job.cache(name, module=TASKS, cache_dir=directory, run_jobs=cache_job.local(1))
    return directory


@pytest.fixture(scope="session")
def train(tiny_cache: Path) -> Callable[..., int]:
    """Runs `t5x_like train` of the tiny encoder-decoder."""

    def run(model_dir: Path, kind: list[str], *flags: str, model: list[str] = T5) -> int:
        places = [f"--gin.MODEL_DIR={model_dir}", f"--gin.CACHE_DIR={tiny_cache}"]
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)
            try:
                return main(["train", *model, *kind, *SMALL, *places, *flags])
            finally:
                gin.clear_config()

    return run


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory, train) -> Path:
    """MODEL_DIR of a run of four steps with checkpoints at 0, 2 and 4."""
    model_dir = tmp_path_factory.mktemp("pretrained") / "run"
    flags = ("--gin.MIXTURE_OR_TASK_NAME=tiny_copy", "--gin.TRAIN_STEPS=4")
    assert train(model_dir, PRETRAIN, *flags, "--gin.CHECKPOINT_PERIOD=2") == 0
    return model_dir


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory, train) -> Path:
    """MODEL_DIR of a decoder that was trained on "tiny_copy" for two steps."""
    model_dir = tmp_path_factory.mktemp("decoder") / "run"
    answers = model_dir.with_name("answers.gin")
    answers.write_text(ANSWERS)
    model = [
        "--gin_file=gin/models/gpt2/tiny.gin",
        f"--gin_file={answers}",
        "--gin_file=gin/parallel/data.gin",
        "--gin.decoder_only.DecoderOnlyConfig.num_layers=1",
        "--gin.MAX_LENGTH=48",
    ]
    flags = ("--gin.MIXTURE_OR_TASK_NAME=tiny_copy", "--gin.TRAIN_STEPS=2")
    assert train(model_dir, PRETRAIN, *flags, model=model) == 0
    return model_dir
