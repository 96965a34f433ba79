"""The objective of sequence classification."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from t5x_like.errors import UserError
from t5x_like.objectives.token_loss import Batch, Targets, TokenLoss


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification(TokenLoss):
    """`TokenLoss` whose targets are the class labels of the sequences, one or several a row.

    What the base class says of tokens is said of sequences: NUM_REAL_TARGET_TOKENS is their number.
    """

    token_features: ClassVar[tuple[str, ...]] = ("encoder_input_tokens",)

    def targets(self, batch: Batch) -> Targets:
        labels = batch["class_labels"]
        each = jnp.broadcast_to(jnp.arange(labels.shape[1]), labels.shape)
        return Targets(labels, batch["class_loss_weights"], each)

    def logits(
        self, module: Any, batch: Batch, dropout_key: jax.Array | None = None
    ) -> Float[Array, "batch sequences classes"]:
        """The logits of the model's classification head.

        Raises:
          UserError: it has none.
        """
        _, class_logits = module.heads(batch, dropout_key=dropout_key)
        if class_logits is None:
            raise UserError("The model's num_classes is None; set it to the number of classes.")
        return class_logits
