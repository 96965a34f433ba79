"""Sinusoidal positions, factorised and separate token tables, biased and capped logits."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.layers.attention import AttentionConfig
from t5x_like.layers.mlp import MlpConfig
from t5x_like.layers.norms import NormConfig
from t5x_like.layers.positions import SinusoidalPositionsConfig, sinusoid
from t5x_like.models.base import ModelDef
from t5x_like.models.block import BlockConfig
from t5x_like.models.decoder_only import DecoderOnlyConfig
from t5x_like.models.encoder_decoder import EncoderDecoderConfig

EMBED, VOCAB = 8, 11
BLOCK = BlockConfig(
    embed_dim=EMBED,
    attention=AttentionConfig(num_heads=2, head_dim=4),
    mlp=MlpConfig(mlp_dim=8),
    norm=NormConfig(kind="layer", use_bias=True),
)


def drawn(model: ModelDef) -> dict:
    """Random values for every parameter, also for those that start as zeros."""
    leaves, tree = jax.tree.flatten(model.param_info, is_leaf=lambda x: hasattr(x, "shape"))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    values = [jax.random.normal(k, i.shape) for k, i in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, values)


def test_sinusoids_are_those_of_the_paper():
    """sin and cos of `position / 10000 ** (2 i / dim)`, sines first."""
    table = sinusoid(np.arange(30), dim=6, max_wavelength=10000.0)
    for position in (0, 1, 29):
        for i in range(3):
            angle = position / 10000 ** (2 * i / 6)
            np.testing.assert_allclose(table[position, i], math.sin(angle), atol=1e-5)
            np.testing.assert_allclose(table[position, 3 + i], math.cos(angle), atol=1e-5)


def test_sinusoids_are_those_of_transformers():
    torch = pytest.importorskip("torch", reason="Hugging Face's models are PyTorch's")
    marian = pytest.importorskip("transformers.models.marian.modeling_marian")
    theirs = marian.MarianSinusoidalPositionalEmbedding(20, 16)
    if hasattr(theirs, "create_weight"):
        theirs.weight.data = theirs.create_weight()
    expected = theirs(torch.Size([1, 20])).detach().numpy()
    np.testing.assert_allclose(
        sinusoid(np.arange(20), dim=16, max_wavelength=10000.0), expected, atol=1e-5
    )


def test_embed_adds_what_the_config_says():
    """scale * table @ projection + sinusoid, then the norm."""
    config = DecoderOnlyConfig(
        vocab_size=VOCAB,
        num_layers=1,
        block=BLOCK,
        positions=SinusoidalPositionsConfig(),
        logits="tied",
        logits_bias=True,
        logits_softcap=3.0,
        scale_embeddings=True,
        embedding_norm=True,
        embedding_dim=3,
        dtype="float32",
    )
    model = ModelDef(config)
    params = drawn(model)
    module, tokens = model.bind(params), jnp.array([[1, 5, 2, 0]])
    positions = jnp.array([[0, 1, 0, 1]])
    table, project = params["token_embedder"]["embedding"], params["embedding_projection"]["kernel"]
    assert table.shape == (VOCAB, 3) and project.shape == (3, EMBED)
    x = (table[tokens] @ project) * math.sqrt(EMBED)
    x = x + sinusoid(positions, dim=EMBED, max_wavelength=10000.0)
    x = x - x.mean(-1, keepdims=True)
    x = x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
    norm = params["embedding_norm"]
    np.testing.assert_allclose(
        module.embed(tokens, positions), x * norm["scale"] + norm["bias"], atol=1e-4
    )
    y = jax.random.normal(jax.random.key(1), (1, 4, EMBED))
    logits = y @ params["logits_projection"]["kernel"] @ table.T + params["logits_bias"]
    np.testing.assert_allclose(module.to_logits(y), 3 * jnp.tanh(logits / 3), atol=1e-4)


def test_separate_token_tables():
    config = EncoderDecoderConfig(
        vocab_size=VOCAB,
        num_encoder_layers=1,
        num_decoder_layers=1,
        block=BLOCK,
        share_embeddings=False,
        logits="tied",
        dtype="float32",
    )
    model = ModelDef(config)
    params, tokens = drawn(model), jnp.array([[1, 5, 2]])
    batch = {"encoder_input_tokens": tokens, "decoder_input_tokens": tokens}
    apply = jax.jit(lambda p: model.bind(p)(batch))
    before = apply(params)
    names = ("encoder_token_embedder", "token_embedder")
    for name in names:
        changed = params | {name: {"embedding": params[name]["embedding"] * 1.5}}
        assert not np.allclose(apply(changed), before)
    # The encoder reads its own table only.
    encode = jax.jit(lambda p: model.bind(p).encode(tokens))
    other = params | {"token_embedder": {"embedding": params["token_embedder"]["embedding"] + 1}}
    np.testing.assert_array_equal(encode(other), encode(params))
