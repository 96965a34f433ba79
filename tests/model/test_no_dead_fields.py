"""Every field of every model and objective config changes what is built; bad values are refused."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from t5x_like.errors import UserError
from t5x_like.layers.attention import AttentionConfig
from t5x_like.layers.latent_attention import LatentAttentionConfig
from t5x_like.layers.mlp import MlpConfig
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
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeConfig,
    YarnScaling,
)
from t5x_like.models.base import ModelDef
from t5x_like.models.block import BlockConfig
from t5x_like.models.decoder_only import DecoderOnlyConfig
from t5x_like.models.encoder_decoder import EncoderDecoderConfig
from t5x_like.objectives.causal_lm import CausalLm
from t5x_like.objectives.seq2seq import Seq2Seq

LENGTH = 12
BLOCK = BlockConfig(
    embed_dim=16,
    attention=AttentionConfig(num_heads=4, head_dim=8),
    mlp=MlpConfig(mlp_dim=24),
    dropout_rate=0.1,
)
SEQ2SEQ = EncoderDecoderConfig(
    vocab_size=32,
    num_encoder_layers=2,
    num_decoder_layers=2,
    block=BLOCK,
    positions=RelativePositionsConfig(),
    dtype="float32",
)
DECODER = DecoderOnlyConfig(
    vocab_size=32, num_layers=2, block=BLOCK, positions=LearnedPositionsConfig(max_length=16)
)

WINDOWED = dataclasses.replace(
    SEQ2SEQ,
    encoder_block=dataclasses.replace(
        BLOCK, attention=AttentionConfig(num_heads=4, head_dim=8, window=4)
    ),
)


def with_positions(positions: Any) -> DecoderOnlyConfig:
    """A decoder whose attention has these positions."""
    attention = dataclasses.replace(BLOCK.attention, positions=positions)
    block = dataclasses.replace(BLOCK, attention=attention)
    return dataclasses.replace(DECODER, block=block, positions=None)


YARN = YarnScaling(factor=2.0, original_length=1000)
LATENT = LatentAttentionConfig(
    num_heads=4,
    head_dim=8,
    rotary_dim=4,
    value_dim=8,
    latent_dim=8,
    positions=RopeConfig(scaling=YARN),
    mscale=0.5,
)


# config, path of attributes to the dataclass, and another value for each of its fields
CASES: list[tuple[Any, str, dict[str, Any]]] = [
    (
        SEQ2SEQ,
        "",
        {
            "vocab_size": 40,
            "block": dataclasses.replace(BLOCK, embed_dim=24),
            "leading_blocks": (dataclasses.replace(BLOCK, residual="sequential"),),
            "positions": None,
            "logits": "tied",
            "logits_bias": True,
            "logits_softcap": 5.0,
            "scale_embeddings": True,
            "embedding_norm": True,
            "embedding_dim": 8,
            "dtype": "bfloat16",
            "remat": "full",
            "scan_unroll": 2,
            "num_encoder_layers": 3,
            "num_decoder_layers": 3,
            "encoder_block": dataclasses.replace(BLOCK, mlp=MlpConfig(mlp_dim=32)),
            "share_embeddings": False,
        },
    ),
    (
        DECODER,
        "",
        {
            "vocab_size": 40,
            "block": dataclasses.replace(BLOCK, embed_dim=24),
            "leading_blocks": (dataclasses.replace(BLOCK, residual="sequential"),),
            "positions": RelativePositionsConfig(),
            "logits": "tied_rescaled",
            "logits_bias": True,
            "logits_softcap": 5.0,
            "scale_embeddings": True,
            "embedding_norm": True,
            "embedding_dim": 8,
            "dtype": "float16",
            "remat": "minimal",
            "scan_unroll": 2,
            "num_layers": 3,
            "future_depth": 1,
        },
    ),
    (SEQ2SEQ, "positions", {"num_buckets": 16, "max_distance": 20, "per_layer": True}),
    (DECODER, "positions", {"max_length": 12, "offset": 2}),
    (
        dataclasses.replace(DECODER, positions=SinusoidalPositionsConfig()),
        "positions",
        {"max_wavelength": 100.0},
    ),
    (
        SEQ2SEQ,
        "block",
        {
            "embed_dim": 24,
            "attention": AttentionConfig(num_heads=2, head_dim=8),
            "mlp": MlpConfig(mlp_dim=32),
            "norm": NormConfig(kind="layer"),
            "cross_attention": AttentionConfig(num_heads=2, head_dim=8),
            "norm_placement": "sandwich",
            "dropout_rate": 0.2,
            "broadcast_dropout": False,
            "init_stddev": 0.02,
        },
    ),
    (
        SEQ2SEQ,
        "block.attention",
        {
            "num_heads": 8,
            "head_dim": 16,
            "num_kv_heads": 2,
            "logit_scale": "rsqrt_head_dim",
            "qkv_bias": True,
            "out_bias": True,
            "qk_norm": NormConfig(),
            "softcap": 5.0,
            "window": 3,
            "sinks": True,
        },
    ),
    (
        dataclasses.replace(
            DECODER, block=dataclasses.replace(BLOCK, attention=LATENT), positions=None
        ),
        "block.attention",
        {
            "num_heads": 2,
            "head_dim": 4,
            "rotary_dim": 8,
            "value_dim": 4,
            "latent_dim": 4,
            "query_dim": 4,
            "positions": RopeConfig(theta=100.0, scaling=YARN),
            "mscale": 1.0,
            "norm": NormConfig(epsilon=1e-3),
        },
    ),
    (with_positions(RopeConfig()), "block", {"residual": "parallel"}),
    (with_positions(RopeConfig()), "block", {"residual": "parallel_shared_norm"}),
    (with_positions(RopeConfig()), "block", {"norm_placement": "post"}),
    (with_positions(RopeConfig()), "block.attention", {"positions": None}),
    (WINDOWED, "encoder_block.attention", {"global_block_size": 4}),
    *(
        (with_positions(positions), "block.attention.positions", values)
        for positions, values in [
            (AlibiConfig(), {"scale": 0.5}),
            (TransformerXlPositionsConfig(), {"max_wavelength": 100.0}),
            (
                RopeConfig(),
                {
                    "theta": 100.0,
                    "fraction": 0.5,
                    "interleaved": True,
                    "scaling": LinearScaling(factor=2.0),
                },
            ),
        ]
    ),
    *(
        (with_positions(RopeConfig(scaling=scaling)), "block.attention.positions.scaling", values)
        for scaling, values in [
            (LinearScaling(factor=2.0), {"factor": 4.0}),
            (
                DynamicScaling(factor=2.0, original_length=8),
                {"factor": 4.0, "original_length": 4},
            ),
            (
                Llama3Scaling(
                    factor=2.0,
                    low_frequency_factor=1.0,
                    high_frequency_factor=4.0,
                    original_length=64,
                ),
                {
                    "factor": 4.0,
                    "low_frequency_factor": 2.0,
                    "high_frequency_factor": 8.0,
                    "original_length": 32,
                },
            ),
            (
                YarnScaling(factor=2.0, original_length=1000),
                {
                    "factor": 4.0,
                    "original_length": 100,
                    "beta_fast": 8.0,
                    "beta_slow": 5.0,
                    "attention_factor": 2.0,
                },
            ),
            (
                LongRopeScaling(
                    short_factors=(1.0, 1.0, 2.0, 2.0),
                    long_factors=(1.0, 2.0, 3.0, 4.0),
                    original_length=64,
                    max_length=128,
                ),
                {
                    "short_factors": (1.0, 1.0, 1.0, 2.0),
                    "original_length": 8,
                    "max_length": 256,
                    "attention_factor": 2.0,
                },
            ),
            (
                LongRopeScaling(
                    short_factors=(1.0, 1.0, 2.0, 2.0),
                    long_factors=(1.0, 2.0, 3.0, 4.0),
                    original_length=8,
                    max_length=128,
                ),
                {"long_factors": (1.0, 2.0, 3.0, 5.0)},
            ),
        ]
    ),
    (SEQ2SEQ, "block.mlp", {"mlp_dim": 32, "activations": ("silu", "linear"), "use_bias": True}),
    (
        SEQ2SEQ,
        "block.norm",
        {"kind": "layer", "epsilon": 1e-3, "use_bias": True, "scale_offset": 1.0},
    ),
]
OBJECTIVE_FIELDS = {
    "z_loss": 0.0,
    "label_smoothing": 0.1,
    "loss_normalizing_factor": "AVERAGE_PER_SEQUENCE",
}


def replaced(config: Any, path: str, **values: Any) -> Any:
    """`config` with fields of the dataclass at `path` replaced."""
    if not path:
        return dataclasses.replace(config, **values)
    name, _, rest = path.partition(".")
    inner = replaced(getattr(config, name), rest, **values)
    return dataclasses.replace(config, **{name: inner})


def fingerprint(config: Any, objective: Any = None) -> Iterator[str]:
    """Parameters, the training step and their initialisation as StableHLO, one when asked for."""
    model = ModelDef(config)
    batch = {
        name: jax.ShapeDtypeStruct((2, LENGTH), jnp.int32)
        for name in ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
    }
    batch["decoder_loss_weights"] = jax.ShapeDtypeStruct((2, LENGTH), jnp.float32)
    objective = objective or Seq2Seq()

    def loss(params, batch, key):
        total, _ = objective.loss(model.bind(params), batch, dropout_key=key)
        return total / objective.normalizer(batch)

    key = jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(model.init, key)
    step = jax.jit(jax.grad(loss)).trace(params, batch, key)
    yield str(model.param_info)
    yield step.lower().as_text()
    yield jax.jit(model.init).lower(key).as_text()


@functools.cache
def whole_fingerprint(config: Any, objective: Any = None) -> tuple[str, ...]:
    return tuple(fingerprint(config, objective))


def differ(config: Any, other: Any, objective: Any = None, other_objective: Any = None) -> bool:
    """Whether any part of the fingerprints is another; the rest is not made."""
    parts = zip(
        whole_fingerprint(config, objective), fingerprint(other, other_objective), strict=True
    )
    return any(one != another for one, another in parts)


def target(config: Any, path: str) -> Any:
    for name in path.split(".") if path else ():
        config = getattr(config, name)
    return config


def test_the_cases_are_of_every_field():
    covered: dict[type, set[str]] = {}
    for config, path, values in CASES:
        covered.setdefault(type(target(config, path)), set()).update(values)
    for kind, names in covered.items():
        assert names == {field.name for field in dataclasses.fields(kind)}, kind


@pytest.mark.parametrize("config", dict.fromkeys(config for config, _, _ in CASES))
def test_the_same_config_builds_the_same(config):
    assert not differ(config, copy.deepcopy(config))


@pytest.mark.parametrize(("config", "path", "values"), CASES)
def test_every_field_changes_the_model(config, path, values):
    assert replaced(config, path) == config
    for name, value in values.items():
        assert getattr(target(config, path), name) != value
        assert differ(config, replaced(config, path, **{name: value})), name


@pytest.mark.parametrize(("config", "objective"), [(SEQ2SEQ, Seq2Seq()), (DECODER, CausalLm())])
def test_every_field_changes_the_objective(config, objective):
    assert {field.name for field in dataclasses.fields(objective)} == OBJECTIVE_FIELDS.keys()
    for name, value in OBJECTIVE_FIELDS.items():
        other = dataclasses.replace(objective, **{name: value})
        assert differ(config, config, objective, other), name


@pytest.mark.parametrize(
    ("config", "path", "values", "message"),
    [
        (SEQ2SEQ, "", {"vocab_size": 0}, "vocab_size is 0; give an integer of at least 1"),
        (SEQ2SEQ, "", {"vocab_size": "8k"}, "vocab_size is '8k'; give an integer"),
        (SEQ2SEQ, "", {"dtype": "bfloat"}, "dtype is 'bfloat'; choose .* Did you mean 'bfloat16'"),
        (SEQ2SEQ, "", {"logits": "tie"}, "logits is 'tie'; choose from .* Did you mean 'tied'"),
        (SEQ2SEQ, "", {"positions": 128}, "positions is 128; give a RelativePositionsConfig or"),
        (SEQ2SEQ, "", {"remat": "some"}, "remat policy 'some' is unknown"),
        (SEQ2SEQ, "positions", {"num_buckets": 6}, "num_buckets 6 must be a multiple of 4"),
        (
            SEQ2SEQ,
            "block",
            {"dropout_rate": 1.0},
            r"dropout_rate is 1.0; give a number in \[0, 1\)",
        ),
        (SEQ2SEQ, "block", {"mlp": None}, "mlp is None; give a MlpConfig"),
        (SEQ2SEQ, "block.attention", {"num_kv_heads": 3}, "3 does not divide num_heads 4"),
        (SEQ2SEQ, "block.attention", {"qkv_bias": 1}, "qkv_bias is 1; give True or False"),
        (SEQ2SEQ, "block.attention", {"logit_scale": "sqrt"}, "logit_scale is 'sqrt'; give a"),
        (SEQ2SEQ, "block.attention", {"window": 0}, "window is 0; give an integer of at least 1"),
        (SEQ2SEQ, "block.attention", {"global_block_size": 4}, "4 and window None; global tokens"),
        (SEQ2SEQ, "block", {"norm_placement": "before"}, "norm_placement is 'before'; choose"),
        (
            DECODER,
            "block",
            {"residual": "parallel", "norm_placement": "post"},
            "residual 'parallel' goes with norm_placement 'pre', not 'post'",
        ),
        (
            with_positions(RopeConfig()),
            "block.attention.positions",
            {"fraction": 1.5},
            r"fraction is 1.5; give a number in \(0, 1\]",
        ),
        (
            with_positions(RopeConfig()),
            "block.attention",
            {"head_dim": 7},
            "fraction 1.0 of head_dim 7 rotates 7 dims; it must be an even number",
        ),
        (
            DECODER,
            "",
            {"block": (BLOCK, dataclasses.replace(BLOCK, embed_dim=8))},
            r"blocks of embed_dim \[8, 16\]; a residual stream has one width",
        ),
        (SEQ2SEQ, "block.mlp", {"activations": ("geglu",)}, "Did you mean 'gelu'"),
        (SEQ2SEQ, "block.mlp", {"activations": ()}, "activations is empty"),
        (SEQ2SEQ, "block.norm", {"kind": "rsm"}, "kind is 'rsm'; .* Did you mean 'rms'"),
    ],
)
def test_bad_values_are_refused(config, path, values, message):
    with pytest.raises(UserError, match=message):
        replaced(config, path, **values)


def test_sequence_longer_than_learned_positions():
    model = ModelDef(DECODER)
    tokens = jax.ShapeDtypeStruct((1, 17), jnp.int32)
    batch = {"decoder_input_tokens": tokens, "decoder_target_tokens": tokens}
    params = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)))
    with pytest.raises(UserError, match="17 tokens is longer than the 16 learned positions"):
        jax.eval_shape(lambda p, b: model.bind(p)(b), params, batch)
