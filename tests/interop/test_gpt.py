"""GPT-1, GPT-2, GPT-NeoX, GPT-J and Falcon against transformers: logits, gradients, round trips.

Small, but with all that makes the families differ: norms before and after the branches, fused
projections in their three layouts, part of a head rotated, parallel branches with one and with two
norms, one or a few key and value heads, ALiBi for a number of heads that is no power of two.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the oracle is PyTorch's")
transformers = pytest.importorskip("transformers", reason="the oracle is Hugging Face's")

from safetensors.numpy import load_file, save_file  # noqa: E402

from t5x_like.errors import UserError  # noqa: E402
from t5x_like.interop.hugging_face.checkpoint import (  # noqa: E402
    HuggingFaceCheckpoint,
    load_params,
)
from t5x_like.models.base import ModelDef  # noqa: E402

from . import parity  # noqa: E402

IDS = {"vocab_size": 61, "bos_token_id": None, "eos_token_id": None}
GPT = {**IDS, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 48}
NEOX = {
    **IDS, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 48,
}  # fmt: skip
FALCON = {**IDS, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6}

# Name -> (class, its config.json).
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt1": ("OpenAIGPTLMHeadModel", GPT),
    "gpt2": ("GPT2LMHeadModel", GPT),
    "gpt2_untied_unscaled": (
        "GPT2LMHeadModel",
        {**GPT, "n_inner": 40, "activation_function": "relu", "scale_attn_weights": False,
         "tie_word_embeddings": False},
    ),
    "pythia": ("GPTNeoXForCausalLM", NEOX),
    "neox_20b": ("GPTNeoXForCausalLM", {**NEOX, "hidden_act": "gelu_fast", "rotary_pct": 0.5}),
    "neox_sequential_tied": (
        "GPTNeoXForCausalLM",
        {**NEOX, "use_parallel_residual": False, "attention_bias": False,
         "rotary_emb_base": 500, "tie_word_embeddings": True},
    ),
    "gpt_j": ("GPTJForCausalLM", {**GPT, "n_embd": 64, "rotary_dim": 4}),
    "falcon_rw": (
        "FalconForCausalLM",
        {**FALCON, "alibi": True, "bias": True, "multi_query": False, "parallel_attn": False},
    ),
    "falcon_7b": ("FalconForCausalLM", FALCON),
    "falcon_40b": (
        "FalconForCausalLM", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "falcon_11b": (
        "FalconForCausalLM",
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 3, "rope_theta": 500.0,
         "num_ln_in_parallel_attn": 1, "ffn_hidden_size": 40, "tie_word_embeddings": False},
    ),
}  # fmt: skip

GRADIENTS = ("gpt2", "neox_sequential_tied", "falcon_40b")


def make(name: str) -> Any:
    """The transformers model, all of its weights random."""
    class_name, values = MODELS[name]
    model_class = getattr(transformers, class_name)
    # transformers' eager Falcon adds ALiBi twice: in the mask and to the logits.
    attention = "sdpa" if values.get("alibi") else "eager"
    config = model_class.config_class(**values)
    return parity.randomise(model_class._from_config(config, attn_implementation=attention))


@pytest.mark.parametrize("name", MODELS)
def test_parity(name, tmp_path):
    # The gradient of a bias of keys is zero but for rounding.
    parity.check_parity(make(name), tmp_path, gradients=name in GRADIENTS, gradient_floor=1e-3)


def saved(model: Any, directory: Path) -> dict[str, np.ndarray]:
    """The tensors of the only file of `model`, saved to `directory`."""
    model.save_pretrained(directory)
    return load_file(directory / "model.safetensors")


def loaded(directory: Path) -> dict[str, Any]:
    return load_params(directory, ModelDef(HuggingFaceCheckpoint(directory).config).param_info)


# What published files hold besides, or under other names: -> a changed copy of the tensors.
SPELLINGS = {
    "gpt2": lambda tensors: {
        **{name.removeprefix("transformer."): x for name, x in tensors.items()},
        **{f"h.{i}.attn.bias": np.tril(np.ones((1, 1, 48, 48), np.float32)) for i in range(3)},
    },
    "gpt1": lambda tensors: {
        **{name.removeprefix("transformer."): x for name, x in tensors.items()},
        **{f"h.{i}.attn.bias": np.tril(np.ones((1, 1, 48, 48), np.float32)) for i in range(3)},
    },
    "pythia": lambda tensors: {
        **{name.replace("embed_out.", "lm_head."): x for name, x in tensors.items()},
        **{
            f"gpt_neox.layers.{i}.attention.{name}": np.ones(8, np.float32)
            for i in range(3)
            for name in ("bias", "masked_bias", "rotary_emb.inv_freq")
        },
    },
    "gpt_j": lambda tensors: {
        **tensors,
        **{f"transformer.h.{i}.attn.masked_bias": np.ones((), np.float32) for i in range(3)},
    },
    "falcon_7b": lambda tensors: {
        **tensors,
        "lm_head.weight": tensors["transformer.word_embeddings.weight"].copy(),
    },
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_published_files(name, tmp_path):
    directory = tmp_path / "hf"
    tensors = saved(make(name), directory)
    expected = loaded(directory)
    save_file(SPELLINGS[name](tensors), directory / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, loaded(directory), expected)


def test_a_tied_table_that_differs_is_refused(tmp_path):
    directory = tmp_path / "hf"
    tensors = saved(make("falcon_7b"), directory)
    other = tensors["transformer.word_embeddings.weight"] + 1
    save_file({**tensors, "lm_head.weight": other}, directory / "model.safetensors")
    with pytest.raises(UserError, match=r"word_embeddings.weight' and 'lm_head.weight'.*differ"):
        loaded(directory)


def test_fused_projections_are_taken_apart(tmp_path):
    """Falcon-40B keeps, a group: its query heads, its key head, its value head."""
    directory = tmp_path / "hf"
    tensors = saved(make("falcon_40b"), directory)
    fused = tensors["transformer.h.1.self_attention.query_key_value.weight"]
    heads = fused.reshape(10, 8, 48)  # 6 query heads, 2 key and 2 value heads of 8.
    attention = loaded(directory)["decoder"]["layers"]["self_attention"]
    places = {"query": [0, 1, 2, 5, 6, 7], "key": [3, 8], "value": [4, 9]}
    for part, order in places.items():
        expected = heads[order].reshape(-1, 48).T
        np.testing.assert_array_equal(attention[part]["kernel"][1], expected)
