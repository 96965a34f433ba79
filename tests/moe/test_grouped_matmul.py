"""The product of every row with its group's matrix, in blocks that are filled more or less."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.kernels.grouped_matmul import Groups, grouped_matmul
from t5x_like.parallel.logical import use_rules
from t5x_like.parallel.mesh import MeshConfig

from .conftest import RULES, call, layer
from .test_meshes import SHARED, SigmoidRouter

SIZES = np.array([0, 300, 1, 128, 40, 0, 97, 260, 0], np.int32)


@pytest.mark.parametrize("block", [16, 128])
def test_like_one_product_a_group(block):
    rng = np.random.default_rng(0)
    total, groups = int(SIZES.sum()), Groups.of(jnp.asarray(SIZES), total=830, block=block)
    x = rng.normal(size=(groups.num_rows, 12)).astype(np.float32)
    w = rng.normal(size=(len(SIZES), 12, 20)).astype(np.float32)
    probe = rng.normal(size=(total, 20)).astype(np.float32)

    @jax.jit
    def run(x: Any, w: Any) -> Any:
        y, transpose = jax.vjp(lambda x, w: grouped_matmul(x, w, groups)[:total], x, w)
        return y, transpose(probe)

    y, (dx, dw) = run(x, w)
    ends = np.cumsum(SIZES)
    for e, (start, end) in enumerate(zip(ends - SIZES, ends, strict=True)):
        close(y[start:end], x[start:end] @ w[e])
        close(dx[start:end], probe[start:end] @ w[e].T)
        close(dw[e], x[start:end].T @ probe[start:end])
    assert np.isfinite(dx).all()


def close(actual: Any, expected: Any) -> None:
    """1e-5 of sums of at most 300 products of normal draws."""
    np.testing.assert_allclose(
        actual, expected, rtol=0, atol=1e-5 * max(1, np.ptp(expected)) if expected.size else 0
    )


def test_large_blocks_on_a_mesh():
    """Branches by size inside a loop, with kernels that the tensor axis cuts."""
    model = layer(router=SigmoidRouter(k=2), shared_expert=SHARED)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda i: (0.3 * rng.normal(size=i.shape)).astype("f4"), model.param_info)
    x = rng.normal(size=(8, 160, 8)).astype(np.float32)
    real, ids = np.ones((8, 160), bool), np.zeros((8, 160), np.int32)

    def loss(params: Any, x: Any) -> Any:
        return jnp.sum(call(model, params, x, real, ids)[0] ** 2)

    expected = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x)
    mesh = MeshConfig(ici={"data": 2, "expert": 2, "tensor": 2}).build()
    with use_rules(mesh, RULES):
        actual = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x)
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=0, atol=1e-5 * np.abs(e).max()),
        jax.device_get(actual),
        jax.device_get(expected),
    )
