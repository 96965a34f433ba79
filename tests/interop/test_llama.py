"""Llama's kin against transformers: logits, gradients, and weights there and back.

Small, but with all that makes the families differ: fewer key and value heads than query heads,
heads that are not width / heads wide, windows below the length of the sequence, biases, norms of
queries and keys, every scaling of the rotary positions.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch", reason="the oracle is PyTorch's")
transformers = pytest.importorskip("transformers", reason="the oracle is Hugging Face's")

from .parity import check_parity, randomise  # noqa: E402

SMALL = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}


def rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 5000.0, **fields}}


# Name -> (class, what differs from SMALL).
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rms_norm_eps": 1e-5, **rope("default")}),
    "llama_biases_tied": (
        "Llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 16},
    ),
    "llama_linear": ("Llama", rope("linear", factor=4.0)),
    "llama_dynamic_within": ("Llama", rope("dynamic", factor=4.0)),
    "llama_llama3": (
        "Llama",
        rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
    ),
    "llama_yarn": ("Llama", rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "llama_yarn_mscale": (
        "Llama",
        rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=16,
            beta_fast=16.0,
            beta_slow=2.0,
            mscale=1.0,
            mscale_all_dim=0.7,
        ),
    ),
    "llama_longrope_short": (
        "Llama",
        rope("longrope", factor=2.0, original_max_position_embeddings=48, **FACTORS),
    ),
    "mistral": ("Mistral", {"sliding_window": 7}),
    "mistral_no_window": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2_upper_layers_windowed": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3_layer_types": (
        "Qwen3",
        {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 9,
            "num_hidden_layers": 5,
            "layer_types": ["full_attention", "sliding_attention"] * 2 + ["full_attention"],
        },
    ),
    "phi3": ("Phi3", {"sliding_window": 7}),
    "phi3_part_of_a_head": (
        "Phi3",
        {"hidden_size": 96, "partial_rotary_factor": 0.75, "num_key_value_heads": 6},
    ),
}
# Frequencies that go by the length of a sequence: here by that of a row, there by that of an
# example. All examples of a test are longer than the original length, or rows are shorter.
LONG: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_longrope": (
        "Llama",
        rope("longrope", factor=4.0, original_max_position_embeddings=8, **FACTORS),
    ),
    "phi3_longrope": (
        "Phi3",
        {"original_max_position_embeddings": 8, "rope_scaling": {"type": "longrope", **FACTORS}},
    ),
}


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """Their attention by plain matrix products, also where the test does not make the model."""
    for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Phi3"):
        monkeypatch.setattr(getattr(transformers, f"{name}ForCausalLM"), "_supports_sdpa", False)


def build(prefix: str, fields: dict[str, Any]) -> Any:
    config = getattr(transformers, f"{prefix}Config")(**{**SMALL, **fields})
    model = randomise(getattr(transformers, f"{prefix}ForCausalLM")(config))
    assert model.config._attn_implementation == "eager"
    return model


@pytest.mark.parametrize("name", MODELS)
def test_parity(name, tmp_path):
    gradients = name in ("llama", "llama_biases_tied", "qwen3")
    check_parity(build(*MODELS[name]), tmp_path, gradients=gradients)


@pytest.mark.parametrize("name", LONG)
def test_parity_above_the_original_length(name, tmp_path):
    check_parity(build(*LONG[name]), tmp_path, lengths=(20, 17, 13))


def test_parity_of_dynamic_scaling(tmp_path):
    """Theirs keeps the frequencies of the longest sequence that it has seen: the first."""
    model = build("Llama", {"max_position_embeddings": 12, **rope("dynamic", factor=4.0)})
    check_parity(model, tmp_path, lengths=(20, 17, 13), packed=False)
