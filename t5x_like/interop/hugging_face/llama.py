"""Llama 1 to 3 and Yi, Mistral, Qwen 1.5 to 3 (dense), Phi-3: one shape of decoder.

RMS norms before the branches, rotary positions, gated MLPs. They differ in biases, windows, norms
of queries and keys, and in Phi-3's fused tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from t5x_like.errors import UserError
from t5x_like.interop.hugging_face.adapter import (
    TRANSPOSE,
    ConfigJson,
    Entry,
    Family,
    dense_mlp,
    fused,
    heads_of,
    layer_blocks,
    our_activation,
    their_activation,
)
from t5x_like.interop.hugging_face.rope import read_rope, write_rope
from t5x_like.layers.attention import AttentionConfig
from t5x_like.layers.mlp import MlpConfig
from t5x_like.layers.moe.layer import MoeConfig
from t5x_like.layers.norms import NormConfig
from t5x_like.layers.rope import LongRopeScaling, RopeConfig
from t5x_like.models.block import BlockConfig
from t5x_like.models.decoder_only import DecoderOnlyConfig
from t5x_like.models.stack import as_pattern

Json = Mapping[str, Any]
LAYER = "decoder/layers"
ATTENTION = f"{LAYER}/self_attention"
QKV = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
GATED = {"wi_0": "gate_proj", "wi_1": "up_proj", "wo": "down_proj"}
# Buffers that early versions of transformers saved.
IGNORED = (r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)


# ---- Parts that Gemma uses too.


def head_counts(config: Json) -> dict[str, Any]:
    """Keyword arguments of AttentionConfig. One key and value head a query head is None."""
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    return {
        "num_heads": heads,
        "num_kv_heads": None if kv_heads == heads else kv_heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
    }


def gated_mlp(config: Json, activation: str, *, bias: bool = False) -> MlpConfig:
    return MlpConfig(
        mlp_dim=config["intermediate_size"],
        activations=(our_activation(activation), "linear"),
        use_bias=bias,
    )


def logits_of(config: Json, *, default: bool) -> Any:
    """`logits` of our config; `default` is what transformers takes where config.json is silent."""
    return "tied" if config.get("tie_word_embeddings", default) else "dense"


def repeating(
    kinds: Sequence[Any], make: Callable[[Any], BlockConfig], usual: Sequence[Any] = ()
) -> BlockConfig | tuple[BlockConfig, ...]:
    """`block` of our config for a kind of block a layer.

    The `usual` period if the layers follow it, otherwise the shortest that they follow; one block
    where they are all of a kind.
    """

    def follows(period: Sequence[Any]) -> bool:
        return all(kind == period[layer % len(period)] for layer, kind in enumerate(kinds))

    if usual and follows(usual):
        period = usual
    else:
        period = next(kinds[:n] for n in range(1, len(kinds) + 1) if follows(kinds[:n]))
    made = {kind: make(kind) for kind in set(period)}
    return made[period[0]] if len(period) == 1 else tuple(made[kind] for kind in period)


def blocks_of(config: Any, *, name: str) -> list[BlockConfig]:
    """The block of every layer of a decoder with rotary positions and gated MLPs.

    Raises:
      UserError: another model.
    """
    if not isinstance(config, DecoderOnlyConfig):
        raise UserError(f"{name} is a decoder, not a {type(config).__name__}")
    for block in as_pattern(config.block):
        if not isinstance(block.attention.positions, RopeConfig):
            raise UserError(f"{name} has rotary positions")
        if block.mlp.activations[1:] != ("linear",):
            raise UserError(f"{name} has a gated MLP, not activations {block.mlp.activations}")
    return layer_blocks(config, "decoder")


def rope_of(block: BlockConfig) -> RopeConfig:
    """The positions of a block of `blocks_of`."""
    rope = block.attention.positions
    assert isinstance(rope, RopeConfig)
    return rope


def common_json(config: DecoderOnlyConfig, block: BlockConfig) -> dict[str, Any]:
    """What every config.json of these families says."""
    attention = heads_of(block)
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": block.embed_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads or attention.num_heads,
        "head_dim": attention.head_dim,
        "rms_norm_eps": block.norm.epsilon,
        "tie_word_embeddings": config.logits == "tied",
        **({} if block.init_stddev is None else {"initializer_range": block.init_stddev}),
    }


def linear(ours: str, theirs: str, *, bias: bool = False) -> list[Entry]:
    """A torch.nn.Linear."""
    entries = [Entry(f"{ours}/kernel", f"{theirs}.weight", TRANSPOSE)]
    return [*entries, Entry(f"{ours}/bias", f"{theirs}.bias")] if bias else entries


def norm(ours: str, theirs: str) -> list[Entry]:
    return [Entry(f"{ours}/scale", f"{theirs}.weight")]


def outer_entries(config: DecoderOnlyConfig) -> list[Entry]:
    """Token table, output kernel and final norm."""
    table = ("token_embedder/embedding", "model.embed_tokens.weight")
    entries = norm("decoder/decoder_norm", "model.norm")
    if config.logits == "tied":
        return [*entries, Entry(*table, aliases=("lm_head.weight",))]
    return [*entries, Entry(*table), *linear("decoder/logits_dense", "lm_head")]


def layer_entries(block: BlockConfig, norms: Mapping[str, str]) -> list[Entry]:
    """A layer with a tensor a projection; `norms` is their norm by ours."""
    return [*attention_entries(block, norms), *mlp_entries(bias=dense_mlp(block).use_bias)]


def attention_entries(block: BlockConfig, norms: Mapping[str, str]) -> list[Entry]:
    """What a layer has but for its MLP; `norms` is their norm by ours."""
    attention, theirs = heads_of(block), "model.layers.{layer}"
    entries = [e for ours, name in norms.items() for e in norm(f"{LAYER}/{ours}", name)]
    for ours, name in QKV.items():
        place = f"{theirs}.self_attn.{name}"
        entries += linear(f"{ATTENTION}/{ours}", place, bias=attention.qkv_bias)
    entries += linear(f"{ATTENTION}/out", f"{theirs}.self_attn.o_proj", bias=attention.out_bias)
    if attention.qk_norm is not None:
        entries += norm(f"{ATTENTION}/query_norm", f"{theirs}.self_attn.q_norm")
        entries += norm(f"{ATTENTION}/key_norm", f"{theirs}.self_attn.k_norm")
    return entries


def mlp_entries(*, bias: bool, layers: tuple[int, ...] | None = None) -> list[Entry]:
    """A gated MLP with a tensor a projection, of the layers that have one (None for all)."""
    return [
        dataclasses.replace(entry, layers=layers)
        for ours, name in GATED.items()
        for entry in linear(f"{LAYER}/mlp/{ours}", f"model.layers.{{layer}}.mlp.{name}", bias=bias)
    ]


# ---- The families of this file.

NORMS = {
    "pre_self_attention_layer_norm": "model.layers.{layer}.input_layernorm",
    "pre_mlp_layer_norm": "model.layers.{layer}.post_attention_layernorm",
}


def decoder(
    config: Json,
    windows: Sequence[int | None],
    *,
    mlp_bias: bool = False,
    mlps: Sequence[MlpConfig | MoeConfig] | None = None,
    **attention: Any,
) -> DecoderOnlyConfig:
    """Our config from theirs, a window a layer, and what else AttentionConfig is to have.

    `mlps` has one a layer where that is not theirs of `hidden_act` and `intermediate_size`.
    """
    epsilon = config.get("rms_norm_eps", 1e-6)
    if mlps is None:
        mlp = gated_mlp(config, config.get("hidden_act", "silu"), bias=mlp_bias)
        mlps = [mlp] * len(windows)

    def block(kind: tuple[int | None, MlpConfig | MoeConfig]) -> BlockConfig:
        window, mlp = kind
        return BlockConfig(
            embed_dim=config["hidden_size"],
            attention=AttentionConfig(
                **head_counts(config),
                logit_scale="rsqrt_head_dim",
                window=window,
                positions=read_rope(config),
                **attention,
            ),
            mlp=mlp,
            norm=NormConfig(epsilon=epsilon),
            broadcast_dropout=False,
            init_stddev=config.get("initializer_range", 0.02),
        )

    return DecoderOnlyConfig(
        vocab_size=config["vocab_size"],
        num_layers=config["num_hidden_layers"],
        block=repeating(list(zip(windows, mlps, strict=True)), block),
        logits=logits_of(config, default=False),
    )


def same_window(config: Json, window: int | None) -> list[int | None]:
    """One window for all layers."""
    if config.get("layer_types"):
        raise UserError("config.json: 'layer_types' is not supported for this architecture.")
    return [window] * config["num_hidden_layers"]


def _by_layer(config: Json) -> list[int | None]:
    """Qwen's: from `max_window_layers` on layers have a window, if windows are used at all."""
    layers = config["num_hidden_layers"]
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    kinds = config.get("layer_types") or [
        "sliding_attention" if layer >= config.get("max_window_layers", 28) else "full_attention"
        for layer in range(layers)
    ]
    return [window if kind == "sliding_attention" else None for kind in kinds]


