"""The encoder-decoder Transformer: T5 and its family."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
from jaxtyping import Array, Float, Int

from t5x_like.errors import UserError
from t5x_like.kernels.attention import AttentionMask
from t5x_like.layers.checks import check_bools, check_positive_ints
from t5x_like.layers.dropout import fold_key
from t5x_like.models.padding import real_tokens
from t5x_like.models.stack import Pattern, as_pattern
from t5x_like.models.transformer import Transformer, TransformerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig(TransformerConfig):
    """T5 (Raffel et al. 2020, arXiv:1910.10683): the fields of `TransformerConfig`, and these.

    Attributes:
      num_encoder_layers, num_decoder_layers: depth.
      encoder_block: the shape of the encoder's blocks where it is another than `block`.
      share_embeddings: one token table (and one of positions) for both sides; the output is tied
        to the decoder's.
    """

    num_encoder_layers: int
    num_decoder_layers: int
    encoder_block: Pattern | None = None
    share_embeddings: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive_ints(self, "num_encoder_layers", "num_decoder_layers")
        check_bools(self, "share_embeddings")
        if self.encoder_block is not None:
            self._check_pattern("encoder_block")
            width = as_pattern(self.encoder_block)[0].embed_dim
            if width != self.first_block.embed_dim:
                raise UserError(
                    f"EncoderDecoderConfig.encoder_block has embed_dim {width} and block "
                    f"{self.first_block.embed_dim}; make them equal"
                )

    def build(self) -> EncoderDecoder:
        """The module with abstract parameters; `models.base.ModelDef` gives it arrays."""
        return EncoderDecoder(self)


class EncoderDecoder(Transformer):
    """Calls take token ids. In an encoder's row without segment ids, id 0 is padding."""

    config: EncoderDecoderConfig

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__(config)
        if not config.share_embeddings:
            self._add_embeddings("encoder_")
        self.encoder = self._stack(
            config.encoder_block or config.block,
            num_layers=config.num_encoder_layers,
            decoder=False,
            cross_attention=False,
        )
        self.decoder = self._stack(
            config.block, num_layers=config.num_decoder_layers, decoder=True, cross_attention=True
        )

    def __call__(
        self, batch: Mapping[str, jax.Array], *, dropout_key: jax.Array | None = None
    ) -> Float[Array, "batch length vocab"]:
        """Teacher-forced float32 logits.

        Args:
          batch: encoder_input_tokens [B, T], decoder_input_tokens and decoder_target_tokens
            [B, L]; where examples are packed also encoder_ and decoder_ segment_ids and positions.
          dropout_key: None runs without dropout.
        """
        encoded = self.encode(
            batch["encoder_input_tokens"],
            segment_ids=batch.get("encoder_segment_ids"),
            positions=batch.get("encoder_positions"),
            dropout_key=fold_key(dropout_key, 0),
        )
        return self.decode(encoded, batch, dropout_key=fold_key(dropout_key, 1))

    def encode(
        self,
        tokens: Int[Array, "batch length"],
        *,
        segment_ids: Int[Array, "batch length"] | None = None,
        positions: Int[Array, "batch length"] | None = None,
        dropout_key: jax.Array | None = None,
    ) -> Float[Array, "batch length embed"]:
        """The encoder's output after its final norm; meaningless where `tokens` is padding."""
        mask = AttentionMask(
            query_segments=segment_ids,
            key_segments=segment_ids,
            key_valid=tokens > 0 if segment_ids is None else None,
        )
        prefix = "" if self.config.share_embeddings else "encoder_"
        x = self.embed(tokens, positions, prefix=prefix)
        return self.encoder(
            x,
            mask=mask,
            positions=positions,
            real=tokens > 0 if segment_ids is None else segment_ids > 0,
            token_ids=tokens,
            dropout_key=dropout_key,
        )

    def decode(
        self,
        encoded: Float[Array, "batch source embed"],
        batch: Mapping[str, jax.Array],
        *,
        dropout_key: jax.Array | None = None,
    ) -> Float[Array, "batch length vocab"]:
        """float32 logits of the decoder given the encoder's output; `batch` as for a call."""
        segments, of_encoder = (batch.get(f"{s}_segment_ids") for s in ("decoder", "encoder"))
        positions = batch.get("decoder_positions")
        x = self.decoder(
            self.embed(batch["decoder_input_tokens"], positions),
            positions=positions,
            mask=AttentionMask(
                causal=True,
                query_segments=segments,
                key_segments=segments,
            ),
            context=encoded,
            context_mask=AttentionMask(
                query_segments=segments,
                key_segments=of_encoder,
                key_valid=batch["encoder_input_tokens"] > 0 if of_encoder is None else None,
            ),
            real=real_tokens(batch, stack="decoder"),
            token_ids=batch["decoder_input_tokens"],
            dropout_key=dropout_key,
        )
        return self.to_logits(x)
