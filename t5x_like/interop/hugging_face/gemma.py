"""Gemma 1, 2 and 3 (text).

Llama's decoder with scaled and tied embeddings, norms scaled by 1 + w and GeGLU; from Gemma 2 on
with norms behind the branches and layers that alternate between a window and the whole context.
"""

from __future__ import annotations

from typing import Any

from t5x_like.errors import UserError
from t5x_like.interop.hugging_face.adapter import (
    ConfigJson,
    Entry,
    Family,
    dense_mlp,
    heads_of,
    their_activation,
)
from t5x_like.interop.hugging_face.llama import (
    IGNORED,
    NORMS,
    Json,
    blocks_of,
    common_json,
    gated_mlp,
    head_counts,
    layer_entries,
    logits_of,
    outer_entries,
    repeating,
    rope_of,
)
from t5x_like.interop.hugging_face.rope import read_rope, rope_parameters, write_rope
from t5x_like.layers.attention import AttentionConfig
from t5x_like.layers.norms import NormConfig
from t5x_like.layers.rope import RopeConfig
from t5x_like.models.block import BlockConfig
from t5x_like.models.decoder_only import DecoderOnlyConfig

LOCAL, GLOBAL = "sliding_attention", "full_attention"
_TANH = "gelu_pytorch_tanh"

# What transformers takes where config.json is silent, as that of the multimodal Gemma 3 is mostly.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 256},
    "gemma2": {
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    "gemma3_text": {
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
    },
}
_SANDWICH = {
    "pre_self_attention_layer_norm": "model.layers.{layer}.input_layernorm",
    "post_self_attention_layer_norm": "model.layers.{layer}.post_attention_layernorm",
    "pre_mlp_layer_norm": "model.layers.{layer}.pre_feedforward_layernorm",
    "post_mlp_layer_norm": "model.layers.{layer}.post_feedforward_layernorm",
}


# ---- Their config.json -> our config.


def _norm(config: Json) -> NormConfig:
    return NormConfig(epsilon=config.get("rms_norm_eps", 1e-6), scale_offset=1.0)


def _block(config: Json, *, activation: str, sandwich: bool, **attention: Any) -> BlockConfig:
    bias = config.get("attention_bias", False)
    return BlockConfig(
        embed_dim=config["hidden_size"],
        attention=AttentionConfig(**head_counts(config), qkv_bias=bias, out_bias=bias, **attention),
        mlp=gated_mlp(config, activation),
        norm=_norm(config),
        norm_placement="sandwich" if sandwich else "pre",
        broadcast_dropout=False,
        init_stddev=config.get("initializer_range", 0.02),
    )


def _decoder(config: Json, block: Any) -> DecoderOnlyConfig:
    if config.get("use_bidirectional_attention"):
        raise UserError("config.json: Gemma with bidirectional attention is not supported.")
    return DecoderOnlyConfig(
        vocab_size=config["vocab_size"],
        num_layers=config["num_hidden_layers"],
        block=block,
        logits=logits_of(config, default=True),
        logits_softcap=config.get("final_logit_softcapping"),
        scale_embeddings=True,
    )


def _gemma1(config: Json) -> DecoderOnlyConfig:
    config = ConfigJson({**_DEFAULTS["gemma"], **config})
    activation = config.get("hidden_activation") or config.get("hidden_act") or _TANH
    if activation == "gelu":  # The first releases' name of the tanh approximation.
        activation = _TANH
    rope = read_rope(config)
    scale: Any = "rsqrt_head_dim"
    block = _block(config, activation=activation, sandwich=False, logit_scale=scale, positions=rope)
    return _decoder(config, block)


def _alternating(
    config: Json, usual: tuple[str, ...], ropes: dict[str, RopeConfig], **attention: Any
) -> DecoderOnlyConfig:
    """Gemma 2 and 3: layers of two kinds, in the `usual` order unless config.json has another."""
    layers = config["num_hidden_layers"]
    kinds = config.get("layer_types") or [usual[layer % len(usual)] for layer in range(layers)]
    scalar = config["query_pre_attn_scalar"]
    scale: Any = "rsqrt_head_dim" if scalar == config["head_dim"] else scalar**-0.5

    def block(kind: str) -> BlockConfig:
        return _block(
            config,
            activation=config.get("hidden_activation") or _TANH,
            sandwich=True,
            logit_scale=scale,
            softcap=config.get("attn_logit_softcapping"),
            window=config["sliding_window"] if kind == LOCAL else None,
            positions=ropes[kind],
            **attention,
        )

    return _decoder(config, repeating(kinds, block, usual))


