"""Mixtral and Qwen 3 MoE: Llama's decoder with mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from t5x_like.interop.hugging_face.adapter import (
    ConfigJson,
    Entry,
    Family,
    heads_of,
    their_activation,
)
from t5x_like.interop.hugging_face.experts import (
    dense_layers,
    mixture_entries,
    sparse_layers,
    top_k_mixture,
)
from t5x_like.interop.hugging_face.llama import (
    GATED,
    IGNORED,
    LAYER,
    NORMS,
    attention_entries,
    blocks_of,
    common_json,
    decoder,
    gated_mlp,
    mlp_entries,
    outer_entries,
    rope_of,
    same_window,
    whole_head,
)
from t5x_like.interop.hugging_face.rope import write_rope
from t5x_like.layers.mlp import MlpConfig
from t5x_like.layers.moe.layer import MoeConfig
from t5x_like.layers.moe.routers import TopKRouter
from t5x_like.layers.norms import NormConfig
from t5x_like.models.decoder_only import DecoderOnlyConfig

# Each family's names of a layer's router and experts.
_MIXTRAL = "model.layers.{layer}.block_sparse_moe"
_MIXTRAL_NAMES = {
    "router": f"{_MIXTRAL}.gate",
    "wi_0": f"{_MIXTRAL}.experts.{{expert}}.w1",
    "wi_1": f"{_MIXTRAL}.experts.{{expert}}.w3",
    "wo": f"{_MIXTRAL}.experts.{{expert}}.w2",
}
_QWEN = "model.layers.{layer}.mlp"
_QWEN_NAMES = {
    "router": f"{_QWEN}.gate",
    **{ours: f"{_QWEN}.experts.{{expert}}.{theirs}" for ours, theirs in GATED.items()},
}


def _mixtral(config: ConfigJson) -> DecoderOnlyConfig:
    """transformers' jitter is also that of the experts' inputs; ours is of the router's alone."""
    config = ConfigJson({"rms_norm_eps": 1e-5, **config})
    moe = MoeConfig(
        num_experts=config.get("num_local_experts", 8),
        expert=gated_mlp(config, config.get("hidden_act", "silu")),
        router=TopKRouter(
            k=config.get("num_experts_per_tok", 2),
            scoring="selected",
            jitter=config.get("router_jitter_noise", 0.0),
            balance_loss=config.get("router_aux_loss_coef", 0.001),
        ),
    )
    windows = same_window(config, config.get("sliding_window"))
    return decoder(whole_head(config), windows, mlps=[moe] * len(windows))


def _qwen3_moe(config: ConfigJson) -> DecoderOnlyConfig:
    dense = gated_mlp(config, config.get("hidden_act", "silu"))
    moe = MoeConfig(
        # Published files say num_experts; transformers 5 writes num_local_experts.
        num_experts=config.get("num_experts") or config.get("num_local_experts", 128),
        expert=MlpConfig(
            mlp_dim=config.get("moe_intermediate_size", 768), activations=dense.activations
        ),
        router=TopKRouter(
            k=config.get("num_experts_per_tok", 8),
            renormalize=config.get("norm_topk_prob", False),
            balance_loss=config.get("router_aux_loss_coef", 0.001),
        ),
    )
    bias = config.get("attention_bias", False)
    used = config.get("use_sliding_window", False)
    windows = same_window(config, config.get("sliding_window", 4096) if used else None)
    step, without = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or ()
    return decoder(
        whole_head(config),
        windows,
        mlps=[
            dense if layer in without or (layer + 1) % step else moe
            for layer in range(len(windows))
        ],
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=NormConfig(epsilon=config.get("rms_norm_eps", 1e-6)),
    )


def _json(name: str, config: Any) -> tuple[dict[str, Any], MoeConfig, TopKRouter]:
    """(what both families write, the mixture, its router)"""
    blocks = blocks_of(config, name=name)
    moe, router = top_k_mixture(blocks, name=name)
    first = blocks[0]
    return (
        {
            "architectures": [f"{name}ForCausalLM"],
            "hidden_act": their_activation(moe.activations[0]),
            "num_experts_per_tok": router.k,
            "router_aux_loss_coef": router.balance_loss,
            "sliding_window": first.attention.window,
            **common_json(config, first),
            **write_rope(rope_of(first)),
        },
        moe,
        router,
    )


def _mixtral_json(config: Any) -> dict[str, Any]:
    written, moe, router = _json("Mixtral", config)
    return written | {
        "model_type": "mixtral",
        "intermediate_size": moe.expert.mlp_dim,
        "num_local_experts": moe.num_experts,
        "router_jitter_noise": router.jitter,
    }


def _qwen3_moe_json(config: Any) -> dict[str, Any]:
    written, moe, router = _json("Qwen3Moe", config)
    blocks = blocks_of(config, name="Qwen3Moe")
    without = dense_layers(blocks)
    widths = [mlp.mlp_dim for b in blocks if isinstance(mlp := b.mlp, MlpConfig)]
    return written | {
        "model_type": "qwen3_moe",
        "intermediate_size": widths[0] if widths else moe.expert.mlp_dim,
        "moe_intermediate_size": moe.expert.mlp_dim,
        "num_experts": moe.num_experts,
        "norm_topk_prob": router.renormalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(without),
        "attention_bias": heads_of(blocks[0]).qkv_bias,
        "use_sliding_window": written["sliding_window"] is not None,
    }


def _entries(config: DecoderOnlyConfig, names: dict[str, str]) -> list[Entry]:
    blocks = blocks_of(config, name="")
    moe, _ = top_k_mixture(blocks, name="")
    dense = dense_layers(blocks)
    return [
        *outer_entries(config),
        *attention_entries(blocks[0], NORMS),
        *(mlp_entries(bias=False, layers=dense) if dense else []),
        *mixture_entries(moe, f"{LAYER}/mlp", names, layers=sparse_layers(blocks)),
    ]


def _family(
    name: str,
    prefix: str,
    model_type: str,
    *,
    from_config: Callable[[ConfigJson], DecoderOnlyConfig],
    to_config: Callable[[Any], dict[str, Any]],
    names: dict[str, str],
) -> Family:
    return Family(
        name=name,
        architectures=(f"{prefix}ForCausalLM",),
        model_types=(model_type,),
        from_config=from_config,
        to_config=to_config,
        entries=lambda config: _entries(config, names),
        ignored=IGNORED,
    )


FAMILIES = (
    _family(
        "Mixtral",
        "Mixtral",
        "mixtral",
        from_config=_mixtral,
        to_config=_mixtral_json,
        names=_MIXTRAL_NAMES,
    ),
    _family(
        "Qwen 3 MoE",
        "Qwen3Moe",
        "qwen3_moe",
        from_config=_qwen3_moe,
        to_config=_qwen3_moe_json,
        names=_QWEN_NAMES,
    ),
)
