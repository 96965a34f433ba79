"""Windows, caps, sinks, positions and global tokens against formulas written out pair by pair."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from t5x_like.kernels.attention import AttentionMask, GlobalKeys, attention
from t5x_like.kernels.position_bias import AlibiBias, RelativeBias, relative_position_bucket
from t5x_like.layers.attention import AttentionConfig
from t5x_like.layers.dropout import dropout
from t5x_like.layers.mlp import MlpConfig
from t5x_like.layers.positions import TransformerXlPositionsConfig, sinusoid
from t5x_like.models.base import ModelDef
from t5x_like.models.block import BlockConfig
from t5x_like.models.decoder_only import DecoderOnlyConfig
from t5x_like.models.stack import layer_slots
from t5x_like.objectives.causal_lm import CausalLm

B, T, H, K, D = 2, 21, 4, 2, 8


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def assert_same_with_gradients(ours, plain, arguments, *, atol=3e-5):
    """Values and the gradient of every argument, for a random cotangent."""

    def run(function):
        value, vjp = jax.vjp(function, *arguments)
        return value, vjp(draw(*value.shape, seed=99))

    actual, expected = jax.jit(run, static_argnums=0)(ours), jax.jit(run, static_argnums=0)(plain)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, atol=atol), actual, expected)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [1, 3, 5, 10, 30])
@pytest.mark.parametrize("extras", ["plain", "all"])
def test_windows_caps_and_sinks(causal, window, extras):
    """Windows below half of the length run in blocks; the formula masks the whole square."""
    full = extras == "all"
    q, k, v = draw(B, T, H, D), draw(B, T, K, D, seed=1), draw(B, T, K, D, seed=2)
    table, sinks = draw(H, 8, seed=3), draw(H, seed=4)
    segments = jnp.where(jnp.arange(T) < jnp.array([[9], [T]]), 1, 2)
    valid = jnp.arange(T) < jnp.array([[T], [16]])
    mask = AttentionMask(causal=causal, window=window)
    if full:
        mask = dataclasses.replace(
            mask, query_segments=segments, key_segments=segments, key_valid=valid
        )

    def ours(q, k, v, table, sinks):
        bias = RelativeBias(table=table, bidirectional=not causal, max_distance=16)
        out = attention(
            q,
            k,
            v,
            mask=mask,
            bias=bias if full else None,
            scale=0.4,
            softcap=2.0 if full else None,
            sinks=sinks if full else None,
        )
        return out * valid[:, :, None, None]

    def plain(q, k, v, table, sinks):
        k, v = (jnp.repeat(x, H // K, axis=2) for x in (k, v))
        logits = jnp.einsum("bthd,bshd->bhts", 0.4 * q, k)
        distance = np.arange(T)[:, None] - np.arange(T)
        allowed = jnp.broadcast_to(abs(distance) < window, (B, T, T))
        if causal:
            allowed = allowed & (distance >= 0)
        if full:
            allowed &= (segments[:, :, None] == segments[:, None]) & valid[:, None]
            buckets = relative_position_bucket(
                -distance, bidirectional=not causal, num_buckets=8, max_distance=16
            )
            logits = 2.0 * jnp.tanh((logits + table[:, buckets]) / 2.0)
        logits = jnp.where(allowed[:, None], logits, -1e30)
        if full:
            sink = jnp.broadcast_to(sinks[:, None, None], (B, H, T, 1))
            logits = jnp.concatenate([logits, sink], -1)
        weights = jax.nn.softmax(logits)[..., :T]
        return jnp.einsum("bhts,bshd->bthd", weights, v) * valid[:, :, None, None]

    assert_same_with_gradients(ours, plain, (q, k, v, table, sinks))


def test_memory_of_a_window_is_linear_in_the_length():
    """No array of the compiled gradient has as many elements as one head's square."""
    length, window = 512, 16
    q = jax.ShapeDtypeStruct((1, length, 1, 4), jnp.float32)
    mask = AttentionMask(causal=True, window=window)
    step = jax.grad(lambda q, k, v: attention(q, k, v, mask=mask).sum(), (0, 1, 2))
    jaxpr = jax.make_jaxpr(step)(q, q, q)

    def largest(jaxpr) -> int:
        sizes = [v.aval.size for e in jaxpr.eqns for v in e.outvars]
        inner = [largest(j) for e in jaxpr.eqns for j in jaxprs_in_params(e.params)]
        return max(sizes + inner)

    assert largest(jaxpr.jaxpr) <= 4 * window * length < length * length


