"""Gemma 1, 2 and 3 against transformers: logits, gradients, and weights there and back.

Depths leave layers over after the whole repeats of the pattern; windows are below the length of
the sequence; soft-caps are small enough to bend the logits.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the oracle is PyTorch's")
transformers = pytest.importorskip("transformers", reason="the oracle is Hugging Face's")

from t5x_like.interop.convert import from_hugging_face, to_hugging_face  # noqa: E402
from t5x_like.interop.initial import load_initial_params  # noqa: E402
from t5x_like.models.base import ModelDef  # noqa: E402

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
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 64,
}  # fmt: skip
GEMMA2 = {
    "sliding_window": 7, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 10.0,
}  # fmt: skip
LINEAR = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 50000.0, "factor": 8.0},
}
# Name -> (class, class of its configuration, what differs from SMALL).
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma1": ("GemmaForCausalLM", "GemmaConfig", {"num_key_value_heads": 1}),
    "gemma1_biases": ("GemmaForCausalLM", "GemmaConfig", {"attention_bias": True}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", GEMMA2),
    "gemma2_untied_uncapped": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {
            "sliding_window": 7,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "tie_word_embeddings": False,
        },
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {"sliding_window": 7, "num_hidden_layers": 8, "query_pre_attn_scalar": 24},
    ),
    "gemma3_scaled": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {"sliding_window": 7, "num_hidden_layers": 7, "rope_parameters": LINEAR},
    ),
    "gemma3_below_one_pattern": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {"sliding_window": 7, "num_hidden_layers": 2},
    ),
}


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """Their attention by plain matrix products: the other ways know no soft-cap."""
    names = [model for model, _, _ in MODELS.values()]
    for name in (*names, "Gemma3ForConditionalGeneration", "Gemma3TextModel"):
        monkeypatch.setattr(getattr(transformers, name), "_supports_sdpa", False)


def build(model: str, config: str, fields: dict[str, Any]) -> Any:
    made = randomise(
        getattr(transformers, model)(getattr(transformers, config)(**{**SMALL, **fields}))
    )
    assert made.config._attn_implementation == "eager"
    return made


@pytest.mark.parametrize("name", MODELS)
def test_parity(name, tmp_path):
    check_parity(build(*MODELS[name]), tmp_path, gradients=name == "gemma2")


def test_the_text_model_of_the_multimodal_gemma3(tmp_path):
    """Read from it with its vision tower left out; written as a text model."""
    text = transformers.Gemma3TextConfig(**SMALL, sliding_window=7)
    vision = {
        "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=4,
        image_token_index=96, boi_token_index=95, eoi_token_index=94,
    )  # fmt: skip
    model = randomise(transformers.Gemma3ForConditionalGeneration(config))
    hf, own, back = (tmp_path / name for name in ("hf", "own", "back"))
    model.save_pretrained(hf)
    ours = ModelDef(dataclasses.replace(from_hugging_face(hf, own).config, dtype="float32"))
    params = load_initial_params(own, ours.param_info)
    examples = make_examples(ours.config, (20, 13, 5))
    expected = [their_logits(model, example) for example in examples]
    compare_logits(ours.bind(params)(padded(examples)), expected, rows=range(3))
    to_hugging_face(own, back)
    again = transformers.Gemma3ForCausalLM.from_pretrained(back)
    for example, logits in zip(examples, expected, strict=True):
        np.testing.assert_array_equal(their_logits(again, example), logits)
