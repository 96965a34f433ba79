"""The decoder-only Transformer: causal and prefix language models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
from jaxtyping import Array, Float

from t5x_like.kernels.attention import AttentionMask
from t5x_like.layers.checks import check_positive_ints
from t5x_like.models.padding import real_tokens
from t5x_like.models.transformer import Transformer, TransformerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderOnlyConfig(TransformerConfig):
    """A language model; the fields of `TransformerConfig`, and depth."""

    num_layers: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive_ints(self, "num_layers")

    def build(self) -> DecoderOnly:
        """The module with abstract parameters; `models.base.ModelDef` gives it arrays."""
        return DecoderOnly(self)


class DecoderOnly(Transformer):
    """Calls take token ids; padding stands at the end of a row, where no token looks."""

    def __init__(self, config: DecoderOnlyConfig) -> None:
        super().__init__(config)
        self.decoder = self._stack(
            config.block, num_layers=config.num_layers, decoder=True, cross_attention=False
        )

    def __call__(
        self, batch: Mapping[str, jax.Array], *, dropout_key: jax.Array | None = None
    ) -> Float[Array, "batch length vocab"]:
        """Teacher-forced float32 logits.

        Args:
          batch: decoder_input_tokens [B, L]; where examples are packed also decoder_segment_ids
            and decoder_positions; for a prefix LM
            decoder_causal_attention, positive on the prefix, which sees itself in both directions.
          dropout_key: None runs without dropout.
        """
        segments = batch.get("decoder_segment_ids")
        positions = batch.get("decoder_positions")
        x = self.decoder(
            self.embed(batch["decoder_input_tokens"], positions),
            positions=positions,
            mask=AttentionMask(
                causal=True,
                query_segments=segments,
                key_segments=segments,
                prefix=batch.get("decoder_causal_attention"),
            ),
            real=real_tokens(batch, stack="decoder"),
            token_ids=batch["decoder_input_tokens"],
            dropout_key=dropout_key,
        )
        return self.to_logits(x)
