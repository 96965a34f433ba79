"""A model that has read its prompts, and what a loop over new tokens gives back."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from t5x_like.layers.cache import DecodingStep
from t5x_like.models.cached import Caches, Stepper
from t5x_like.parallel.logical import constrain


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("tokens", "lengths", "token_log_probs", "scores"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Generated:
    """N continuations of every prompt, best first.

    Attributes:
      tokens: with the end token or the stop sequence, where there is one; 0 after the end.
      lengths: tokens of each continuation.
      token_log_probs: of every token, by the model alone: without temperature, penalty and
        truncations; 0 after the end.
      scores: sum of `token_log_probs`; of beam search, that with its length penalty.
    """

    tokens: Int[Array, "batch samples new"]
    lengths: Int[Array, "batch samples"]
    token_log_probs: Float[Array, "batch samples new"]
    scores: Float[Array, "batch samples"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Session:
    """A model after its prompts. Rows are samples of prompts: those of a prompt are neighbours.

    Attributes:
      logits: of the token after each prompt, float32.
      caches: in the form that `stepper` takes.
      stepper: runs the model on one token of every beam.
      prompt: left-padded; its width is the slot of the first new token.
      start: first slot of each prompt that is not padding.
      limits: how many tokens may be generated for each prompt.
      slots: of the cache.
      context_valid: where the encoder's input is not padding, or None.
    """

    logits: Float[Array, "batch vocab"]
    caches: Caches
    stepper: Stepper
    prompt: Int[Array, "batch prompt"]
    start: Int[Array, " batch"]
    limits: Int[Array, " batch"]
    slots: int
    context_valid: Bool[Array, "batch key"] | None

    @property
    def first_slot(self) -> int:
        """Slot of the first token after the prompts."""
        return self.prompt.shape[1]

    def step(
        self,
        tokens: Int[Array, "rows beams"],
        caches: Caches,
        *,
        index: Int[Array, ""],
        ancestors: Int[Array, "rows beams slots"] | None = None,
    ) -> tuple[Float[Array, "rows beams vocab"], Caches]:
        """float32 logits of the token after `tokens`, the new tokens number `index` of all rows."""
        samples = len(tokens) // len(self.start)
        start = jnp.repeat(self.start, samples)
        lengths = self.first_slot - start + jnp.repeat(self.limits, samples)
        slot = self.first_slot + index
        at = DecodingStep(slot=slot, start=start, lengths=lengths, ancestors=ancestors)
        logits, caches = self.stepper(tokens, caches, at=at, context_valid=self.context_valid)
        # Whole rows: every choice of a token looks at the whole vocabulary.
        return constrain(logits, ("batch", None, None)), caches
