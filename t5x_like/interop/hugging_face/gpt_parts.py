"""What the adapters of the GPT line share: lines of the table of names, parts of configurations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from t5x_like.errors import UserError
from t5x_like.interop.hugging_face.adapter import TRANSPOSE, Entry, Op, Shape
from t5x_like.layers.attention import AttentionConfig
from t5x_like.layers.mlp import MlpConfig
from t5x_like.layers.norms import NormConfig
from t5x_like.layers.positions import LearnedPositionsConfig
from t5x_like.layers.rope import RopeConfig
from t5x_like.models.block import BlockConfig
from t5x_like.models.decoder_only import DecoderOnlyConfig

Json = Mapping[str, Any]
LAYER = "decoder/layers"
ATTENTION = f"{LAYER}/self_attention"
PDROPS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
DROPOUTS = ("hidden_dropout", "attention_dropout")
_QKV = ("query", "key", "value")


# ---- What the families have in common: lines of the table of names.


def linear_entries(ours: str, theirs: str, *, bias: bool, op: Op = TRANSPOSE) -> list[Entry]:
    """A torch.nn.Linear, or (`op` SAME) a Conv1D."""
    entries = [Entry(f"{ours}/kernel", f"{theirs}.weight", op)]
    return [*entries, Entry(f"{ours}/bias", f"{theirs}.bias")] if bias else entries


def norm_entries(ours: str, theirs: str) -> list[Entry]:
    """A torch.nn.LayerNorm."""
    return [Entry(f"{ours}/scale", f"{theirs}.weight"), Entry(f"{ours}/bias", f"{theirs}.bias")]


def qkv_entries(theirs: str, *, bias: bool, op: Op) -> list[Entry]:
    """One tensor of theirs that holds the query, key and value projections."""
    parts = {"kernel": "weight", "bias": "bias"} if bias else {"kernel": "weight"}
    return [
        Entry(tuple(f"{ATTENTION}/{name}/{mine}" for name in _QKV), f"{theirs}.{their}", op)
        for mine, their in parts.items()
    ]


def vocabulary_entries(config: DecoderOnlyConfig, table: str, head: str = "lm_head") -> list[Entry]:
    """The token table and the output kernel, which may be the same tensor."""
    ours = "token_embedder/embedding"
    if config.logits == "tied":
        return [Entry(ours, table, aliases=(f"{head}.weight",))]
    dense = linear_entries("decoder/logits_dense", head, bias=config.logits_bias)
    return [Entry(ours, table), *dense]


def grouped_qkv(attention: AttentionConfig) -> Op:
    """Per key and value head: its query heads, the key head, the value head; as torch.nn.Linear.

    With as many of each that is GPT-NeoX's (heads, 3, head_dim), with one key and value head
    Falcon-7B's, between them Falcon-40B's.
    """
    groups, dim = attention.num_kv_heads or attention.num_heads, attention.head_dim
    heads = attention.num_heads // groups  # Query heads in a group.

    def to_ours(x: np.ndarray) -> tuple[np.ndarray, ...]:
        x = x.reshape(groups, heads + 2, dim, *x.shape[1:])
        parts = np.split(x, (heads, heads + 1), axis=1)
        return tuple(part.reshape(-1, *x.shape[3:]).T for part in parts)

    def to_theirs(*ours: np.ndarray) -> np.ndarray:
        parts = [x.T.reshape(groups, -1, dim, *x.shape[:-1]) for x in ours]
        return np.concatenate(parts, axis=1).reshape(-1, *ours[0].shape[:-1])

    def theirs_shape(*shapes: Shape) -> Shape:
        return (sum(shape[-1] for shape in shapes), *shapes[0][:-1])

    return Op(to_ours=to_ours, to_theirs=to_theirs, theirs_shape=theirs_shape)


# ---- What the families have in common: configurations.


def decoder_config(
    config: Json,
    *,
    attention: AttentionConfig,
    mlp: MlpConfig,
    epsilon: float,
    num_layers: int,
    logits: Any,
    positions: LearnedPositionsConfig | None = None,
    logits_bias: bool = False,
    **block: Any,
) -> DecoderOnlyConfig:
    """A decoder of one kind of block, with LayerNorm and GPT-2's initialisation.

    `block` has the fields of BlockConfig in which the families differ.
    """
    return DecoderOnlyConfig(
        vocab_size=config["vocab_size"],
        num_layers=num_layers,
        positions=positions,
        logits=logits,
        logits_bias=logits_bias,
        block=BlockConfig(
            attention=attention,
            mlp=mlp,
            norm=NormConfig(kind="layer", epsilon=epsilon, use_bias=True),
            dropout_rate=config.get(PDROPS[0], config.get(DROPOUTS[0], 0.0)),
            broadcast_dropout=False,
            init_stddev=config.get("initializer_range", 0.02),
            **block,
        ),
    )


def only_block(config: Any) -> BlockConfig:
    """The one block of a decoder, or UserError: these families have no other models."""
    if not isinstance(config, DecoderOnlyConfig) or not isinstance(config.block, BlockConfig):
        raise UserError("it is not a decoder of equal blocks")
    return config.block


def common_json(
    config: DecoderOnlyConfig, *, architecture: str, model_type: str, dropouts: tuple[str, ...]
) -> dict[str, Any]:
    """What every config.json of these families says; `dropouts` are their names of the rate."""
    block = only_block(config)
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.logits == "tied",
        **dict.fromkeys(dropouts, block.dropout_rate),
        **({} if block.init_stddev is None else {"initializer_range": block.init_stddev}),
    }


def head_dim_of(config: Json, *, width: str, heads: str) -> int:
    """Width of a head; UserError where heads do not fill the width that is under this key."""
    if config[width] % config[heads]:
        raise UserError(
            f"config.json: {width} {config[width]} is no multiple of {heads} {config[heads]}"
        )
    return config[width] // config[heads]


def refuse(config: Json, **expected: Any) -> None:
    """UserError where config.json asks for something that our model does not compute."""
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise UserError(f"config.json: {key} {config[key]!r} is not supported, only {value!r}")


def rope_of(block: BlockConfig) -> RopeConfig:
    """The rotary positions of a block, or UserError."""
    if not isinstance(block.attention.positions, RopeConfig):
        raise UserError("its positions are not rotary")
    return block.attention.positions
