"""The loss over target tokens that sequence-to-sequence and language models share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_like.errors import UserError, did_you_mean
from t5x_like.kernels.cross_entropy import cross_entropy
from t5x_like.layers.checks import check_number

Batch = Mapping[str, jax.Array]
Metrics = dict[str, tuple[jax.Array, jax.Array]]
Normalizer = Literal["NUM_REAL_TARGET_TOKENS", "NUM_TOTAL_TARGET_TOKENS", "AVERAGE_PER_SEQUENCE"]
NORMALIZERS = ("NUM_REAL_TARGET_TOKENS", "NUM_TOTAL_TARGET_TOKENS", "AVERAGE_PER_SEQUENCE")


class Targets(NamedTuple):
    """What a loss is taken of: ids, the loss weight of each, and (or None) the packed example."""

    tokens: Int[Array, "batch length"]
    weights: Float[Array, "batch length"]
    segments: Int[Array, "batch length"] | None


def weight_per_sequence(targets: Targets) -> Float[Array, "batch length"]:
    """At every target, the sum of the loss weights of its sequence, or segment if packed."""
    weights, segments = targets.weights, targets.segments
    if segments is None:
        return jnp.broadcast_to(jnp.sum(weights, -1, keepdims=True), weights.shape)
    same = segments[:, :, None] == segments[:, None, :]
    return jnp.sum(jnp.where(same, weights[:, None, :], 0.0), axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenLoss:
    """Weighted cross entropy of the targets, with z-loss and label smoothing.

    The trainer divides the sum of `loss` over all microbatches, and its gradient, by
    `normalizer` of the whole global batch.

    Attributes:
      z_loss: coefficient of logsumexp(logits)**2.
      label_smoothing: probability taken from the target and spread over the other tokens.
      loss_normalizing_factor: what the summed loss is divided by: None (nothing), a number, or
        the sum of the loss weights, the number of target positions, or (AVERAGE_PER_SEQUENCE)
        the number of sequences, each of them counting the same. T5X's names.

    Raises:
      UserError: a value out of range.
    """

    z_loss: float = 1e-4
    label_smoothing: float = 0.0
    loss_normalizing_factor: float | Normalizer | None = "NUM_REAL_TARGET_TOKENS"

    token_features: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        name, factor = type(self).__name__, self.loss_normalizing_factor
        check_number(self, "z_loss", low=0.0)
        check_number(self, "label_smoothing", low=0.0, high=1.0)
        if isinstance(factor, str) and factor not in NORMALIZERS:
            raise UserError(
                f"{name}.loss_normalizing_factor is {factor!r}; choose from None, a number, "
                f"{', '.join(NORMALIZERS)}.{did_you_mean(factor, NORMALIZERS)}"
            )
        if isinstance(factor, int | float) and not factor > 0:
            raise UserError(f"{name}.loss_normalizing_factor is {factor!r}; give a number above 0")

    def targets(self, batch: Batch) -> Targets:
        """The part of a batch that the loss is of; a subclass may take another."""
        return Targets(
            batch["decoder_target_tokens"],
            batch["decoder_loss_weights"],
            batch.get("decoder_segment_ids"),
        )

    def logits(
        self, module: Any, batch: Batch, dropout_key: jax.Array | None = None
    ) -> Float[Array, "batch length vocab"]:
        """The model's logits for `targets`."""
        return module(batch, dropout_key=dropout_key)

    def loss(
        self,
        module: Any,
        batch: Batch,
        *,
        dropout_key: jax.Array | None = None,
    ) -> tuple[Float[Array, ""], Metrics]:
        """Summed loss of a (micro)batch and its metrics as (sum, weight), float32 scalars.

        Both add up over microbatches. Every mean but `nonpadding_fraction` is over the loss
        weights, whatever `loss_normalizing_factor` is.
        """
        return self._loss_of_logits(self.logits(module, batch, dropout_key), batch)

    def _loss_of_logits(
        self, logits: Float[Array, "batch length vocab"], batch: Batch
    ) -> tuple[Float[Array, ""], Metrics]:
        targets, weights, _ = self.targets(batch)
        total, z_loss, correct = cross_entropy(
            logits,
            targets,
            z_loss=self.z_loss,
            label_smoothing=self.label_smoothing,
        )
        weight = jnp.sum(weights)
        tokens = [batch[name] for name in self.token_features]
        metrics = {
            "loss": (jnp.sum(total * weights), weight),
            "cross_ent_loss": (jnp.sum((total - z_loss) * weights), weight),
            "z_loss": (jnp.sum(z_loss * weights), weight),
            "accuracy": (jnp.sum(correct * weights), weight),
            "nonpadding_fraction": (
                sum((jnp.sum(x > 0) for x in tokens), jnp.float32(0)),
                jnp.float32(sum(x.size for x in tokens)),
            ),
        }
        metrics = jax.lax.stop_gradient(metrics)
        return jnp.sum(total * self.token_weights(batch)), metrics

    def token_weights(self, batch: Batch) -> Float[Array, "batch length"]:
        """What each target token counts in the summed loss."""
        targets = self.targets(batch)
        if self.loss_normalizing_factor != "AVERAGE_PER_SEQUENCE":
            return targets.weights
        total = weight_per_sequence(targets)
        return jnp.where(total > 0, targets.weights / jnp.where(total > 0, total, 1.0), 0.0)

    def normalizer(self, batch: Batch) -> Float[Array, ""]:
        """What the summed loss of the whole global batch is divided by.

        Call it on the whole batch: a constant (None or a number) does not add up over
        microbatches, the other kinds do.
        """
        factor = self.loss_normalizing_factor
        if factor is None:
            return jnp.float32(1)
        if not isinstance(factor, str):
            return jnp.float32(factor)
        if factor == "NUM_TOTAL_TARGET_TOKENS":
            return jnp.float32(self.targets(batch).tokens.size)
        return jnp.sum(self.token_weights(batch))

    def score(self, module: Any, batch: Batch) -> Float[Array, " batch"]:
        """Log-likelihood of every row's targets: the weighted sum of their log-probabilities."""
        targets = self.targets(batch)
        total, _, _ = cross_entropy(self.logits(module, batch), targets.tokens)
        return -jnp.sum(total * targets.weights, axis=-1)
