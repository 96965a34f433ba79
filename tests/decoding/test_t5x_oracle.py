"""Greedy and beam search give T5X's own tokens and scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from t5x_like.decoding.beam_search import BeamSearch
from t5x_like.decoding.generate import Generator
from t5x_like.decoding.sampling import Sampling
from t5x_like.interop.t5x_legacy import load_t5x_checkpoint, to_stacked
from t5x_like.layers.attention import AttentionConfig
from t5x_like.layers.mlp import MlpConfig
from t5x_like.layers.positions import RelativePositionsConfig
from t5x_like.models.base import ModelDef
from t5x_like.models.block import BlockConfig
from t5x_like.models.encoder_decoder import EncoderDecoderConfig

LENGTH, EOS = 16, 1
CHECKPOINTS = {"step20": "legacy/checkpoint_20", "trained": "legacy_trained/checkpoint_1500"}


class Oracle:
    def __init__(self, directory: Path) -> None:
        block = BlockConfig(
            embed_dim=32,
            attention=AttentionConfig(num_heads=4, head_dim=8),
            mlp=MlpConfig(mlp_dim=64),
        )
        self.model = ModelDef(
            EncoderDecoderConfig(
                vocab_size=256,
                num_encoder_layers=2,
                num_decoder_layers=2,
                block=block,
                positions=RelativePositionsConfig(),
                dtype="float32",
            )
        )
        self.compiled: dict[Any, Generator] = {}
        directory = directory / "t5_1_1_tiny"
        self.numbers = np.load(directory / "decode.npz")
        loaded = {k: load_t5x_checkpoint(directory / path) for k, path in CHECKPOINTS.items()}
        self.params = {k: to_stacked(v.params, self.model.param_info) for k, v in loaded.items()}

    def generate(self, checkpoint: str, decoding: Any, eos: int) -> Any:
        batch = {"encoder_input_tokens": self.numbers[f"{checkpoint}/inputs/encoder_input_tokens"]}
        if (decoding, eos) not in self.compiled:
            self.compiled[decoding, eos] = Generator(self.model, decoding, eos_ids=(eos,))
        return self.compiled[decoding, eos](self.params[checkpoint], batch)

    def expected(self, checkpoint: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        prefix = f"{checkpoint}/{name}"
        return self.numbers[f"{prefix}/tokens"], self.numbers[f"{prefix}/scores"]


@pytest.fixture(scope="module")
def oracle(oracle_dir: Path) -> Oracle:
    return Oracle(oracle_dir)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize(
    ("beams", "alpha", "alternative_eos"),
    [(4, 0.6, False), (4, 0.0, False), (4, 2.0, False), (1, 0.6, False), (4, 0.6, True)],
)
def test_beam_search(oracle: Oracle, checkpoint, beams, alpha, alternative_eos):
    name = f"beam{beams}_alpha{alpha}" + "_eos_alt" * alternative_eos
    tokens, scores = oracle.expected(checkpoint, name)
    eos = int(oracle.numbers[f"{checkpoint}/alt_eos_id"]) if alternative_eos else EOS
    decoding = BeamSearch(max_new_tokens=LENGTH, num_beams=beams, alpha=alpha, num_returned=beams)
    generated = oracle.generate(checkpoint, decoding, eos)
    # T5X's best beam is its last.
    np.testing.assert_array_equal(generated.tokens, tokens[:, ::-1])
    np.testing.assert_allclose(generated.scores, scores[:, ::-1], rtol=1e-5)
    np.testing.assert_array_equal(generated.lengths, _lengths(tokens[:, ::-1], eos))


def _lengths(tokens: np.ndarray, eos: int) -> np.ndarray:
    """Up to the first end token; 0 where there is nothing at all."""
    ended = tokens == eos
    lengths = np.where(ended.any(-1), ended.argmax(-1) + 1, LENGTH)
    return np.where(tokens.any(-1), lengths, 0)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize(
    ("name", "decoding"),
    [
        ("greedy_temp0", Sampling(max_new_tokens=LENGTH)),
        ("greedy_topk1", Sampling(max_new_tokens=LENGTH, temperature=1.0, top_k=1)),
        ("greedy_topk1_eos_alt", Sampling(max_new_tokens=LENGTH, temperature=1.0, top_k=1)),
    ],
)
def test_greedy(oracle: Oracle, checkpoint, name, decoding):
    tokens, scores = oracle.expected(checkpoint, name)
    alternative = int(oracle.numbers[f"{checkpoint}/alt_eos_id"])
    eos = alternative if name.endswith("alt") else EOS
    generated = oracle.generate(checkpoint, decoding, eos)
    np.testing.assert_array_equal(generated.tokens[:, 0], tokens)
    np.testing.assert_allclose(generated.scores[:, 0], scores, rtol=1e-5)
    np.testing.assert_array_equal(generated.lengths[:, 0], _lengths(tokens, eos))


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_greedy_with_rescaled_probabilities(oracle: Oracle, checkpoint):
    """T5X's default scales the kept probability to 1: same tokens, score 0; ours are raw."""
    tokens, scores = oracle.expected(checkpoint, "greedy_topk1_rescaled")
    decoding = Sampling(max_new_tokens=LENGTH, temperature=1.0, top_k=1)
    generated = oracle.generate(checkpoint, decoding, EOS)
    np.testing.assert_array_equal(generated.tokens[:, 0], tokens)
    assert not scores.any()
    raw = oracle.expected(checkpoint, "greedy_topk1")[1]
    np.testing.assert_allclose(generated.scores[:, 0], raw, rtol=1e-5)
