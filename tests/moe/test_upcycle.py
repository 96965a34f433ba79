"""A model with experts that starts as copies of a dense one."""

from __future__ import annotations

import dataclasses
from typing import Any

from t5x_like.layers.attention import AttentionConfig
from t5x_like.layers.mlp import MlpConfig
from t5x_like.layers.moe.layer import MoeConfig
from t5x_like.layers.moe.routers import TopKRouter
from t5x_like.models.block import BlockConfig
from t5x_like.models.decoder_only import DecoderOnlyConfig
from t5x_like.models.encoder_decoder import EncoderDecoderConfig
from t5x_like.training.upcycle import dense_twin

DENSE = BlockConfig(
    embed_dim=8, attention=AttentionConfig(num_heads=2, head_dim=4), mlp=MlpConfig(mlp_dim=16)
)
SPARSE = dataclasses.replace(
    DENSE, mlp=MoeConfig(num_experts=4, expert=DENSE.mlp, router=TopKRouter(k=2))
)


def decoder(**settings: Any) -> DecoderOnlyConfig:
    return DecoderOnlyConfig(**{"vocab_size": 32, "num_layers": 3, "dtype": "float32", **settings})


def test_dense_twin():
    plain = decoder(block=DENSE)
    assert dense_twin(decoder(block=SPARSE)) == plain
    assert dense_twin(decoder(block=(DENSE, SPARSE), leading_blocks=(DENSE,))) == plain
    wide = dataclasses.replace(DENSE, mlp=MlpConfig(mlp_dim=32))
    assert dense_twin(decoder(block=SPARSE, leading_blocks=(wide,))) == decoder(
        block=DENSE, leading_blocks=(wide,)
    )
    both = EncoderDecoderConfig(
        vocab_size=32,
        num_encoder_layers=2,
        num_decoder_layers=2,
        block=(DENSE, SPARSE),
        encoder_block=SPARSE,
    )
    twin = dense_twin(both)
    assert (twin.block, twin.encoder_block) == (DENSE, None)
