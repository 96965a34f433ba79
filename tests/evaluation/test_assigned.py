"""Assignment maps over checkpoints of other systems; names on both sides are ours."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from flax import traverse_util

from t5x_like.config import write_gin
from t5x_like.interop import assigned, initial
from t5x_like.interop.hugging_face.checkpoint import HuggingFaceCheckpoint
from t5x_like.models.base import ModelDef
from t5x_like.models.encoder_decoder import EncoderDecoderConfig


def tiny(vocab_size: int, *, heads: int, mlp_dim: int) -> EncoderDecoderConfig:
    """A T5 1.1 with two layers a side, embed_dim 32 and heads of 8."""
    config = write_gin.build_model("gin/models/t5_1_1/tiny.gin")
    attention = dataclasses.replace(config.block.attention, num_heads=heads, head_dim=8)
    mlp = dataclasses.replace(config.block.mlp, mlp_dim=mlp_dim)
    block = dataclasses.replace(config.block, embed_dim=32, attention=attention, mlp=mlp)
    layers = {"num_encoder_layers": 2, "num_decoder_layers": 2}
    return dataclasses.replace(config, vocab_size=vocab_size, block=block, **layers)


def check(path, config: EncoderDecoderConfig) -> None:
    """A model of fewer decoder layers takes all but these."""
    fewer = dataclasses.replace(config, num_decoder_layers=1)
    everything = initial.load_initial_params(path, ModelDef(config).param_info)
    expected = traverse_util.flatten_dict(everything, sep="/")
    rules = [("decoder/layers/.*", None)]
    taken = assigned.load_assigned(path, ModelDef(fewer).param_info, assignment_map=rules)
    found = traverse_util.flatten_dict(taken, sep="/")
    assert found.keys() == {n for n in expected if not n.startswith("decoder/layers/")}
    for name, value in found.items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


@pytest.mark.parametrize("kind", ["legacy", "orbax"])
def test_t5x(kind, oracle_dir) -> None:
    check(oracle_dir / "t5_1_1_tiny" / kind / "checkpoint_20", tiny(256, heads=4, mlp_dim=64))


def test_hugging_face(tmp_path) -> None:
    pytest.importorskip("torch", reason="transformers needs it to write a checkpoint")
    transformers = pytest.importorskip("transformers", reason="writes the checkpoint")
    config = transformers.T5Config(
        vocab_size=256,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    check(tmp_path, HuggingFaceCheckpoint(tmp_path).config)
