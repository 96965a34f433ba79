"""From a Task's features to the arrays that a model takes.

A converter gives, for the same examples, what SeqIO's feature converter of that name gives; packed
examples as `packing` says. With a BOS id other than 0, SeqIO also writes it after the last segment
of a packed row, on padding; here all padding is 0.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from jaxtyping import Int

from t5x_like.data.packing import Block, Layout, Packed
from t5x_like.data.ragged import Examples, Ragged, join_rows
from t5x_like.errors import UserError

Batch = dict[str, np.ndarray]
Lengths = Mapping[str, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureConverter(ABC):
    """Lays examples out as model features."""

    task_features: ClassVar[tuple[str, ...]]

    def limits(self, lengths: Lengths) -> tuple[int, ...]:
        """What a row holds at most; see `packing.next_row`.

        Raises:
          UserError: `lengths` lacks a feature.
        """
        for name in self._limited():
            if lengths.get(name, 0) < 1:
                raise UserError(
                    f"{type(self).__name__} needs a length of at least 1 for {name!r}, but "
                    f"task_feature_lengths is {dict(lengths)}. Add it."
                )
        return tuple(self._lengths(lengths).values())

    def block(self, examples: Examples) -> Block:
        """Prepares examples for packing; those without any token are left out.

        Raises:
          UserError: a feature is missing.
        """
        for name in self.task_features:
            if name not in examples:
                raise UserError(
                    f"{type(self).__name__} needs the feature {name!r}, but the task gives "
                    f"{sorted(examples)}. Choose another feature converter."
                )
        used = {name: examples[name] for name in self.task_features}
        sizes = sum(tokens.lengths for tokens in used.values())
        if not np.all(sizes):
            rows = np.flatnonzero(sizes)
            used = {name: tokens.take(rows) for name, tokens in used.items()}
        return Block(used, self._totals(used))

    def element_spec(
        self, lengths: Lengths, *, batch_size: int, pack: bool
    ) -> dict[str, tuple[tuple[int, int], np.dtype]]:
        """Shape and dtype of each array that `convert` gives for `batch_size` rows."""
        self.limits(lengths)
        none = {name: Ragged.from_rows([]) for name in self.task_features}
        nothing = np.zeros(0, np.int64)
        batch = self.convert(Packed(0, none, nothing, nothing), lengths, pack=pack)
        return {name: ((batch_size, a.shape[1]), a.dtype) for name, a in batch.items()}

    @abstractmethod
    def convert(self, packed: Packed, lengths: Lengths, *, pack: bool) -> Batch:
        """i32[rows, length] arrays, and f32[rows, length] ones that end in "_loss_weights".

        Args:
          packed: rows that keep `limits(lengths)`; one example a row unless `pack`.
          lengths: of the task's features.
          pack: whether to add segment ids (from 1) and positions (from 0).
        """

    def _limited(self) -> tuple[str, ...]:
        """The features that need a length."""
        return self.task_features

    def _lengths(self, lengths: Lengths) -> dict[str, int]:
        return {name: lengths[name] for name in self._limited()}

    def _totals(self, examples: Examples) -> tuple[Int[np.ndarray, " examples_plus_1"], ...]:
        return tuple(examples[name].offsets for name in self._limited())


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConverter(FeatureConverter):
    """What the converters for models with a decoder share.

    Attributes:
      bos_id: decoder input at the first position of an example.
    """

    bos_id: int = 0

    def _decoder(self, packed: Packed, targets: Ragged, length: int, pack: bool) -> Batch:
        layout = Layout.of(packed, targets, length)
        tokens = layout.place(targets.values)
        batch = {
            "decoder_target_tokens": tokens,
            "decoder_input_tokens": self._shift_right(targets, tokens, layout, pack),
            "decoder_loss_weights": layout.place(np.ones_like(targets.values)).astype(np.float32),
        }
        if pack:
            batch |= segments("decoder", packed, targets, layout)
        return batch

    def _shift_right(
        self, targets: Ragged, tokens: np.ndarray, layout: Layout, pack: bool
    ) -> np.ndarray:
        if not pack:
            # The whole row: EOS, too, is an input, on the first position of padding.
            first = np.full_like(tokens[:, :1], self.bos_id)
            return np.concatenate([first, tokens[:, :-1]], axis=1)
        previous = np.empty_like(targets.values)
        previous[1:] = targets.values[:-1]
        previous[targets.offsets[:-1][targets.lengths > 0]] = self.bos_id
        return layout.place(previous)


def segments(side: str, packed: Packed, tokens: Ragged, layout: Layout) -> Batch:
    """i32[rows, length] number of each token's example in its row, and of the token in it."""
    return {
        f"{side}_segment_ids": layout.place(np.repeat(packed.segment, tokens.lengths)),
        f"{side}_positions": layout.place(tokens.position_of_value),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncDecConverter(DecoderConverter):
    """Encoder-decoder: "inputs" are read by the encoder, "targets" written by the decoder."""

    task_features: ClassVar[tuple[str, ...]] = ("inputs", "targets")

    def convert(self, packed: Packed, lengths: Lengths, *, pack: bool) -> Batch:
        inputs = packed.examples["inputs"]
        layout = Layout.of(packed, inputs, lengths["inputs"])
        batch = {"encoder_input_tokens": layout.place(inputs.values)}
        batch |= self._decoder(packed, packed.examples["targets"], lengths["targets"], pack)
        if pack:
            batch |= segments("encoder", packed, inputs, layout)
        return batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class LMConverter(DecoderConverter):
    """Decoder-only language model over "targets"."""

    task_features: ClassVar[tuple[str, ...]] = ("targets",)

    def convert(self, packed: Packed, lengths: Lengths, *, pack: bool) -> Batch:
        return self._decoder(packed, packed.examples["targets"], lengths["targets"], pack)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixLMConverter(DecoderConverter):
    """Decoder-only model over "inputs" followed by "targets", both lengths added up.

    "decoder_causal_attention" is 1 where positions see each other in both directions: on the
    inputs and on the position after them, where the last input token is read.

    Attributes:
      loss_on_targets_only: give the inputs no weight.
    """

    loss_on_targets_only: bool = True
    task_features: ClassVar[tuple[str, ...]] = ("inputs", "targets")

    def convert(self, packed: Packed, lengths: Lengths, *, pack: bool) -> Batch:
        inputs, targets = packed.examples["inputs"], packed.examples["targets"]
        joined = join_rows(inputs, targets)
        (length,) = self.limits(lengths)
        batch = self._decoder(packed, joined, length, pack)
        layout = Layout.of(packed, joined, length)
        position, prefix = joined.position_of_value, np.repeat(inputs.lengths, joined.lengths)
        batch["decoder_causal_attention"] = layout.place(position <= prefix)
        if self.loss_on_targets_only:
            batch["decoder_loss_weights"] *= layout.place(position >= prefix)
        return batch

    def _lengths(self, lengths: Lengths) -> dict[str, int]:
        return {"joined": lengths["inputs"] + lengths["targets"]}

    def _totals(self, examples: Examples) -> tuple[Int[np.ndarray, " examples_plus_1"], ...]:
        return (examples["inputs"].offsets + examples["targets"].offsets,)
