"""Attention and the relative bias against plain formulas, in value and in every gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.kernels.attention import AttentionMask, attention
from t5x_like.kernels.matmul import einsum_float32, project, transposed_product
from t5x_like.kernels.position_bias import RelativeBias, relative_position_bucket

B, T, S, H, D = 2, 6, 9, 4, 8


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def plain_attention(q, k, v, table, allowed, keep, *, scale=1.0, bidirectional=True):
    """[B, T, H, D] attention written out, without a custom gradient."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    logits = jnp.einsum("bthd,bshd->bhts", q * scale, k)
    distance = np.arange(k.shape[1])[None] - np.arange(q.shape[1])[:, None]
    buckets = relative_position_bucket(
        distance, bidirectional=bidirectional, num_buckets=table.shape[1], max_distance=16
    )
    logits = jnp.where(allowed[:, None], logits + table[:, buckets], -1e30)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(logits) * keep, v)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("kept", [1.0, 0.5])
def test_attention_equals_formula_in_every_gradient(kv_heads, kept):
    q, k, v = draw(B, T, H, D), draw(B, S, kv_heads, D, seed=1), draw(B, S, kv_heads, D, seed=2)
    table = draw(H, 8, seed=3)
    valid = jnp.arange(S) < jnp.array([[S], [4]])
    keep = jax.random.bernoulli(jax.random.key(4), kept, (B, H, 1, S)) / kept
    cotangent = draw(B, T, H, D, seed=5)

    def ours(q, k, v, table):
        return attention(
            q,
            k,
            v,
            mask=AttentionMask(key_valid=valid),
            bias=RelativeBias(table=table, bidirectional=True, max_distance=16),
            scale=0.3,
            dropout=lambda shape: keep,
        )

    def plain(q, k, v, table):
        allowed = jnp.broadcast_to(valid[:, None], (B, T, S))
        return plain_attention(q, k, v, table, allowed, keep, scale=0.3)

    def value_and_gradients(function):
        value, vjp = jax.vjp(function, q, k, v, table)
        return value, vjp(cotangent)

    actual, expected = (jax.jit(value_and_gradients, static_argnums=0)(f) for f in (ours, plain))
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, atol=2e-5), actual, expected)


def test_mask_parts_combine():
    prefix = jnp.array([[1, 1, 1, 0, 0, 0]])
    segments = jnp.array([[1, 1, 1, 1, 2, 2]])
    valid = jnp.array([[True, False, True, True, True, True]])
    mask = AttentionMask(
        causal=True,
        query_segments=segments,
        key_segments=segments,
        key_valid=valid,
        prefix=prefix,
    )
    expected = [
        [1, 0, 1, 0, 0, 0],
        [1, 0, 1, 0, 0, 0],
        [1, 0, 1, 0, 0, 0],
        [1, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1, 1],
    ]
    np.testing.assert_array_equal(mask.allowed(6, 6)[0], np.array(expected, bool))
    assert AttentionMask().allowed(6, 6) is None


def test_row_that_sees_nothing_is_finite_and_gives_no_gradient():
    q, k, v = (draw(1, 3, 2, 4, seed=i) for i in range(3))
    mask = AttentionMask(key_valid=jnp.zeros((1, 3), bool))
    out, vjp = jax.vjp(lambda q, k: attention(q, k, v, mask=mask), q, k)
    np.testing.assert_allclose(out[0, 0], v[0].mean(0), rtol=1e-5)
    assert all(not np.any(grad) for grad in vjp(jnp.ones_like(out)))


@pytest.mark.parametrize(("query_length", "key_length"), [(1, 1), (5, 5), (3, 7), (7, 3)])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_dense_relative_bias_equals_look_up(query_length, key_length, bidirectional):
    table = draw(H, 8)
    bias = RelativeBias(table=table, bidirectional=bidirectional, max_distance=16)
    distance = np.arange(key_length)[None] - np.arange(query_length)[:, None]
    buckets = relative_position_bucket(
        distance, bidirectional=bidirectional, num_buckets=8, max_distance=16
    )
    np.testing.assert_array_equal(bias.dense(query_length, key_length), table[:, buckets])


def test_products_and_their_gradients():
    x, kernel, cotangent = draw(2, 3, 4), draw(4, 5, seed=1), draw(2, 3, 5, seed=2)
    expected, expected_vjp = jax.vjp(jnp.matmul, x, kernel)
    for float32 in (False, True):
        actual, vjp = jax.vjp(lambda x, k, f=float32: project(x, k, float32=f), x, kernel)
        np.testing.assert_allclose(actual, expected, rtol=1e-5)
        for a, e in zip(vjp(cotangent), expected_vjp(cotangent), strict=True):
            np.testing.assert_allclose(a, e, rtol=1e-5)
    y, z = draw(2, 3, 4, 5), draw(2, 3, 4, 6, seed=1)
    np.testing.assert_allclose(
        transposed_product(y, z), y.swapaxes(-1, -2) @ z, rtol=1e-4, atol=1e-5
    )


def test_einsum_float32_keeps_low_precision_in_the_backward_pass():
    x, y = draw(3, 4).astype(jnp.bfloat16), draw(4, 5).astype(jnp.bfloat16)
    product = lambda x, y: einsum_float32("ni,io->no", x, y)  # noqa: E731
    assert product(x, y).dtype == jnp.float32
    backward = jax.make_jaxpr(lambda x, y, g: jax.vjp(product, x, y)[1](g))(x, y, jnp.ones((3, 5)))
    dots = [e for e in backward.eqns if e.primitive.name == "dot_general"]
    assert len(dots) == 3
    assert all(v.aval.dtype == jnp.bfloat16 for e in dots for v in e.invars)
