"""Steps of DeepSeek-V3 in small: latent attention, experts, multi-token prediction, packed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.errors import UserError
from t5x_like.layers.cache import CacheShape
from t5x_like.layers.latent_attention import LatentAttentionConfig
from t5x_like.layers.mlp import MlpConfig
from t5x_like.layers.moe.layer import MoeConfig
from t5x_like.layers.moe.routers import SigmoidRouter
from t5x_like.layers.rope import RopeConfig, YarnScaling
from t5x_like.models import cached
from t5x_like.models.base import ModelDef
from t5x_like.models.block import BlockConfig
from t5x_like.models.decoder_only import DecoderOnlyConfig
from t5x_like.models.encoder_decoder import EncoderDecoderConfig
from t5x_like.objectives.causal_lm import CausalLm
from t5x_like.objectives.multi_token import MultiTokenLm
from t5x_like.parallel.mesh import MeshConfig
from t5x_like.training.flops import forward_flops
from t5x_like.training.optimizers.adamw import AdamWConfig
from t5x_like.training.state import init_state, state_shapes, state_shardings
from t5x_like.training.step import StepConfig, jit_train_step, make_train_step

from .conftest import RULES

B1, ROWS, LENGTH, VOCAB = 0.9, 8, 12, 32
LATENT = LatentAttentionConfig(
    num_heads=2,
    head_dim=6,
    rotary_dim=4,
    value_dim=8,
    latent_dim=8,
    query_dim=12,
    positions=RopeConfig(interleaved=True, scaling=YarnScaling(factor=4.0, original_length=8)),
    mscale=1.0,
)
DENSE = BlockConfig(embed_dim=8, attention=LATENT, mlp=MlpConfig(mlp_dim=16))
MOE = MoeConfig(
    num_experts=8,
    expert=MlpConfig(mlp_dim=8),
    router=SigmoidRouter(k=2, bias_rate=0.01, sequence_loss=0.5),
    shared_expert=MlpConfig(mlp_dim=8),
)
SPARSE = BlockConfig(embed_dim=8, attention=LATENT, mlp=MOE)
SIZES: dict[str, Any] = {"vocab_size": VOCAB, "dtype": "float32"}
CONFIG = DecoderOnlyConfig(
    block=SPARSE, leading_blocks=(DENSE,), num_layers=2, future_depth=1, **SIZES
)
MODEL = ModelDef(CONFIG)


def batch() -> dict[str, Any]:
    """Two examples a row, of other lengths in every row, and padding."""
    rng = np.random.default_rng(0)
    first, both = np.arange(ROWS)[:, None] % 4 + 2, np.arange(ROWS)[:, None] % 5 + 8
    at = np.arange(LENGTH)
    segments = (1 + (at >= first)) * (at < both)
    targets = rng.integers(1, VOCAB, segments.shape) * (segments > 0)
    starts = (at == 0) | (at == first)
    arrays = {
        "decoder_target_tokens": targets,
        "decoder_input_tokens": np.where(starts, 0, np.roll(targets, 1, axis=1)),
        "decoder_segment_ids": segments,
        "decoder_positions": np.where(at >= first, at - first, at),
    }
    arrays = {name: x.astype(np.int32) for name, x in arrays.items()}
    return arrays | {"decoder_loss_weights": (segments > 0).astype(np.float32)}


def first_step(mesh: dict[str, int] | None, microbatches: int) -> Any:
    """Gradients, metrics and new parameters."""
    devices = jax.devices() if mesh else jax.devices()[:1]
    on = MeshConfig(ici=mesh or {"data": 1}).build(devices)
    optimizer = AdamWConfig(b1=B1).build(MODEL.param_info)
    config = StepConfig(microbatches=microbatches)
    step = make_train_step(MODEL, MultiTokenLm(), optimizer, lambda _: jnp.float32(1e-2), config)
    shardings = state_shardings(MODEL, optimizer, on, RULES)
    run = jit_train_step(step, mesh=on, rules=RULES, shardings=shardings)
    state = init_state(MODEL, optimizer, on, RULES, jax.random.key(0))
    state, metrics = run(state, batch(), jax.random.key(1))
    # After one step, Adam's first moment is (1 - b1) times the gradient.
    grads = jax.tree.map(lambda m: np.asarray(m) / (1 - B1), state.opt_state.mu)
    return grads, jax.device_get(metrics), jax.device_get(state.params)


def future_bias(params: Any) -> np.ndarray:
    return params["future"]["layers"]["block"]["mlp"]["router"]["balance_bias"]


def test_neither_microbatches_nor_meshes_change_a_step():
    grads, metrics, params = first_step(None, 1)
    assert np.abs(grads["future"]["layers"]["block"]["mlp"]["router"]["kernel"]).max() > 1e-4
    # Tokens that have another one further on, in the same example: all but two a row.
    segments = batch()["decoder_segment_ids"]
    assert metrics["moe_loads/future/layers/block"].sum() == 2 * ((segments > 0).sum() - 2 * ROWS)
    assert set(np.unique(np.abs(future_bias(params)))) <= {np.float32(0), np.float32(0.01)}
    assert future_bias(params).any()
    others = first_step({"fsdp": 2, "expert": 2, "tensor": 2}, 2)

    def check(a: Any, e: Any) -> None:
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-5 * max(1.0, np.abs(e).max()))

    jax.tree.map(check, others[:2], (grads, metrics))
    np.testing.assert_array_equal(future_bias(others[2]), future_bias(params))


def test_another_objective_leaves_the_modules_alone():
    """Traced only: their gradient is zero, and their balance bias has no load to go by."""
    optimizer = AdamWConfig().build(MODEL.param_info)
    step = make_train_step(MODEL, CausalLm(), optimizer, jnp.float32, StepConfig())
    state = state_shapes(MODEL, optimizer)
    new, metrics = jax.eval_shape(step, state, batch(), jax.random.key(0))
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert not any("future" in name for name in metrics)


def test_the_cache_holds_latents():
    """And no heads: one array is `latent_dim` wide, the other `rotary_dim`."""
    module = MODEL.bind(jax.tree.map(lambda i: jnp.zeros(i.shape, i.dtype), MODEL.param_info))
    start, lengths = jnp.zeros(3, jnp.int32), jnp.full(3, 9)
    _, caches = jax.eval_shape(
        lambda: cached.prefill(
            module,
            jnp.zeros((3, 5), jnp.int32),
            start=start,
            lengths=lengths,
            shape=CacheShape(slots=9),
        )
    )
    shapes = {x.shape for x in jax.tree.leaves(caches)}
    assert shapes == {(1, 3, 1, 9, LATENT.latent_dim), (1, 3, 1, 9, LATENT.rotary_dim)}


def test_flops():
    """Products of a token by hand: latent attention, experts, and what predicts further."""
    sizes = {"decoder_input_tokens": (ROWS, LENGTH)}
    down = 8 * (12 + 8 + 4)
    attention = down + 12 * 2 * (6 + 4) + 8 * 2 * (6 + 8) + 2 * 8 * 8
    pairs = LENGTH / 2 * 2 * (6 + 4 + 8)  # half of the square, heads, dims
    experts = 8 * 8 + 3 * 3 * 8 * 8  # router; two experts and the shared one, gated
    blocks = 3 * (attention + pairs) + 3 * 8 * 16 + 2 * experts
    total = blocks + 2 * VOCAB * 8 + 16 * 8
    assert forward_flops(MODEL, sizes) == pytest.approx(2 * ROWS * LENGTH * total, rel=1e-9)


def test_bad_input():
    with pytest.raises(UserError, match=r"mscale is 0\.7 and positions\.scaling None; it goes"):
        LatentAttentionConfig(
            num_heads=2, head_dim=4, rotary_dim=4, value_dim=4, latent_dim=4, mscale=0.7
        )
    with pytest.raises(UserError, match="rotates 3 dims; it must be an even number"):
        LatentAttentionConfig(num_heads=2, head_dim=4, rotary_dim=3, value_dim=4, latent_dim=4)
    with pytest.raises(UserError, match="cross_attention is None and attention a LatentAttention"):
        EncoderDecoderConfig(
            block=DENSE, num_encoder_layers=1, num_decoder_layers=1, **SIZES
        ).build()
