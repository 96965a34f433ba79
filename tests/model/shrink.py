"""A published model at a reduced width: the same features in a size that trains in a second."""

from __future__ import annotations

import dataclasses
from typing import Any

from t5x_like.layers.latent_attention import LatentAttentionConfig
from t5x_like.layers.mlp import MlpConfig
from t5x_like.layers.moe.layer import MoeConfig
from t5x_like.layers.positions import LearnedPositionsConfig
from t5x_like.layers.rope import LongRopeScaling, RopeConfig
from t5x_like.models.block import BlockConfig
from t5x_like.models.stack import as_pattern

VOCAB_SIZE = 64
WINDOW = 3


def shrunk(config: Any) -> Any:
    """`config` with few, narrow layers: each block of a pattern once and, but in two stacks, one
    layer more."""
    values: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "dtype": "float32", "remat": "none"}
    for name in ("block", "encoder_block", "leading_blocks"):
        blocks = getattr(config, name, None)
        if blocks:
            small = tuple(dict.fromkeys(_block(block) for block in as_pattern(blocks)))
            values[name] = small if isinstance(blocks, tuple) else small[0]
    for name in ("num_layers", "num_encoder_layers", "num_decoder_layers"):
        if hasattr(config, name):
            period = len(as_pattern(values["block"]))
            layers = period + (name == "num_layers" or period == 1)
            values[name] = len(config.leading_blocks) + layers
    if isinstance(config.positions, LearnedPositionsConfig):
        values["positions"] = dataclasses.replace(config.positions, max_length=32)
    return dataclasses.replace(config, **values)


def _block(block: BlockConfig) -> BlockConfig:
    return dataclasses.replace(
        block,
        embed_dim=16,
        attention=_attention(block.attention),
        mlp=_mlp(block.mlp),
        cross_attention=block.cross_attention and _attention(block.cross_attention),
    )


def _mlp(mlp: MlpConfig | MoeConfig) -> Any:
    if isinstance(mlp, MlpConfig):
        return dataclasses.replace(mlp, mlp_dim=32)
    shared = mlp.shared_expert and _mlp(mlp.shared_expert)
    return dataclasses.replace(mlp, num_experts=16, expert=_mlp(mlp.expert), shared_expert=shared)


def _attention(attention: Any) -> Any:
    if isinstance(attention, LatentAttentionConfig):
        dims = {"head_dim": 8, "rotary_dim": 4, "value_dim": 6, "latent_dim": 12}
        query_dim = attention.query_dim and 10
        return dataclasses.replace(attention, num_heads=4, query_dim=query_dim, **dims)
    kv_heads = attention.num_kv_heads
    if kv_heads is not None:
        kv_heads = {1: 1, attention.num_heads: 4}.get(kv_heads, 2)
    positions = attention.positions
    if isinstance(positions, RopeConfig) and isinstance(positions.scaling, LongRopeScaling):
        few = {n: getattr(positions.scaling, n)[:4] for n in ("short_factors", "long_factors")}
        scaling = dataclasses.replace(positions.scaling, **few)
        positions = dataclasses.replace(positions, scaling=scaling)
    return dataclasses.replace(
        attention,
        num_heads=4,
        head_dim=8,
        num_kv_heads=kv_heads,
        window=attention.window and WINDOW,
        global_block_size=attention.global_block_size and 4,
        positions=positions,
    )
