"""DeepSeek-V2 and V3: random models of transformers, and what config.json may say."""

from __future__ import annotations

from typing import Any

import pytest

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
