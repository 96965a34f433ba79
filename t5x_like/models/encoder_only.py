"""The encoder-only Transformer: BERT, RoBERTa and their kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from t5x_like.errors import UserError
from t5x_like.kernels.attention import AttentionMask
from t5x_like.layers.checks import check_bools, check_choice, check_positive_ints
from t5x_like.layers.dropout import dropout, fold_key
from t5x_like.layers.embeddings import TokenEmbedder
from t5x_like.layers.linear import Linear
from t5x_like.layers.mlp import ACTIVATIONS
from t5x_like.layers.norms import Norm
from t5x_like.models.padding import real_tokens
from t5x_like.models.transformer import Transformer, TransformerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderOnlyConfig(TransformerConfig):
    """BERT (Devlin et al. 2018, arXiv:1810.04805); the fields of `TransformerConfig`, and:

    Attributes:
      num_layers: depth.
      num_token_types: rows of a table that is added to the embeddings; 0 for none.
      masked_lm_head: whether there are logits for tokens: dense layer, the blocks' activation and
        norm, then the product with the token table. Without it `logits*` mean nothing.
      num_classes: of the logits for a sequence, from its first token through a dense layer and
        tanh (the pooler); None for no such head.
    """

    num_layers: int
    num_token_types: int = 0
    masked_lm_head: bool = True
    num_classes: int | None = None
    logits: Literal["tied", "tied_rescaled"] = "tied"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive_ints(self, "num_layers")
        check_bools(self, "masked_lm_head")
        check_choice(self, "logits", ("tied", "tied_rescaled"))
        for name in ("num_token_types", "num_classes"):
            if getattr(self, name):
                check_positive_ints(self, name)
        if not self.masked_lm_head and not self.num_classes:
            raise UserError(
                "EncoderOnlyConfig has neither masked_lm_head nor num_classes: it computes "
                "nothing. Give one of them."
            )

    def build(self) -> EncoderOnly:
        """The module with abstract parameters; `models.base.ModelDef` gives it arrays."""
        return EncoderOnly(self)


class Heads(NamedTuple):
    """float32 logits of the two heads; None where the model has none."""

    tokens: Float[Array, "batch targets vocab"] | None
    classes: Float[Array, "batch sequences classes"] | None


class MaskedLmHead(nnx.Module):
    """What BERT does to an output before the product with the token table."""

    def __init__(self, dense: Linear, norm: Norm, *, activation: str) -> None:
        self.dense, self.layer_norm, self.activation = dense, norm, activation

    def __call__(self, x: Float[Array, "batch length embed"]) -> Float[Array, "batch length embed"]:
        return self.layer_norm(ACTIVATIONS[self.activation](self.dense(x)))


class EncoderOnly(Transformer):
    """Calls take token ids. Without segment ids, id 0 is padding."""

    def __init__(self, config: EncoderOnlyConfig) -> None:
        super().__init__(config)
        block, dtype = config.first_block, self.dtype
        width = block.embed_dim
        square: dict[str, Any] = {"logical_axes": ("embed", "embed"), "use_bias": True}
        self.num_classes, self.dropout_rate = config.num_classes, block.dropout_rate
        if config.num_token_types:
            self.token_type_embedder = TokenEmbedder(
                config.num_token_types,
                embed_dim=width,
                init_stddev=block.embedding_stddev,
                dtype=dtype,
                rows="token_types",
            )
        self.encoder = self._stack(
            config.block, num_layers=config.num_layers, decoder=False, cross_attention=False
        )
        if config.masked_lm_head:
            self.masked_lm_head = MaskedLmHead(
                self._linear((width, width), **square),
                Norm(block.norm, embed_dim=width, dtype=dtype),
                activation=block.mlp.activations[0],
            )
        else:
            for name in {"logits_bias", "logits_projection"} & vars(self).keys():
                delattr(self, name)
        if config.num_classes:
            self.pooler = self._linear((width, width), **square)
            self.classifier = self._linear(
                (width, config.num_classes), logical_axes=("embed", "classes"), use_bias=True
            )

    def __call__(
        self, batch: Mapping[str, jax.Array], *, dropout_key: jax.Array | None = None
    ) -> Float[Array, "batch targets vocab"] | Float[Array, "batch sequences classes"]:
        """float32 logits for tokens, or, without that head, for classes; see `heads`."""
        tokens, classes = self.heads(batch, dropout_key=dropout_key)
        logits = classes if tokens is None else tokens
        assert logits is not None  # the config makes sure
        return logits

    def heads(
        self, batch: Mapping[str, jax.Array], *, dropout_key: jax.Array | None = None
    ) -> Heads:
        """Logits for tokens, and for sequences.

        Args:
          batch: encoder_input_tokens [B, L]; encoder_token_types [B, L], zeros if missing;
            encoder_segment_ids [B, L], 0 on padding; where several sequences are packed into a
            row also encoder_positions [B, L] and encoder_sequence_starts [B, K], else K is 1.
            With encoder_target_positions [B, P] only these tokens get logits [B, P, vocab].
          dropout_key: None runs without dropout. The pooled vector has dropout too.
        """
        x = self.encode(batch, dropout_key=fold_key(dropout_key, 0))
        tokens = classes = None
        if hasattr(self, "masked_lm_head"):
            tokens = self.to_logits(self.masked_lm_head(_at(x, batch, "encoder_target_positions")))
        if hasattr(self, "pooler"):
            first = _at(x, batch, "encoder_sequence_starts")
            if "encoder_sequence_starts" not in batch:
                first = first[:, :1]
            pooled = jnp.tanh(self.pooler(first))
            key = fold_key(dropout_key, 1)
            pooled = dropout(pooled, rate=self.dropout_rate, key=key, broadcast_dims=())
            classes = self.classifier(pooled).astype(jnp.float32)
        return Heads(tokens, classes)

    def encode(
        self, batch: Mapping[str, jax.Array], *, dropout_key: jax.Array | None = None
    ) -> Float[Array, "batch length embed"]:
        """The output of the last block; `batch` as for `heads`. Meaningless on padding."""
        tokens, segments = batch["encoder_input_tokens"], batch.get("encoder_segment_ids")
        positions = batch.get("encoder_positions")
        types = None
        if hasattr(self, "token_type_embedder"):
            types = self.token_type_embedder(
                batch.get("encoder_token_types", jnp.zeros_like(tokens))
            )
        return self.encoder(
            self.embed(tokens, positions, extra=types),
            mask=AttentionMask(
                query_segments=segments,
                key_segments=segments,
                key_valid=tokens > 0 if segments is None else None,
            ),
            positions=positions,
            real=real_tokens(batch, stack="encoder"),
            token_ids=tokens,
            dropout_key=dropout_key,
        )


def _at(
    x: Float[Array, "batch length embed"], batch: Mapping[str, jax.Array], places: str
) -> Float[Array, "batch places embed"]:
    """The vectors at `batch[places]` [B, P], or all of them if it is missing."""
    if places not in batch:
        return x
    return jnp.take_along_axis(x, batch[places][:, :, None], axis=1)
