"""The smallest published size of every family resolves, and trains at a reduced width."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.models.base import ModelDef
from t5x_like.models.encoder_decoder import EncoderDecoderConfig
from t5x_like.models.encoder_only import EncoderOnlyConfig
from t5x_like.objectives.causal_lm import CausalLm
from t5x_like.objectives.masked_lm import MaskedLm
from t5x_like.objectives.seq2seq import Seq2Seq
from t5x_like.training.optimizers.adamw import AdamWConfig
from t5x_like.training.state import TrainState
from t5x_like.training.step import StepConfig, make_train_step

from .conftest import REPOSITORY
from .shrink import VOCAB_SIZE, shrunk

SMALLEST = {
    "bert": "tiny",
    "byt5": "small",
    "chinchilla": "70b",
    "deepseek_v2": "v2",
    "deepseek_v3": "v3",
    "falcon": "rw_1b",
    "flan_t5": "small",
    "gemma1": "2b",
    "gemma2": "2b",
    "gemma3": "270m",
    "gemini_like": "small",
    "glam": "0_1b_64e",
    "gopher": "44m",
    "gpt1": "117m",
    "gpt2": "small",
    "gpt3": "small",
    "gpt_j": "6b",
    "gpt_neox": "pythia_14m",
    "lamda": "2b",
    "llama1": "7b",
    "llama2": "7b",
    "llama3": "8b",
    "llama3_1": "8b",
    "llama3_2": "1b",
    "longt5": "tglobal_base",
    "mistral": "7b_v0_1",
    "mixtral": "8x7b",
    "mt5": "small",
    "palm": "8b",
    "phi3": "mini_128k",
    "qwen1_5": "0_5b",
    "qwen2_5": "0_5b",
    "qwen3": "0_6b",
    "qwen3_moe": "30b_a3b",
    "roberta": "base",
    "switch": "base_8",
    "t5_1_0": "small",
    "t5_1_1": "small",
    "ul2": "20b",
    "umt5": "small",
    "yi": "6b",
}
# Of another shape than the smallest size of the family.
ALSO = {"falcon": ["7b", "40b"], "gemma3": ["4b"], "gpt_neox": ["20b"], "longt5": ["local_base"]}
CASES = [f"{f}/{s}" for f, s in SMALLEST.items()] + [f"{f}/{s}" for f in ALSO for s in ALSO[f]]
LENGTH = 12


def test_every_family_is_here():
    families = {path.name for path in (REPOSITORY / "gin" / "models").iterdir()}
    assert families == SMALLEST.keys()
    for case in CASES:
        assert Path(REPOSITORY, "gin", "models", f"{case}.gin").is_file()


def batch_and_objective(config: Any) -> tuple[dict[str, np.ndarray], Any]:
    """Two rows, the second half as long as the first, to be learned by heart."""
    tokens = np.random.default_rng(0).integers(1, VOCAB_SIZE, (2, LENGTH)).astype(np.int32)
    tokens[1, LENGTH // 2 :] = 0
    weights = (tokens > 0).astype(np.float32)
    if isinstance(config, EncoderOnlyConfig):
        batch = {"input": tokens, "target": tokens, "loss": weights}
        return {_name("encoder", n): x for n, x in batch.items()}, MaskedLm()
    shifted = np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
    batch = {"input": shifted, "target": tokens, "loss": weights}
    decoder = {_name("decoder", n): x for n, x in batch.items()}
    if isinstance(config, EncoderDecoderConfig):
        return decoder | {"encoder_input_tokens": np.roll(tokens, 1, 1)[:, ::-1]}, Seq2Seq()
    return decoder, CausalLm()


def _name(side: str, what: str) -> str:
    return f"{side}_loss_weights" if what == "loss" else f"{side}_{what}_tokens"


@pytest.mark.parametrize("case", CASES)
def test_trains_three_steps(resolve, case):
    config = resolve(case)
    small = shrunk(config)
    # Nothing of the architecture got lost on the way down.
    assert _features(ModelDef(config)) == _features(ModelDef(small))
    losses = losses_of(small)
    assert losses == sorted(losses, reverse=True), losses
    assert np.log(VOCAB_SIZE) / 2 < losses[0] < 40


@functools.cache  # Some families differ by size alone.
def losses_of(config: Any) -> list[float]:
    model = ModelDef(config)
    batch, objective = batch_and_objective(config)
    optimizer = AdamWConfig().build(model.param_info)
    schedule = lambda step: jnp.float32(3e-3)  # noqa: E731
    step = jax.jit(make_train_step(model, objective, optimizer, schedule, StepConfig()))
    params = jax.jit(model.init)(jax.random.key(0))
    opt_state = optimizer.init(optimizer.split(params)[0])
    state = TrainState(step=jnp.int32(0), params=params, opt_state=opt_state)
    losses = []
    for _ in range(4):
        state, metrics = step(state, batch, jax.random.key(1))
        losses.append(float(metrics["loss"]))
    return losses


def _features(model: ModelDef) -> set[str]:
    """Names of the parameters of one layer of each kind."""
    paths = jax.tree_util.tree_leaves_with_path(model.param_info)
    names = {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths}
    return {re.sub(r"/(layers|(leading|group_\d)/block_\d+)/", "/layers/", name) for name in names}