@pytest.mark.parametrize("window", [None, 4])
def test_global_keys_join_the_window(window):
    q, k, v = draw(B, T, H, D), draw(B, T, K, D, seed=1), draw(B, T, K, D, seed=2)
    gk, gv = draw(B, 3, K, D, seed=3), draw(B, 3, K, D, seed=4)
    bias = draw(B, H, T, 3, seed=5)
    allowed = jax.random.bernoulli(jax.random.key(6), 0.5, (B, T, 3))

    def ours(q, k, v, gk, gv, bias):
        extra = GlobalKeys(key=gk, value=gv, bias=bias, allowed=allowed)
        return attention(q, k, v, mask=AttentionMask(window=window), global_keys=extra)

    def plain(q, k, v, gk, gv, bias):
        k, v = (jnp.repeat(jnp.concatenate(x, 1), H // K, 2) for x in ((k, gk), (v, gv)))
        distance = np.arange(T)[:, None] - np.arange(T)
        near = jnp.broadcast_to(abs(distance) < (window or T), (B, T, T))
        logits = jnp.einsum("bthd,bshd->bhts", q, k)
        logits = logits + jnp.concatenate([jnp.zeros((B, H, T, T)), bias], -1)
        both = jnp.concatenate([near, allowed], -1)[:, None]
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(jnp.where(both, logits, -1e30)), v)

    assert_same_with_gradients(ours, plain, (q, k, v, gk, gv, bias))


def test_alibi_slopes():
    """The paper's: 1/2 ... 1/256 for 8 heads; every other one of 16 heads' for the rest of 12."""
    np.testing.assert_allclose(AlibiBias(num_heads=8, scale=1.0).slopes(), 0.5 ** np.arange(1, 9))
    twelve = AlibiBias(num_heads=12, scale=2.0).slopes() / 2
    np.testing.assert_allclose(twelve[8:], 0.5 ** np.array([0.5, 1.5, 2.5, 3.5]))
    dense = AlibiBias(num_heads=8, scale=1.0).dense(3, 5, first_key=-1)
    distance = np.arange(5)[None] - 1 - np.arange(3)[:, None]
    np.testing.assert_allclose(dense[1], -0.25 * abs(distance))


def test_transformer_xl_logits_pair_by_pair():
    """`(q + content_bias) . k + (q + position_bias) . relative(sinusoid(i - j))`."""
    attention_config = AttentionConfig(
        num_heads=2,
        head_dim=4,
        logit_scale="rsqrt_head_dim",
        positions=TransformerXlPositionsConfig(),
    )
    block = BlockConfig(embed_dim=8, attention=attention_config, mlp=MlpConfig(mlp_dim=8))
    model = ModelDef(DecoderOnlyConfig(vocab_size=8, num_layers=1, block=block, dtype="float32"))
    params = jax.tree.map(
        lambda i: draw(*i.shape, seed=sum(i.shape)),
        model.param_info,
        is_leaf=lambda i: hasattr(i, "logical_axes"),
    )
    layer = model.bind(params).decoder.layers
    layer = jax.tree.map(lambda x: x[0], layer)  # the only layer
    module, x = layer.self_attention, draw(1, 5, 8, seed=7)
    xl = module.xl_positions
    query = module._project("query", x)
    content, by_position = xl(query, scale=0.5, key_length=5)
    u, r = (p[...].reshape(2, 4) for p in (xl.content_bias, xl.position_bias))
    np.testing.assert_allclose(content, query + u, rtol=1e-6)
    for i in range(5):
        for j in range(5):
            table = sinusoid(np.array([i - j]), dim=8, max_wavelength=1e4)
            key = (table @ xl.relative.kernel[...]).reshape(2, 4)
            expected = 0.5 * np.sum((query[0, i] + r) * key, axis=-1)
            np.testing.assert_allclose(by_position[0, :, i, j], expected, rtol=1e-4, atol=1e-5)


def pattern_config(num_layers: int, **fields) -> DecoderOnlyConfig:
    def block(window: int | None) -> BlockConfig:
        return BlockConfig(
            embed_dim=16,
            attention=AttentionConfig(num_heads=2, head_dim=8, window=window),
            mlp=MlpConfig(mlp_dim=16),
            dropout_rate=0.1,
        )

    return DecoderOnlyConfig(
        vocab_size=20,
        num_layers=num_layers,
        block=(block(2), block(3), block(None)),
        dtype="float32",
        **fields,
    )


def test_layer_slots():
    config = pattern_config(5)
    assert layer_slots(config.block, 5) == [
        ("group_0/block_0", 0),
        ("group_0/block_1", 0),
        ("group_0/block_2", 0),
        ("group_1/block_0", 0),
        ("group_1/block_1", 0),
    ]
    assert layer_slots(config.block[0], 2) == [("layers", 0), ("layers", 1)]
    assert layer_slots(config.block, 2) == [("group_0/block_0", 0), ("group_0/block_1", 0)]


@pytest.mark.parametrize("num_layers", [2, 6, 7])
def test_a_pattern_runs_its_layers_in_order(num_layers):
    """A pattern equals its blocks called one after another, in values and gradients."""
    model = ModelDef(pattern_config(num_layers))
    params = jax.jit(model.init)(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 1, 20)
    batch = {
        "decoder_input_tokens": tokens,
        "decoder_target_tokens": tokens,
        "decoder_loss_weights": jnp.ones((2, 9)),
    }
    key = jax.random.key(2)

    def by_hand(params):
        module = model.bind(params)
        stack = module.decoder
        x = module.embed(tokens)
        keys = [jax.random.fold_in(key, i) for i in range(3)]
        x = dropout(x, rate=0.1, key=keys[0], broadcast_dims=(-2,))
        mask = AttentionMask(causal=True, key_valid=tokens > 0)
        for layer, (path, index) in enumerate(layer_slots(model.config.block, num_layers)):
            block = stack
            for name in path.split("/"):
                block = getattr(block, name)
            block = jax.tree.map(lambda p, i=index: p[i], block)
            x, _ = block(x, mask=mask, dropout_key=jax.random.fold_in(keys[1], layer))
        x = dropout(stack.decoder_norm(x), rate=0.1, key=keys[2], broadcast_dims=(-2,))
        return module.to_logits(x)

    def scanned(params):
        return model.bind(params)(batch, dropout_key=key)

    def loss(run):
        return jax.jit(jax.value_and_grad(lambda p: jnp.sum(jnp.square(run(p)))))(params)

    (actual, actual_grad), (expected, expected_grad) = loss(scanned), loss(by_hand)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-4),
        actual_grad,
        expected_grad,
    )


def test_program_does_not_grow_with_the_repeats_of_a_pattern():
    def lines(num_layers: int) -> int:
        model = ModelDef(pattern_config(num_layers))
        tokens = jax.ShapeDtypeStruct((2, 9), jnp.int32)
        batch = {
            "decoder_input_tokens": tokens,
            "decoder_target_tokens": tokens,
            "decoder_loss_weights": jax.ShapeDtypeStruct((2, 9), jnp.float32),
        }
        params = jax.eval_shape(model.init, jax.random.key(0))
        loss = lambda p, b: CausalLm().loss(model.bind(p), b)[0]  # noqa: E731
        return jax.jit(jax.grad(loss)).lower(params, batch).as_text().count("\n")

    assert lines(6) == lines(60)