def whole_head(config: Json) -> Json:
    """transformers rotates part of a head in Phi-3 only; here it would ignore the fraction."""
    if read_rope(config).fraction != 1:
        raise UserError(
            "config.json: 'partial_rotary_factor' is not supported for this architecture."
        )
    return config


def _llama(config: Json) -> DecoderOnlyConfig:
    bias = config.get("attention_bias", False)
    return decoder(
        whole_head(config),
        same_window(config, None),
        mlp_bias=config.get("mlp_bias", False),
        qkv_bias=bias,
        out_bias=bias,
    )


def _mistral(config: Json) -> DecoderOnlyConfig:
    return decoder(whole_head(config), same_window(config, config.get("sliding_window", 4096)))


def _qwen2(config: Json) -> DecoderOnlyConfig:
    return decoder(whole_head(config), _by_layer(config), qkv_bias=True)


def _qwen3(config: Json) -> DecoderOnlyConfig:
    bias = config.get("attention_bias", False)
    config = ConfigJson({"head_dim": 128, **config})
    return decoder(
        whole_head(config),
        _by_layer(config),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=NormConfig(epsilon=config.get("rms_norm_eps", 1e-6)),
    )


def _phi3(config: Json) -> DecoderOnlyConfig:
    defaults = {"original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
    config = ConfigJson({**defaults, **config})
    parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if "yarn" in (parameters.get("rope_type"), parameters.get("type")):  # Phi-3's LongRoPE once.
        config["rope_scaling"] = {**parameters, "rope_type": "longrope"}
    if not isinstance(read_rope(config).scaling, LongRopeScaling | None):
        raise UserError("config.json: a phi3 has no rope type but 'default' and 'longrope'.")
    return decoder(config, same_window(config, config.get("sliding_window")))


def _json(name: str, config: Any) -> tuple[dict[str, Any], list[BlockConfig]]:
    """(what all families of this file write, the block of every layer)."""
    blocks = blocks_of(config, name=name)
    first = blocks[0]
    return {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": name.lower(),
        "hidden_act": their_activation(first.mlp.activations[0]),
        "intermediate_size": dense_mlp(first).mlp_dim,
        **common_json(config, first),
        **write_rope(rope_of(first)),
    }, blocks


def _llama_json(config: Any) -> dict[str, Any]:
    written, (first, *_) = _json("Llama", config)
    biases = {"attention_bias": heads_of(first).qkv_bias, "mlp_bias": dense_mlp(first).use_bias}
    return written | biases


def _mistral_json(config: Any) -> dict[str, Any]:
    written, (first, *_) = _json("Mistral", config)
    return written | {"sliding_window": first.attention.window}


def _qwen_json(name: str, config: Any) -> dict[str, Any]:
    written, blocks = _json(name, config)
    windows = [block.attention.window for block in blocks]
    used = [window for window in windows if window]
    written |= {
        "use_sliding_window": bool(used),
        "sliding_window": used[0] if used else None,
        # For transformers 4, which has no other say: exact where windows begin at some layer.
        "max_window_layers": next((i for i, w in enumerate(windows) if w), len(windows)),
        "layer_types": ["sliding_attention" if w else "full_attention" for w in windows],
    }
    if name == "Qwen3":
        written["attention_bias"] = heads_of(blocks[0]).qkv_bias
    return written


def _phi3_json(config: Any) -> dict[str, Any]:
    written, (first, *_) = _json("Phi3", config)
    written["sliding_window"] = first.attention.window
    if config.vocab_size <= 32000:  # The ids that Phi3Config takes of itself are outside.
        written |= {"pad_token_id": None, "eos_token_id": None}
    if scaling := written["rope_scaling"]:
        # In the published form, which transformers 4 insists on: three keys, `type` one of them.
        original = scaling.get("original_max_position_embeddings", 4096)
        kept = ("short_factor", "long_factor", "factor", "attention_factor")
        written["rope_scaling"] = {
            "type": scaling["rope_type"],
            **{key: scaling[key] for key in kept if key in scaling},
        }
        written["original_max_position_embeddings"] = original
    return written


def _entries(config: DecoderOnlyConfig) -> list[Entry]:
    return [*outer_entries(config), *layer_entries(blocks_of(config, name="")[0], NORMS)]


def _phi3_entries(config: DecoderOnlyConfig) -> list[Entry]:
    block = blocks_of(config, name="Phi3")[0]
    attention, theirs = heads_of(block), "model.layers.{layer}"
    counts = (attention.num_heads, *[attention.num_kv_heads or attention.num_heads] * 2)
    sizes = [heads * attention.head_dim for heads in counts]
    gate_up = tuple(f"{LAYER}/mlp/{name}/kernel" for name in ("wi_0", "wi_1"))
    return [
        *outer_entries(config),
        *(e for ours, name in NORMS.items() for e in norm(f"{LAYER}/{ours}", name)),
        Entry(
            tuple(f"{ATTENTION}/{name}/kernel" for name in QKV),
            f"{theirs}.self_attn.qkv_proj.weight",
            fused(sizes, transpose=True),
        ),
        *linear(f"{ATTENTION}/out", f"{theirs}.self_attn.o_proj"),
        Entry(
            gate_up,
            f"{theirs}.mlp.gate_up_proj.weight",
            fused([dense_mlp(block).mlp_dim] * 2, transpose=True),
        ),
        *linear(f"{LAYER}/mlp/wo", f"{theirs}.mlp.down_proj"),
    ]


def _family(
    name: str,
    prefix: str,
    *,
    from_config: Callable[[ConfigJson], DecoderOnlyConfig],
    to_config: Callable[[Any], dict[str, Any]],
    entries: Callable[[DecoderOnlyConfig], list[Entry]] = _entries,
) -> Family:
    return Family(
        name=name,
        architectures=(f"{prefix}ForCausalLM",),
        model_types=(prefix.lower(),),
        from_config=from_config,
        to_config=to_config,
        entries=entries,
        ignored=IGNORED,
    )


FAMILIES = (
    _family("Llama", "Llama", from_config=_llama, to_config=_llama_json),
    _family("Mistral", "Mistral", from_config=_mistral, to_config=_mistral_json),
    _family(
        "Qwen 1.5, 2 and 2.5",
        "Qwen2",
        from_config=_qwen2,
        to_config=lambda config: _qwen_json("Qwen2", config),
    ),
    _family(
        "Qwen 3",
        "Qwen3",
        from_config=_qwen3,
        to_config=lambda config: _qwen_json("Qwen3", config),
    ),
    _family(
        "Phi-3",
        "Phi3",
        from_config=_phi3,
        to_config=_phi3_json,
        entries=_phi3_entries,
    ),
)
