"""The causal objective, and that of predicting tokens further ahead."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Float

from t5x_like.errors import UserError
from t5x_like.layers.checks import check_number
from t5x_like.models.future import ahead, has_future
from t5x_like.objectives.causal_lm import CausalLm
from t5x_like.objectives.token_loss import Batch, Metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiTokenLm(CausalLm):
    """`CausalLm` plus `future_weight` times the mean loss of the model's further predictions
    (DeepSeek-V3, arXiv:2412.19437, section 2.2), which do not cross the end of an example.

    Every prediction is divided by the normalizer of the next tokens', as in the paper: so the loss
    adds up over microbatches as that of `CausalLm` does. Metrics are `CausalLm`'s, and `loss` and
    `accuracy` of prediction k (1, 2, ...) as `future_k/loss` and `future_k/accuracy`. Without a
    dropout key, in evaluation, this is `CausalLm`: the further predictions do not run.

    Attributes:
      future_weight: lambda of the paper, which has 0.3, and 0.1 in the last third of training.
    """

    future_weight: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "future_weight", low=0.0)

    def loss(
        self,
        module: Any,
        batch: Batch,
        *,
        dropout_key: jax.Array | None = None,
    ) -> tuple[Float[Array, ""], Metrics]:
        """As of `TokenLoss`. Raises UserError if the model predicts next tokens only."""
        if dropout_key is None:
            return super().loss(module, batch)
        depth = getattr(module.config, "future_depth", 0)
        if not depth:
            raise UserError(
                f"MultiTokenLm needs a DecoderOnlyConfig with future_depth of at least 1, not a "
                f"{type(module.config).__name__} with {depth}; set it, or take CausalLm"
            )
        hidden, further = module.hidden_states(batch, dropout_key=dropout_key)
        total, metrics = self._loss_of_logits(module.to_logits(hidden), batch)
        for k, (x, real) in enumerate(zip(further, has_future(batch, depth=depth), strict=True), 1):
            weights = ahead(batch["decoder_loss_weights"], k) * real
            targets = ahead(batch["decoder_target_tokens"], k)
            shifted = {**batch, "decoder_target_tokens": targets, "decoder_loss_weights": weights}
            loss, of_depth = self._loss_of_logits(module.to_logits(x), shifted)
            total += self.future_weight / depth * loss
            metrics |= {f"future_{k}/{name}": of_depth[name] for name in ("loss", "accuracy")}
        return total, metrics
