"""The objective of encoder-only pre-training: masked tokens, and whether two parts belong together.

BERT (Devlin et al. 2018, arXiv:1810.04805); without sentence pairs RoBERTa (Liu et al. 2019,
arXiv:1907.11692).
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from t5x_like.errors import UserError
from t5x_like.kernels.cross_entropy import cross_entropy
from t5x_like.objectives.token_loss import Batch, Metrics, Targets, TokenLoss


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedLm(TokenLoss):
    """`TokenLoss` of the masked tokens, and next-sentence prediction where there are class labels.

    BERT adds two means, over masked tokens and over sentence pairs. Here every masked token also
    carries the sentence loss of its pair, so that one sum divided by one normalizer is that sum of
    means, the second weighted by the number of masked tokens of a pair (equally under
    AVERAGE_PER_SEQUENCE). It adds up over microbatches and batches exactly, which the mean of
    unequal parts would not. A pair without any masked token counts in the metrics alone.
    """

    token_features: ClassVar[tuple[str, ...]] = ("encoder_input_tokens",)

    def targets(self, batch: Batch) -> Targets:
        """The masked tokens [B, P] at `encoder_target_positions`, or, without these, [B, L]."""
        segments = batch.get("encoder_segment_ids")
        positions = batch.get("encoder_target_positions")
        if segments is not None and positions is not None:
            segments = jnp.take_along_axis(segments, positions, axis=1)
        return Targets(batch["encoder_target_tokens"], batch["encoder_loss_weights"], segments)

    def loss(
        self, module: Any, batch: Batch, *, dropout_key: jax.Array | None = None
    ) -> tuple[Float[Array, ""], Metrics]:
        """As `TokenLoss.loss`; the metrics also have `next_sentence/loss` and `/accuracy`.

        `loss` holds both losses, `cross_ent_loss` and `accuracy` are of the masked tokens.

        Raises:
          UserError: the batch has class labels and the model no classes.
        """
        token_logits, class_logits = module.heads(batch, dropout_key=dropout_key)
        total, metrics = self._loss_of_logits(token_logits, batch)
        if "class_labels" not in batch:
            return total, metrics
        if class_logits is None:
            raise UserError(
                "The batch has sentence pairs, but the model's num_classes is None; set it to 2, "
                "or take MaskedLmConverter as FEATURE_CONVERTER."
            )
        pair_loss, _, correct = cross_entropy(class_logits, batch["class_labels"])
        real = batch["class_loss_weights"]
        pair_loss = pair_loss * real
        total += jnp.sum(pair_loss * self._per_pair(self.token_weights(batch), batch))
        value, weight = metrics["loss"]
        of_tokens = jnp.sum(pair_loss * self._per_pair(batch["encoder_loss_weights"], batch))
        pairs = {
            "loss": (value + of_tokens, weight),
            "next_sentence/loss": (jnp.sum(pair_loss), jnp.sum(real)),
            "next_sentence/accuracy": (jnp.sum(correct * real), jnp.sum(real)),
        }
        return total, metrics | jax.lax.stop_gradient(pairs)

    def _per_pair(
        self, weights: Float[Array, "batch targets"], batch: Batch
    ) -> Float[Array, "batch pairs"]:
        """Sum of `weights` over the masked tokens of each pair of a row."""
        segments = self.targets(batch).segments
        if segments is None:
            return jnp.sum(weights, axis=1, keepdims=True)
        pair = jnp.arange(1, batch["class_labels"].shape[1] + 1)
        return jnp.sum(weights[:, :, None] * (segments[:, :, None] == pair), axis=1)
