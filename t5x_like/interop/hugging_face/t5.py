"""T5 1.0 and 1.1, mT5, umT5, LongT5, and what has T5's architecture: ByT5, Flan-T5, UL2."""

from __future__ import annotations

import dataclasses
from typing import Any

from t5x_like.errors import UserError
from t5x_like.interop.hugging_face.adapter import (
    TRANSPOSE,
    ConfigJson,
    Entry,
    Family,
    dense_mlp,
    heads_of,
    our_activation,
    their_activation,
)
from t5x_like.layers.attention import AttentionConfig
from t5x_like.layers.mlp import MlpConfig
from t5x_like.layers.norms import NormConfig
from t5x_like.layers.positions import RelativePositionsConfig
from t5x_like.models.block import BlockConfig
from t5x_like.models.encoder_decoder import EncoderDecoderConfig


@dataclasses.dataclass(frozen=True)
class _Kind:
    """A family of this file, and in what it is not T5.

    Attributes:
      per_layer: every layer has its own table of relative positions.
      rescales: tied logits may be divided by sqrt(embed_dim).
      long: the encoder attends within a window, and possibly to transient-global tokens.
    """

    name: str
    architecture: str
    model_type: str
    per_layer: bool = False
    rescales: bool = True
    long: bool = False


_KINDS = (
    _Kind("T5", "T5ForConditionalGeneration", "t5"),
    _Kind("mT5", "MT5ForConditionalGeneration", "mt5", rescales=False),
    _Kind("umT5", "UMT5ForConditionalGeneration", "umt5", per_layer=True),
    _Kind("LongT5", "LongT5ForConditionalGeneration", "longt5", long=True),
)
# LongT5's `encoder_attention_type` -> name of the module.
_LONG_MODULES = {
    "local": "LocalSelfAttention",
    "transient-global": "TransientGlobalSelfAttention",
}


# ---- config.json.


def _from_config(config: ConfigJson, kind: _Kind) -> EncoderDecoderConfig:
    gated, _, name = config.get("feed_forward_proj", "relu").rpartition("-")
    # "gated-gelu" stands for T5 1.1's GEGLU, whose GELU is the tanh approximation.
    activation = "gelu" if (gated, name) == ("gated", "gelu") else our_activation(name)
    block = BlockConfig(
        embed_dim=config["d_model"],
        attention=AttentionConfig(num_heads=config["num_heads"], head_dim=config["d_kv"]),
        mlp=MlpConfig(
            mlp_dim=config["d_ff"],
            activations=(activation, "linear") if gated else (activation,),
        ),
        norm=NormConfig(epsilon=config.get("layer_norm_epsilon", 1e-6)),
        dropout_rate=config.get("dropout_rate", 0.1),
    )
    return EncoderDecoderConfig(
        vocab_size=config["vocab_size"],
        num_encoder_layers=config["num_layers"],
        num_decoder_layers=config.get("num_decoder_layers") or config["num_layers"],
        block=block,
        encoder_block=_long_block(config, block) if kind.long else None,
        positions=RelativePositionsConfig(
            num_buckets=config.get("relative_attention_num_buckets", 32),
            max_distance=config.get("relative_attention_max_distance", 128),
            per_layer=kind.per_layer,
        ),
        logits=_logits(config, kind),
    )


def _long_block(config: ConfigJson, block: BlockConfig) -> BlockConfig:
    """LongT5's encoder: `local_radius` r is a window of r tokens to either side."""
    attention_type = config.get("encoder_attention_type", "local")
    if attention_type not in _LONG_MODULES:
        raise UserError(
            f"config.json: encoder_attention_type '{attention_type}' is not known; known: "
            f"{', '.join(_LONG_MODULES)}."
        )
    has_blocks = attention_type == "transient-global"
    attention = dataclasses.replace(
        heads_of(block),
        window=config.get("local_radius", 127) + 1,
        global_block_size=config.get("global_block_size", 16) if has_blocks else None,
    )
    return dataclasses.replace(block, attention=attention)


def _logits(config: ConfigJson, kind: _Kind) -> Any:
    """Tied or not, rescaled or not.

    Before transformers 5, `tie_word_embeddings` said both. Now it is always written as true,
    `scale_decoder_outputs` says the other half for T5 (mT5 never rescales), and whether there is
    a table of the logits is seen by the tensors only.
    """
    tied = config.get("tie_word_embeddings", True)
    if kind.rescales and config.get("scale_decoder_outputs", tied):
        return "tied_rescaled"
    has_table = config.tensors is None or "lm_head.weight" in config.tensors
    return "dense" if has_table else "tied"


def _to_config(config: EncoderDecoderConfig, kind: _Kind) -> dict[str, Any]:
    if not isinstance(config, EncoderDecoderConfig):
        raise UserError(f"{kind.name} is an encoder-decoder, not a {type(config).__name__}")
    block, positions = config.block, config.positions
    if not isinstance(positions, RelativePositionsConfig) or not isinstance(block, BlockConfig):
        raise UserError(f"{kind.name} has relative positions and blocks of one shape")
    *gates, _ = activations = block.mlp.activations
    if len(activations) > 2 or (gates and activations[1] != "linear"):
        raise UserError(f"{kind.name} has no MLP with activations {activations}")
    feed_forward = their_activation(activations[0], prefer=None if gates else "gelu_new")
    if gates:
        feed_forward = f"gated-{'gelu' if activations[0] == 'gelu' else feed_forward}"
    return {
        "architectures": [kind.architecture],
        "model_type": kind.model_type,
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": block.embed_dim,
        "d_kv": block.attention.head_dim,
        "d_ff": dense_mlp(block).mlp_dim,
        "num_heads": block.attention.num_heads,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "feed_forward_proj": feed_forward,
        "layer_norm_epsilon": block.norm.epsilon,
        "dropout_rate": block.dropout_rate,
        "relative_attention_num_buckets": positions.num_buckets,
        "relative_attention_max_distance": positions.max_distance,
        "tie_word_embeddings": config.logits != "dense",
        "scale_decoder_outputs": config.logits == "tied_rescaled",
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        **(_long_json(config) if kind.long else {}),
    }


