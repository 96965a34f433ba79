"""The decoder-only Transformer: causal and prefix language models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
from jaxtyping import Array, Float

from t5x_like.kernels.attention import AttentionMask
from t5x_like.layers.checks import check_positive_ints
from t5x_like.layers.dropout import fold_key
from t5x_like.layers.positions import RelativePositionsConfig
from t5x_like.models.block import Block
from t5x_like.models.future import Future, FutureLayer
from t5x_like.models.padding import real_tokens
from t5x_like.models.stack import as_pattern
from t5x_like.models.transformer import Transformer, TransformerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderOnlyConfig(TransformerConfig):
    """A language model; the fields of `TransformerConfig`, and these.

    Attributes:
      num_layers: depth.
      future_depth: how many tokens after the next one are predicted too, each by a module with a
        block like the last of `block` (`models.future`). In training only.
    """

    num_layers: int
    future_depth: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive_ints(self, "num_layers", *["future_depth"] * bool(self.future_depth))

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
        if config.future_depth:
            self.future = self._future(config)

    def _future(self, config: DecoderOnlyConfig) -> Future:
        last, positions = as_pattern(config.block)[-1], config.positions
        if not isinstance(positions, RelativePositionsConfig) or not positions.per_layer:
            positions = None
        block = Block(
            last,
            decoder=True,
            cross_attention=False,
            num_layers=config.num_layers,
            relative_positions=positions,
            dtype=self.dtype,
        )
        shape = (2 * last.embed_dim, last.embed_dim)
        projection = self._linear(shape, logical_axes=("embed", None))
        layer = FutureLayer(block, projection, dtype=self.dtype)
        return Future(layer, depth=config.future_depth, remat=config.remat)

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
        return self.to_logits(self._hidden(batch, dropout_key))

    def hidden_states(
        self, batch: Mapping[str, jax.Array], *, dropout_key: jax.Array | None = None
    ) -> tuple[Float[Array, "batch length embed"], Float[Array, "depth batch length embed"]]:
        """What `to_logits` makes next tokens of, and (of `future_depth`) those that follow them."""
        x = self._hidden(batch, dropout_key)
        further = self.future(
            x,
            batch,
            embed=self.embed,
            relative_bias=self.decoder.relative_bias(),
            dropout_key=fold_key(dropout_key, 3),
        )
        return x, further

    def _hidden(self, batch: Mapping[str, jax.Array], dropout_key: jax.Array | None) -> jax.Array:
        segments = batch.get("decoder_segment_ids")
        positions = batch.get("decoder_positions")
        return self.decoder(
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
