"""DeepSeek-V2 and V3: random models of transformers, and what config.json may say."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
from flax import traverse_util

from t5x_like.errors import UserError
from t5x_like.interop.hugging_face import registry
from t5x_like.interop.hugging_face.adapter import ConfigJson, transfers
from t5x_like.interop.weights import slots
from t5x_like.models.base import ModelDef

torch = pytest.importorskip("torch", reason="the oracle is PyTorch's")
transformers = pytest.importorskip("transformers", reason="the oracle is Hugging Face's")

from .parity import check_parity  # noqa: E402

SMALL: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 20,
    "num_hidden_layers": 4, "first_k_dense_replace": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "n_routed_experts": 8, "n_shared_experts": 2,
    "num_experts_per_tok": 3, "kv_lora_rank": 12, "qk_nope_head_dim": 10, "qk_rope_head_dim": 8,
    "v_head_dim": 6, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "beta_fast": 4, "beta_slow": 1,
    "original_max_position_embeddings": 8,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lite": ("V2", {
        "q_lora_rank": None, "routed_scaling_factor": 1.0, "n_shared_experts": 1,
        "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    }),
    "v2_groups": ("V2", {
        "q_lora_rank": 14, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
        "routed_scaling_factor": 16.0, "first_k_dense_replace": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    }),
    "v3": ("V3", {
        "q_lora_rank": 14, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5,
        "rope_parameters": {**YARN, "mscale": 2.0, "mscale_all_dim": 1.0},
    }),
}  # fmt: skip


def model_of(name: str) -> Any:
    version, settings = CASES[name]
    config = getattr(transformers, f"Deepseek{version}Config")(**{**SMALL, **settings})
    model_class = getattr(transformers, f"Deepseek{version}ForCausalLM")
    return model_class._from_config(config, attn_implementation="eager")


@pytest.mark.parametrize("name", CASES)
def test_parity(name, tmp_path):
    model = model_of(name)
    for key, buffer in model.named_buffers():
        if key.endswith("e_score_correction_bias"):  # Large enough to choose other experts.
            buffer.copy_(
                0.3 * torch.randn(buffer.shape, generator=torch.Generator().manual_seed(1))
            )
    config = check_parity(model, tmp_path, gradients=name == "v3")
    assert config.block.mlp.num_experts == 8


def small_json(name: str) -> dict[str, Any]:
    return model_of(name).config.to_dict()


def test_multi_token_prediction_is_a_layer_after_the_last():
    family, config = registry.our_config(small_json("v3"))
    config = dataclasses.replace(config, future_depth=1)
    found, written = registry.their_config(config)
    table = transfers(family.entries(config), config)
    info = traverse_util.flatten_dict(ModelDef(config).param_info, sep="/")
    rows = Counter(slot for t in table for slot in t.ours)
    assert rows == Counter(slot for n, i in info.items() for slot in slots(n, i))
    names = frozenset(name for t in table for name in t.theirs)
    last = {name.removeprefix("model.layers.4.") for name in names if "layers.4." in name}
    block = {name.removeprefix("model.layers.3.") for name in names if "layers.3." in name}
    # As in model.safetensors.index.json of deepseek-ai/DeepSeek-V3, for its layer 61.
    assert last - block == {
        *("enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight")
    }
    assert block < last
    copies = {alias for t in table for alias in t.aliases}
    assert {f"model.layers.4.{n}.weight" for n in ("embed_tokens", "shared_head.head")} == copies
    assert found is family
    assert not list(registry.differences(family.from_config(ConfigJson(written, names)), config))
    without = family.from_config(ConfigJson(written, names - {"model.layers.4.eh_proj.weight"}))
    assert without.future_depth == 0


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("v3", {"quantization_config": {"quant_method": "fp8"}}, "dequantise them first"),
        ("v3", {"topk_method": "greedy"}, "'topk_method' 'greedy' is not supported, only noaux_tc"),
        ("v3", {"attention_bias": True}, "'attention_bias' True is not supported, only False"),
        ("v3", {"first_k_dense_replace": 4}, "a DeepSeek model without experts"),
        ("lite", {"norm_topk_prob": True}, "'norm_topk_prob' is ignored for deepseek_v2"),
        ("lite", {"scoring_func": "sigmoid"}, "'scoring_func' 'sigmoid' is not supported"),
    ],
)
def test_refused(name, change, message):
    with pytest.raises(UserError, match=message):
        registry.our_config({**small_json(name), **change})
