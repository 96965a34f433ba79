"""Every objective file completes a model to a run, with the converter that its name says."""

from __future__ import annotations

from pathlib import Path

import pytest

from t5x_like.config import gin_config
from t5x_like.training.run import TrainRun

ROOT = Path(__file__).parents[2]
RUN = ["gin/optimizers/adamw.gin", "gin/parallel/data.gin", "gin/runs/pretrain.gin"]
MACROS = [
    "MODEL_DIR=/tmp/unused",
    "MIXTURE_OR_TASK_NAME=task",
    "TASK_FEATURE_LENGTHS={'inputs': 32, 'targets': 16, 'targets_weights': 16}",
    "TRAIN_STEPS=10000",
]
# Objective file: (model, feature converter, objective).
EXPECTED = {
    "causal_lm": ("gpt2", "LMConverter", "CausalLm"),
    "causal_lm_chat": ("gpt2", "WeightedLMConverter", "CausalLm"),
    "causal_lm_targets": ("gpt2", "TargetsLMConverter", "CausalLm"),
    "classification": ("bert", "ClassificationConverter", "Classification"),
    "masked_lm": ("bert", "MaskedLmConverter", "MaskedLm"),
    "masked_lm_next_sentence": ("bert", "NextSentenceConverter", "MaskedLm"),
    "multi_token_lm": ("gpt2", "LMConverter", "MultiTokenLm"),
    "prefix_lm": ("gpt2", "PrefixLMConverter", "CausalLm"),
    "seq2seq": ("t5_1_1", "EncDecConverter", "Seq2Seq"),
    "seq2seq_public_t5": ("t5_1_1", "EncDecConverter", "Seq2Seq"),
}


def test_every_objective_is_expected() -> None:
    assert {path.stem for path in ROOT.glob("gin/objectives/*.gin")} == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_objective(name: str) -> None:
    model, converter, objective = EXPECTED[name]
    files = [f"gin/models/{model}/tiny.gin", f"gin/objectives/{name}.gin", *RUN]
    classes = ["NUM_CLASSES=2"] if name == "classification" else []
    run = gin_config.parse(files, [*MACROS, *classes]).build(TrainRun)
    assert type(run.train_dataset.feature_converter).__name__ == converter
    assert type(run.objective).__name__ == objective
