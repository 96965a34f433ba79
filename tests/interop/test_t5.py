"""T5 1.0, T5 1.1, mT5 and umT5 are transformers' models."""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the oracle is PyTorch's")
transformers = pytest.importorskip("transformers", reason="the oracle is Hugging Face's")

from t5x_like.interop.convert import to_hugging_face  # noqa: E402

from .parity import check_parity  # noqa: E402
from .test_t5x_export import MODEL  # noqa: E402

FEATURES = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")

SIZES = {
    "d_model": 32, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4,
    "d_kv": 8, "vocab_size": 61, "relative_attention_num_buckets": 16,
    "relative_attention_max_distance": 20,
}  # fmt: skip


def untied(model):
    """T5 1.1's table of logits: transformers 5 makes a tied model first."""
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def test_t5_1_0(tmp_path):
    config = transformers.T5Config(**SIZES, feed_forward_proj="relu")
    model = transformers.T5ForConditionalGeneration(config)
    ours = check_parity(model, tmp_path, gradients=True)
    assert (ours.logits, ours.num_encoder_layers, ours.num_decoder_layers) == (
        "tied_rescaled", 3, 2,
    )  # fmt: skip


def test_t5_1_1(tmp_path):
    config = transformers.T5Config(
        **SIZES, feed_forward_proj="gated-gelu", tie_word_embeddings=False
    )
    model = untied(transformers.T5ForConditionalGeneration(config))
    ours = check_parity(model, tmp_path, gradients=True)
    assert (ours.logits, ours.block.mlp.activations) == ("dense", ("gelu", "linear"))


def test_mt5(tmp_path):
    config = transformers.MT5Config(**SIZES, tie_word_embeddings=False)
    ours = check_parity(untied(transformers.MT5ForConditionalGeneration(config)), tmp_path)
    assert ours.logits == "dense"
    written = json.loads((tmp_path / "back/config.json").read_text())
    assert written["architectures"] == ["MT5ForConditionalGeneration"]


def test_mt5_tied(tmp_path):
    """transformers does not rescale the logits of an mT5, even where they are tied."""
    model = transformers.MT5ForConditionalGeneration(transformers.MT5Config(**SIZES))
    assert check_parity(model, tmp_path).logits == "tied"


def test_umt5(tmp_path):
    config = transformers.UMT5Config(**SIZES)
    ours = check_parity(transformers.UMT5ForConditionalGeneration(config), tmp_path, gradients=True)
    assert ours.positions.per_layer


def test_silu(tmp_path):
    """UL2's activation."""
    config = transformers.T5Config(**SIZES, feed_forward_proj="gated-silu")
    ours = check_parity(transformers.T5ForConditionalGeneration(config), tmp_path)
    assert ours.block.mlp.activations == ("silu", "linear")


@pytest.mark.parametrize("attention", ["local", "transient-global"])
def test_long_t5(tmp_path, attention):
    """Sources of 12 to 42 tokens, a window of 5 to either side, blocks of 4."""
    config = transformers.LongT5Config(
        **SIZES, feed_forward_proj="gated-gelu", encoder_attention_type=attention,
        local_radius=5, global_block_size=4,
    )  # fmt: skip
    model = transformers.LongT5ForConditionalGeneration(config)
    is_local = attention == "local"  # Blocks of transient-global attention cannot be packed.
    ours = check_parity(model, tmp_path, gradients=True, packed=is_local, lengths=(21, 12, 6))
    assert ours.encoder_block.attention.window == 6
    assert ours.encoder_block.attention.global_block_size == (None if is_local else 4)
    assert ours.block.attention.window is None


def test_a_checkpoint_of_t5x_gives_its_logits_in_transformers(oracle_dir, tmp_path):
    """T5X's weights, through our adapter, in PyTorch: the logits that T5X gave. Its own noise
    between jit and no jit is 2e-6; another framework may be 1e-4 away (the oracle's README)."""
    (tmp_path / "oracle.gin").write_text(MODEL)
    tiny = oracle_dir / "t5_1_1_tiny"
    to_hugging_face(tiny / "legacy_trained", tmp_path / "hf", model=tmp_path / "oracle.gin")
    model = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    with np.load(tiny / "inputs.npz") as inputs:
        batch = {k: inputs[f"unpacked/{k}"][0] for k in FEATURES}
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor(batch["encoder_input_tokens"], dtype=torch.int64),
            attention_mask=torch.tensor(batch["encoder_input_tokens"] > 0),
            decoder_input_ids=torch.tensor(batch["decoder_input_tokens"], dtype=torch.int64),
        ).logits.numpy()
    expected = np.load(tiny / "expected.npz")["trained/unpacked/logits"]
    real = batch["decoder_target_tokens"] > 0
    np.testing.assert_allclose(logits[real], expected[real], atol=1e-4, rtol=0)
