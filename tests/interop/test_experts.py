"""Families with mixtures of experts against transformers: Switch, Mixtral, Qwen 3 MoE.

Parity is that of evaluation: routers have no jitter, and no expert drops a token. In Mixtral and
Qwen 3 none ever does. In Switch `expert_capacity` is above the length of every row; that dropping
is the same where the capacities are, too, is a test of its own.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest

pytest.importorskip("torch", reason="the oracle is PyTorch's")
transformers = pytest.importorskip("transformers", reason="the oracle is Hugging Face's")

from t5x_like.interop.hugging_face.checkpoint import HuggingFaceCheckpoint, load_params  # noqa: E402
from t5x_like.layers.moe.dispatch import DispatcherConfig  # noqa: E402
from t5x_like.layers.moe.layer import MoeConfig  # noqa: E402
from t5x_like.models.base import ModelDef  # noqa: E402
from t5x_like.models.block import BlockConfig  # noqa: E402
from t5x_like.models.stack import as_pattern  # noqa: E402

from .parity import (  # noqa: E402
    check_parity,
    compare_logits,
    make_examples,
    padded,
    randomise,
    their_logits,
)

SMALL = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
QWEN = {
    "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20,
}  # fmt: skip
# Name -> (class, what differs from SMALL).
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": (
        "Mixtral",
        {"num_local_experts": 4, "sliding_window": 7, "tie_word_embeddings": True},
    ),
    "qwen3_moe": ("Qwen3Moe", {**QWEN, "norm_topk_prob": True}),
    "qwen3_moe_dense_layers": (
        "Qwen3Moe",
        {
            **QWEN, "num_hidden_layers": 5, "decoder_sparse_step": 2, "mlp_only_layers": [1],
            "attention_bias": True,
        },
    ),
}  # fmt: skip
SWITCH = {
    "vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 4,
    "num_decoder_layers": 3, "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 3,
    "num_experts": 4, "relative_attention_num_buckets": 16, "relative_attention_max_distance": 20,
}  # fmt: skip


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """Their attention by plain matrix products, also where the test does not make the model."""
    for name in ("Mixtral", "Qwen3Moe"):
        monkeypatch.setattr(getattr(transformers, f"{name}ForCausalLM"), "_supports_sdpa", False)


@pytest.mark.parametrize("name", DECODERS)
def test_decoders(name, tmp_path):
    prefix, fields = DECODERS[name]
    config = getattr(transformers, f"{prefix}Config")(**{**SMALL, **fields})
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    ours = check_parity(model, tmp_path)
    written = json.loads((tmp_path / "back/config.json").read_text())
    assert written["architectures"] == [f"{prefix}ForCausalLM"]
    pattern = ours.block if isinstance(ours.block, tuple) else (ours.block,)
    assert {isinstance(block.mlp, MoeConfig) for block in pattern} == (
        {True, False} if "dense" in name else {True}
    )


def switch(**fields: Any) -> Any:
    config = transformers.SwitchTransformersConfig(**SWITCH | fields)
    return transformers.SwitchTransformersForConditionalGeneration(config)


def test_switch(tmp_path):
    """Every other layer of the encoder is sparse, every one of the decoder, gradients too."""
    ours = check_parity(switch(), tmp_path, gradients=True)
    assert [isinstance(block.mlp, MoeConfig) for block in ours.encoder_block] == [False, True]
    assert ours.block.mlp.router.k == 1


def test_switch_of_sparse_layers_only_and_untied(tmp_path):
    """As Switch-C. transformers then has three token tables, which are one here."""
    model = switch(num_sparse_encoder_layers=4, tie_word_embeddings=False)
    model.encoder.embed_tokens.weight = model.decoder.embed_tokens.weight = model.shared.weight
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    ours = check_parity(model, tmp_path, packed=False, unused=copies)
    assert ours.encoder_block is None
    assert ours.logits == "dense"


def test_switch_drops_the_same_tokens(tmp_path):
    """Their capacity of 3 tokens is a factor of 3 experts / n tokens of a row of n."""
    capacity, length = 3, 24
    model = randomise(switch(expert_capacity=capacity))
    model.save_pretrained(tmp_path)
    config = dataclasses.replace(HuggingFaceCheckpoint(tmp_path).config, dtype="float32")
    example = make_examples(config, (length,))[0]
    example = example._replace(source=example.source[:length])
    dispatcher = DispatcherConfig(
        kind="capacity",
        capacity_factor=capacity * SWITCH["num_experts"] / length,
        min_capacity=1,
    )
    limited = dataclasses.replace(
        config,
        block=tuple(_with(block, dispatcher) for block in as_pattern(config.block)),
        encoder_block=tuple(_with(block, dispatcher) for block in as_pattern(config.encoder_block)),
    )
    params = load_params(tmp_path, ModelDef(config).param_info)
    batch = padded([example])
    ours = [
        np.asarray(jax.jit(lambda p, c=c: ModelDef(c).bind(p)(batch))(params))
        for c in (limited, config)
    ]
    theirs = their_logits(model, example)
    compare_logits(ours[0], [theirs], rows=[0])
    # It matters: without a limit the logits are others.
    assert np.abs(ours[1][0] - theirs).max() > 0.01 * np.abs(theirs).max()


def _with(block: BlockConfig, dispatcher: DispatcherConfig) -> BlockConfig:
    if not isinstance(block.mlp, MoeConfig):
        return block
    return dataclasses.replace(block, mlp=dataclasses.replace(block.mlp, dispatcher=dispatcher))