def _long_json(config: EncoderDecoderConfig) -> dict[str, Any]:
    block = config.encoder_block
    if not isinstance(block, BlockConfig) or block.attention.window is None:
        raise UserError("LongT5 has encoder blocks of one shape, with a window")
    blocks = block.attention.global_block_size
    return {
        "encoder_attention_type": "transient-global" if blocks else "local",
        "local_radius": block.attention.window - 1,
        "global_block_size": blocks or 16,
    }


# ---- Names.


def _entries(config: EncoderDecoderConfig) -> list[Entry]:
    return [*outer_entries(config), *_side(config, "encoder"), *_side(config, "decoder")]


def outer_entries(config: EncoderDecoderConfig) -> list[Entry]:
    """The token table and, where it is another, that of the logits."""
    shared = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    if config.logits != "dense":
        shared.append("lm_head.weight")
    entries = [Entry("token_embedder/embedding", "shared.weight", aliases=tuple(shared))]
    if config.logits == "dense":
        entries.append(Entry("decoder/logits_dense/kernel", "lm_head.weight", TRANSPOSE))
    return entries


def _side(config: EncoderDecoderConfig, side: str) -> list[Entry]:
    gated = len(config.first_block.mlp.activations) == 2
    mlp = f"{mlp_sublayer(side)}.DenseReluDense"
    module = "SelfAttention" if side == "decoder" else _encoder_module(config)
    return [
        *attention_entries(side, module),
        *(
            Entry(f"{side}/layers/mlp/{name}/kernel", f"{mlp}.{name}.weight", TRANSPOSE)
            for name in (["wi_0", "wi_1", "wo"] if gated else ["wi", "wo"])
        ),
        *_tables(config, side, module),
    ]


def mlp_sublayer(side: str) -> str:
    """Their name of the part of a block that is the MLP and its norm."""
    return f"{side}.block.{{layer}}.layer.{2 if side == 'decoder' else 1}"


def attention_entries(side: str, module: str = "SelfAttention") -> list[Entry]:
    """What a T5's `encoder` or `decoder` has but for MLPs and tables of relative positions."""
    decoder = side == "decoder"
    attention = "self_attention" if decoder else "attention"
    # Sub-layers by number: self-attention, cross-attention in the decoder, MLP.
    sublayers = [(attention, f"pre_{attention}_layer_norm", module)]
    if decoder:
        cross = ("encoder_decoder_attention", "pre_cross_attention_layer_norm", "EncDecAttention")
        sublayers.append(cross)
    ours, theirs = f"{side}/layers", f"{side}.block.{{layer}}.layer"
    entries = [
        Entry(
            f"{ours}/{name}/{long}/kernel", f"{theirs}.{i}.{their_name}.{short}.weight", TRANSPOSE
        )
        for i, (name, _, their_name) in enumerate(sublayers)
        for long, short in {"query": "q", "key": "k", "value": "v", "out": "o"}.items()
    ]
    norms = [norm for _, norm, _ in sublayers] + ["pre_mlp_layer_norm"]
    entries += [
        Entry(f"{ours}/{norm}/scale", f"{theirs}.{i}.layer_norm.weight")
        for i, norm in enumerate(norms)
    ]
    return [*entries, Entry(f"{side}/{side}_norm/scale", f"{side}.final_layer_norm.weight")]


def _tables(config: EncoderDecoderConfig, side: str, module: str) -> list[Entry]:
    """Of relative positions, and what transient-global attention has besides."""
    assert isinstance(config.positions, RelativePositionsConfig)
    every = f"{side}.block.{{layer}}.layer.0.{module}"
    first = f"{side}.block.0.layer.0.{module}"
    per_layer = config.positions.per_layer
    table = f"{side}/{'layers/' if per_layer else ''}relpos_bias/rel_embedding"
    theirs = f"{every if per_layer else first}.relative_attention_bias.weight"
    entries = [Entry(table, theirs, TRANSPOSE)]
    if module == _LONG_MODULES["transient-global"]:
        norm = f"{side}/layers/attention/global_tokens/layer_norm/scale"
        table = f"{side}/global_relpos_bias/rel_embedding"
        entries += [
            Entry(norm, f"{every}.global_input_layer_norm.weight"),
            Entry(table, f"{first}.global_relative_attention_bias.weight", TRANSPOSE),
        ]
    return entries


def _encoder_module(config: EncoderDecoderConfig) -> str:
    block = config.encoder_block
    if not isinstance(block, BlockConfig) or block.attention.window is None:
        return "SelfAttention"
    blocks = block.attention.global_block_size
    return _LONG_MODULES["transient-global" if blocks else "local"]


def _family(kind: _Kind) -> Family:
    return Family(
        name=kind.name,
        architectures=(kind.architecture,),
        model_types=(kind.model_type,),
        from_config=lambda config: _from_config(config, kind),
        to_config=lambda config: _to_config(config, kind),
        entries=_entries,
        # Early conversions to PyTorch gave the cross-attention a table that nothing reads.
        ignored=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
    )


FAMILIES = tuple(_family(kind) for kind in _KINDS)