def _gemma2(config: Json) -> DecoderOnlyConfig:
    config = ConfigJson({**_DEFAULTS["gemma2"], **config})
    rope = read_rope(config)
    return _alternating(config, (LOCAL, GLOBAL), {LOCAL: rope, GLOBAL: rope})


def _gemma3(config: Json) -> DecoderOnlyConfig:
    config = ConfigJson({**_DEFAULTS["gemma3_text"], **config})
    period = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
    usual = (LOCAL,) * (period - 1) + (GLOBAL,)
    return _alternating(config, usual, _gemma3_ropes(config), qk_norm=_norm(config))


def _gemma3_ropes(config: Json) -> dict[str, RopeConfig]:
    nested = config.get("rope_parameters") or {}
    scaled = {**(nested.get(GLOBAL) or {}), **(config.get("rope_scaling") or {})}
    local = nested.get(LOCAL) or {}
    local_theta = config.get("rope_local_base_freq") or 10_000.0
    return {
        LOCAL: read_rope(config, {"rope_theta": local_theta, **local}),
        GLOBAL: read_rope(config, scaled, theta=1_000_000.0),
    }


# ---- Our config -> their config.json.


def _json(name: str, model_type: str, config: Any) -> tuple[dict[str, Any], list[BlockConfig]]:
    blocks = blocks_of(config, name=name)
    first = blocks[0]
    activation = their_activation(first.mlp.activations[0], prefer=_TANH)
    return {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": model_type,
        "hidden_activation": activation,
        "hidden_act": activation,
        "attention_bias": heads_of(first).qkv_bias,
        "intermediate_size": dense_mlp(first).mlp_dim,
        **common_json(config, first),
        **write_rope(rope_of(first)),
    }, blocks


def _gemma1_json(config: Any) -> dict[str, Any]:
    return _json("Gemma", "gemma", config)[0]


def _alternating_json(name: str, model_type: str, config: Any) -> dict[str, Any]:
    written, blocks = _json(name, model_type, config)
    attention = heads_of(blocks[0])
    windows = [block.attention.window for block in blocks]
    return written | {
        "query_pre_attn_scalar": round(attention.scale**-2),
        "attn_logit_softcapping": attention.softcap,
        "final_logit_softcapping": config.logits_softcap,
        "sliding_window": next((window for window in windows if window), None),
        "layer_types": [LOCAL if window else GLOBAL for window in windows],
    }


def _gemma3_json(config: Any) -> dict[str, Any]:
    written = _alternating_json("Gemma3", "gemma3_text", config)
    pattern = config.block if isinstance(config.block, tuple) else (config.block,)
    ropes = {
        GLOBAL if b.attention.window is None else LOCAL: b.attention.positions for b in pattern
    }
    outer = write_rope(ropes[GLOBAL]) if GLOBAL in ropes else {}
    local = ropes.get(LOCAL, RopeConfig())
    outer["rope_local_base_freq"] = local.theta
    if local.scaling is not None:
        outer["rope_parameters"] = {kind: rope_parameters(rope) for kind, rope in ropes.items()}
    return written | outer | {"sliding_window_pattern": len(pattern)}


def _unwritten(config: Any) -> dict[str, Any]:
    raise UserError("the multimodal Gemma 3 is read for its text model, not written")


# ---- The table of names.


def _entries(config: DecoderOnlyConfig) -> list[Entry]:
    block = blocks_of(config, name="Gemma")[0]
    norms = _SANDWICH if block.norm_placement == "sandwich" else NORMS
    return [*outer_entries(config), *layer_entries(block, norms)]


FAMILIES = (
    Family(
        name="Gemma 1",
        architectures=("GemmaForCausalLM",),
        model_types=("gemma",),
        from_config=_gemma1,
        to_config=_gemma1_json,
        entries=_entries,
        ignored=IGNORED,
    ),
    Family(
        name="Gemma 2",
        architectures=("Gemma2ForCausalLM",),
        model_types=("gemma2",),
        from_config=_gemma2,
        to_config=lambda config: _alternating_json("Gemma2", "gemma2", config),
        entries=_entries,
    ),
    Family(
        name="Gemma 3 (text)",
        architectures=("Gemma3ForCausalLM",),
        model_types=("gemma3_text",),
        from_config=_gemma3,
        to_config=_gemma3_json,
        entries=_entries,
    ),
    Family(
        name="Gemma 3 (the text model of the multimodal one)",
        architectures=("Gemma3ForConditionalGeneration",),
        model_types=("gemma3",),
        from_config=lambda config: _gemma3(config["text_config"]),
        to_config=_unwritten,
        entries=_entries,
        ignored=(r"(model\.)?(vision_tower|multi_modal_projector)\..*",),
        # As published, and as transformers 5 saves it.
        renames=((r"^language_model\.", ""), (r"^model\.language_model\.", "model.")),
    ),
)
