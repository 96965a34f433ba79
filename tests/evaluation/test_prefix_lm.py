"""A prefix language model reads its prompt both ways, in `infer` as in training."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from t5x_like.cli.main import main
from t5x_like.decoding.sampling import Sampling
from t5x_like.evaluation.predictor import Predictor, Prompt
from tests.evaluation.conftest import PRETRAIN
from tests.evaluation.test_predictor import serve

MODEL = [
    "--gin_file=gin/models/gpt2/tiny.gin",
    "--gin_file=gin/objectives/prefix_lm.gin",
    "--gin_file=gin/parallel/data.gin",
    "--gin.decoder_only.DecoderOnlyConfig.num_layers=2",
    "--gin.MAX_LENGTH=48",
]


@pytest.fixture(scope="module")
def prefix_lm(tmp_path_factory, train) -> Path:
    model_dir = tmp_path_factory.mktemp("prefix_lm") / "run"
    flags = ("--gin.MIXTURE_OR_TASK_NAME=tiny_copy", "--gin.TRAIN_STEPS=2")
    assert train(model_dir, PRETRAIN, *flags, model=MODEL) == 0
    return model_dir


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def infer(model_dir: Path, cache: Path, output: Path, *flags: str) -> list[dict]:
    places = [f"--gin.CACHE_DIR={cache}", f"--output={output}", "--task=tiny_copy"]
    assert main(["infer", str(model_dir), *places, *flags]) == 0
    return rows(output)


def test_scores_are_those_of_training(prefix_lm, tiny_cache, tmp_path) -> None:
    """The mean over targets is the loss that training logged, with its mask on the inputs."""
    found = infer(prefix_lm, tiny_cache, tmp_path / "scores", "--mode=score")
    tokens = [len(row["inputs"]["targets_pretokenized"]) + 1 for row in found]
    logged = rows(prefix_lm / "training_eval" / "tiny_copy" / "metrics.jsonl")[-1]
    # Training evaluated one batch, the first eight examples.
    mean = -sum(row["score"] for row in found[:8]) / sum(tokens[:8])
    assert mean == pytest.approx(logged["cross_ent_loss"], rel=1e-5)


def test_generation_sees_the_prompt_both_ways(prefix_lm, tiny_cache, tmp_path) -> None:
    written = infer(prefix_lm, tiny_cache, tmp_path / "text", "--gin.MAX_NEW_TOKENS=4")
    served, predictor, params = serve(prefix_lm)
    prompts = [
        Prompt(index=i, inputs=[0, *(b + 3 for b in text.encode()), 1])
        for i, text in enumerate(row["inputs"]["inputs_pretokenized"] for row in written)
    ]
    settings = {"decoding": Sampling(max_new_tokens=4), "eos_ids": (1,)}
    generated = predictor.generate(params, prompts, **settings)
    texts = [served.codec.decode(generation.tokens[0]) for generation in generated]
    assert texts == [row["prediction"] for row in written]
    # What it says of its own text, and what teacher forcing says, which knows the mask.
    asked = [
        dataclasses.replace(prompt, targets=generation.tokens[0])
        for prompt, generation in zip(prompts, generated, strict=True)
    ]
    scores = [score.log_likelihood for score in predictor.score(params, asked)]
    said = [generation.scores[0] for generation in generated]
    np.testing.assert_allclose(said, scores, atol=1e-5)
    # Seen causally, the same model says something else: the second layer meets other inputs.
    causal = Predictor(served._model_def, mesh=served._mesh, rules=served._run.rules, batch_size=8)
    other = [score.log_likelihood for score in causal.score(params, asked)]
    assert np.abs(np.subtract(said, other)).max() > 1e-3
