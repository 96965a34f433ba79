"""Small models, one for each thing that a cache must get right."""

from __future__ import annotations

from typing import Any

from t5x_like.layers.attention import AttentionConfig
from t5x_like.layers.latent_attention import LatentAttentionConfig
from t5x_like.layers.mlp import MlpConfig
from t5x_like.layers.moe.layer import MoeConfig
from t5x_like.layers.moe.routers import HashRouter, SigmoidRouter
from t5x_like.layers.norms import NormConfig
from t5x_like.layers.positions import (
    AlibiConfig,
    LearnedPositionsConfig,
    RelativePositionsConfig,
    SinusoidalPositionsConfig,
    TransformerXlPositionsConfig,
)
from t5x_like.layers.rope import (
    DynamicScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeConfig,
    YarnScaling,
)
from t5x_like.models.block import BlockConfig
from t5x_like.models.decoder_only import DecoderOnlyConfig
from t5x_like.models.encoder_decoder import EncoderDecoderConfig

VOCAB = 64
MLP = MlpConfig(mlp_dim=24)


def block(attention: dict[str, Any] | None = None, *, mlp: Any = MLP, **fields: Any) -> BlockConfig:
    defaults = {"num_heads": 4, "head_dim": 8, "logit_scale": "rsqrt_head_dim"}
    attend = AttentionConfig(**(defaults | (attention or {})))
    return BlockConfig(embed_dim=16, attention=attend, mlp=mlp, **fields)


def latent_block(**fields: Any) -> BlockConfig:
    dims = {"head_dim": 8, "rotary_dim": 4, "value_dim": 6, "latent_dim": 10}
    attention = LatentAttentionConfig(num_heads=4, **dims, **fields)
    return BlockConfig(embed_dim=16, attention=attention, mlp=MLP)


def experts(router: Any, **fields: Any) -> MoeConfig:
    return MoeConfig(num_experts=4, expert=MlpConfig(mlp_dim=16), router=router, **fields)


def decoder(attention: dict[str, Any] | None = None, **fields: Any) -> DecoderOnlyConfig:
    blocks = fields.pop("block", None) or block(attention, **fields.pop("in_block", {}))
    values = {"vocab_size": VOCAB, "num_layers": 2, "dtype": "float32", "block": blocks}
    return DecoderOnlyConfig(**(values | fields))


def encoder_decoder(**fields: Any) -> EncoderDecoderConfig:
    values = {
        "vocab_size": VOCAB,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "dtype": "float32",
        "block": block({"logit_scale": None}),
        "positions": RelativePositionsConfig(num_buckets=8, max_distance=16),
    }
    return EncoderDecoderConfig(**(values | fields))


def rope(scaling: Any = None, **fields: Any) -> dict[str, Any]:
    return {"positions": RopeConfig(**({"theta": 100.0, "scaling": scaling} | fields))}


_FACTORS = {"short_factors": (1.0, 1.1, 1.2, 1.3), "long_factors": (1.0, 2.0, 3.0, 4.0)}
_WINDOWS = (
    block({"window": 3, **rope()}),
    block({"window": 5, **rope(theta=50.0)}),
    block(rope()),
)

CONFIGS: dict[str, Any] = {
    "t5": encoder_decoder(),
    "a_table_a_layer": encoder_decoder(
        positions=RelativePositionsConfig(num_buckets=8, max_distance=16, per_layer=True)
    ),
    "encoder_decoder_post_learned": encoder_decoder(
        positions=LearnedPositionsConfig(max_length=40, offset=2),
        block=block({"qkv_bias": True, "out_bias": True}, norm_placement="post"),
        share_embeddings=False,
        embedding_norm=True,
    ),
    "encoder_decoder_grouped_queries": encoder_decoder(
        block=block({"num_kv_heads": 2, **rope()}, norm_placement="sandwich"), positions=None
    ),
    "relative_decoder": decoder(positions=RelativePositionsConfig(num_buckets=8, max_distance=16)),
    "learned_gpt2": decoder(
        {"qkv_bias": True, "out_bias": True},
        positions=LearnedPositionsConfig(max_length=40),
        in_block={"norm": NormConfig(kind="layer", use_bias=True)},
        logits="tied",
        logits_bias=True,
    ),
    "sinusoidal": decoder(
        positions=SinusoidalPositionsConfig(),
        scale_embeddings=True,
        embedding_dim=12,
        logits="tied_rescaled",
    ),
    "alibi": decoder({"positions": AlibiConfig(scale=0.5)}),
    "alibi_window": decoder({"positions": AlibiConfig(), "window": 4}),
    "transformer_xl": decoder({"positions": TransformerXlPositionsConfig()}),
    "transformer_xl_window": decoder({"positions": TransformerXlPositionsConfig(), "window": 4}),
    "llama_grouped_queries": decoder({"num_kv_heads": 2, **rope()}),
    "multi_query_parallel": decoder(
        {"num_kv_heads": 1, **rope(fraction=0.5, interleaved=True)},
        in_block={"residual": "parallel_shared_norm"},
    ),
    "llama3_parallel": decoder(
        rope(
            Llama3Scaling(
                factor=8.0,
                low_frequency_factor=1.0,
                high_frequency_factor=4.0,
                original_length=16,
            )
        ),
        in_block={"residual": "parallel"},
    ),
    "yarn_post_norm": decoder(
        rope(YarnScaling(factor=4.0, original_length=8)), in_block={"norm_placement": "post"}
    ),
    "dynamic": decoder(rope(DynamicScaling(factor=2.0, original_length=8))),
    "longrope": decoder(rope(LongRopeScaling(original_length=12, max_length=40, **_FACTORS))),
    "window": decoder({"window": 3, **rope()}),
    "relative_window": decoder(
        {"window": 3}, positions=RelativePositionsConfig(num_buckets=8, max_distance=16)
    ),
    "windows_in_turn": decoder(block=_WINDOWS, num_layers=4),
    "softcap_sinks_qk_norm_sandwich": decoder(
        {"softcap": 3.0, "sinks": True, "qk_norm": NormConfig(), **rope()},
        logits_softcap=5.0,
        in_block={"norm_placement": "sandwich"},
    ),
    "experts_after_a_dense_block": decoder(
        rope(),
        in_block={"mlp": experts(SigmoidRouter(k=2), shared_expert=MlpConfig(mlp_dim=8))},
        leading_blocks=(block(rope()),),
        num_layers=3,
    ),
    "latent": decoder(
        block=latent_block(
            query_dim=12,
            mscale=0.7,
            **rope(YarnScaling(factor=4.0, original_length=8), interleaved=True),
        ),
    ),
    "latent_relative": decoder(
        block=latent_block(), positions=RelativePositionsConfig(num_buckets=8, max_distance=16)
    ),
    "hashed_experts_in_turn": encoder_decoder(
        block=tuple(
            block({"logit_scale": None}, mlp=mlp)
            for mlp in (MLP, experts(HashRouter(), group_size=4))
        ),
        num_decoder_layers=3,
    ),
}
