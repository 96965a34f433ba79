"""config.json of GPT-1, GPT-2, GPT-NeoX, GPT-J, Falcon: published, written by us, refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from t5x_like.errors import UserError
from t5x_like.interop.hugging_face import registry

from ..model.conftest import REPOSITORY, resolve

__all__ = ["resolve"]  # the fixture

FAMILIES = {
    "gpt1": "GPT-1", "gpt2": "GPT-2", "gpt_neox": "GPT-NeoX", "gpt_j": "GPT-J", "falcon": "Falcon"
}  # fmt: skip

# Copied from the repositories on Hugging Face, without token ids, caches and versions.
PUBLISHED: dict[str, dict[str, Any]] = {
    "gpt1/117m": {
        "architectures": ["OpenAIGPTLMHeadModel"], "model_type": "openai-gpt", "afn": "gelu",
        "layer_norm_epsilon": 1e-05, "n_ctx": 512, "n_embd": 768, "n_head": 12, "n_layer": 12,
        "n_positions": 512, "n_special": 0, "vocab_size": 40478,
    },
    "gpt2/xl": {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2",
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-05, "n_ctx": 1024,
        "n_embd": 1600, "n_head": 25, "n_layer": 48, "n_positions": 1024, "vocab_size": 50257,
    },
    "gpt_neox/pythia_12b": {
        "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "hidden_act": "gelu",
        "hidden_size": 5120, "intermediate_size": 20480, "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048, "num_attention_heads": 40, "num_hidden_layers": 36,
        "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False,
        "use_parallel_residual": True, "vocab_size": 50688,
    },
    "gpt_neox/20b": {
        "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox",
        "hidden_act": "gelu_fast", "hidden_size": 6144, "intermediate_size": 24576,
        "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "num_attention_heads": 64,
        "num_hidden_layers": 44, "rotary_emb_base": 10000, "rotary_pct": 0.25,
        "tie_word_embeddings": False, "vocab_size": 50432,
    },
    "gpt_j/6b": {
        "architectures": ["GPTJForCausalLM"], "model_type": "gptj",
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-05, "n_embd": 4096,
        "n_head": 16, "n_inner": None, "n_layer": 28, "n_positions": 2048, "rotary": True,
        "rotary_dim": 64, "scale_attn_weights": True, "tie_word_embeddings": False,
        "vocab_size": 50400,
    },
    "falcon/rw_1b": {
        "architectures": ["FalconForCausalLM"], "model_type": "falcon", "alibi": True,
        "apply_residual_connection_post_layernorm": False, "bias": True, "hidden_size": 2048,
        "layer_norm_epsilon": 1e-05, "multi_query": False, "new_decoder_architecture": False,
        "num_attention_heads": 32, "num_hidden_layers": 24, "parallel_attn": False,
        "vocab_size": 50304,
    },
    "falcon/7b": {
        "architectures": ["FalconForCausalLM"], "model_type": "falcon", "alibi": False,
        "bias": False, "hidden_size": 4544, "layer_norm_epsilon": 1e-05, "multi_query": True,
        "new_decoder_architecture": False, "num_attention_heads": 71, "num_hidden_layers": 32,
        "parallel_attn": True, "vocab_size": 65024,
    },
    "falcon/40b": {
        "architectures": ["FalconForCausalLM"], "model_type": "falcon", "alibi": False,
        "bias": False, "hidden_size": 8192, "layer_norm_epsilon": 1e-05,
        "new_decoder_architecture": True, "num_attention_heads": 128, "num_hidden_layers": 60,
        "num_kv_heads": 8, "parallel_attn": True, "vocab_size": 65024,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published(resolve, name):
    family, config = registry.our_config(PUBLISHED[name])
    assert family.name == FAMILIES[name.partition("/")[0]]
    assert list(registry.differences(config, resolve(name))) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_every_size_can_be_written(resolve, family):
    for path in (REPOSITORY / "gin/models" / family).glob("*.gin"):
        if path.stem != "base_config":
            config = resolve(f"{family}/{path.stem}")
            found, written = registry.their_config(config)
            assert found.name == FAMILIES[family]
            assert list(registry.differences(config, registry.our_config(written)[1])) == []


@pytest.mark.parametrize("name", ["gpt3/small", "lamda/2b", "gopher/44m", "palm/8b"])
def test_families_that_hugging_face_does_not_have(resolve, name):
    with pytest.raises(UserError, match="No architecture of Hugging Face"):
        registry.their_config(resolve(name))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gpt2/xl", {"add_cross_attention": True}, "add_cross_attention True is not supported"),
        ("gpt2/xl", {"scale_attn_by_inverse_layer_idx": True}, "only False"),
        ("gpt2/xl", {"n_head": 24}, "n_embd 1600 is no multiple of n_head 24"),
        ("gpt2/xl", {"activation_function": "mish"}, "activation 'mish'"),
        ("gpt_j/6b", {"tie_word_embeddings": True}, "tie_word_embeddings True is not supported"),
        ("falcon/7b", {"num_ln_in_parallel_attn": 2}, "goes with new_decoder_architecture true"),
    ],
)
def test_refused(name, change, message):
    with pytest.raises(UserError, match=message):
        registry.our_config(PUBLISHED[name] | change)


def test_missing_key():
    config = {key: value for key, value in PUBLISHED["gpt2/xl"].items() if key != "n_layer"}
    with pytest.raises(UserError, match="has no 'n_layer'"):
        registry.our_config(config)


def test_falcon_11b(resolve):
    """tiiuae/falcon-11B: one norm, grouped heads, a narrower MLP, untied logits, another theta."""
    changes = {
        "hidden_size": 4096, "num_attention_heads": 32, "ffn_hidden_size": 16384,
        "num_ln_in_parallel_attn": 1, "rope_theta": 500042.0, "tie_word_embeddings": False,
    }  # fmt: skip
    _, config = registry.our_config(PUBLISHED["falcon/40b"] | changes)
    assert config.block.residual == "parallel_shared_norm" and config.logits == "dense"
    assert config.block.attention.positions.theta == 500042.0
    assert (
        list(registry.differences(config, registry.our_config(registry.their_config(config)[1])[1]))
        == []
    )


def test_what_falcon_cannot_say(resolve):
    """A part of each head rotated is not Falcon's, whatever its config.json would say."""
    block = resolve("falcon/40b").block
    rope = dataclasses.replace(block.attention.positions, fraction=0.5)
    attention = dataclasses.replace(block.attention, positions=rope)
    config = dataclasses.replace(
        resolve("falcon/40b"), block=dataclasses.replace(block, attention=attention)
    )
    with pytest.raises(UserError, match="No architecture of Hugging Face"):
        registry.their_config(config)
