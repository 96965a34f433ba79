"""Token by token with a cache, the logits are those of the whole sequence at once."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.layers.cache import CacheShape, DecodingStep
from t5x_like.models import cached
from t5x_like.models.base import ModelDef
from t5x_like.models.encoder_decoder import EncoderDecoderConfig

from .configs import CONFIGS, VOCAB
from .conftest import random_params

LENGTHS = np.array([14, 17, 11])  # of whole sequences
PROMPTS = np.array([5, 8, 2])
SLOTS, PROMPT_SLOTS = 17, 8
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.03}  # of the largest logit


def example(config: Any) -> dict[str, np.ndarray]:
    """Three sequences, right-padded, with id 0 among their tokens."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (3, LENGTHS.max())).astype(np.int32)
    valid = np.arange(LENGTHS.max()) < LENGTHS[:, None]
    batch = {"decoder_input_tokens": tokens * valid, "decoder_target_tokens": 1 * valid}
    if isinstance(config, EncoderDecoderConfig):
        inputs = rng.integers(1, VOCAB, (3, 9)).astype(np.int32)
        batch["encoder_input_tokens"] = inputs * (np.arange(9) < np.array([[9], [4], [1]]))
    return batch


@functools.partial(jax.jit, static_argnames=("model", "unrolled"))
def step_by_step(model, params, batch, *, unrolled: bool) -> jax.Array:
    """[3, SLOTS - PROMPT_SLOTS + 1, vocab]: the logits after every slot from the last prompt's."""
    module, tokens = model.bind(params), batch["decoder_input_tokens"]
    start = PROMPT_SLOTS - PROMPTS
    slots = jnp.arange(SLOTS)
    tokens = jnp.take_along_axis(tokens, jnp.clip(slots - start[:, None], 0, 16), axis=1)
    context: dict[str, Any] = {}
    valid = None
    if "encoder_input_tokens" in batch:
        inputs = batch["encoder_input_tokens"]
        valid = inputs > 0
        context = {"context": module.encode(inputs), "context_valid": valid}
    lengths = jnp.full(3, SLOTS)  # Rotary scalings go by the length of the batch in `expected`.
    first, caches = cached.prefill(
        module,
        tokens[:, :PROMPT_SLOTS],
        start=jnp.asarray(start),
        lengths=lengths,
        shape=CacheShape(slots=SLOTS),
        **context,
    )
    stepper = cached.Stepper(module, unrolled=unrolled)

    def step(caches, slot):
        at = DecodingStep(slot=slot, start=jnp.asarray(start), lengths=lengths)
        now = jax.lax.dynamic_slice_in_dim(tokens, slot, 1, axis=1)
        logits, caches = stepper(now, caches, at=at, context_valid=valid)
        return caches, logits[:, 0]

    _, rest = jax.lax.scan(step, stepper.arrange(caches), slots[PROMPT_SLOTS:])
    return jnp.concatenate([first[None], rest]).swapaxes(0, 1)


# XLA's CPU compiler wants the layers apart; elsewhere a loop runs over them.
APART = ["t5", "transformer_xl", "windows_in_turn", "experts_after_a_dense_block"]


@pytest.mark.parametrize(
    ("name", "unrolled", "dtype"),
    [(n, False, "float32") for n in CONFIGS]
    + [(n, True, "float32") for n in APART]
    + [("softcap_sinks_qk_norm_sandwich", False, "bfloat16")],
)
def test_cached_equals_uncached(name, unrolled, dtype):
    config = dataclasses.replace(CONFIGS[name], dtype=dtype)
    model = ModelDef(config)
    params, batch = random_params(model), example(config)
    expected = jax.jit(lambda params, batch: model.bind(params)(batch))(params, batch)
    actual = step_by_step(model, params, batch, unrolled=unrolled)
    for row, full, length, prompt in zip(actual, expected, LENGTHS, PROMPTS, strict=True):
        full = np.asarray(full[prompt - 1 : length])
        scale = np.abs(full).max()
        assert 0.5 < scale < 50
        tolerance = TOLERANCE[dtype] * max(scale, 1)
        np.testing.assert_allclose(row[: len(full)], full, atol=tolerance)
