"""From the features of `encoder_steps` to the arrays that encoder-only models and objectives take.

encoder_input_tokens, encoder_token_types, encoder_segment_ids [rows, inputs' length]; segment ids
    (1 without packing) are 0 on padding, so that id 0 may also be a token
encoder_positions (within each sequence) where rows are packed
encoder_sequence_starts [rows, max_sequences] place of each sequence's first token, where packed
encoder_target_tokens, encoder_target_positions (in the row), encoder_loss_weights
    [rows, targets' length]: what was masked, and where; BERT's masked_lm_ids, _positions, _weights
class_labels, class_loss_weights [rows, max_sequences; 1 where rows are not packed]
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
from jaxtyping import Int

from t5x_like.data.converters import Batch, FeatureConverter, Lengths, segments
from t5x_like.data.packing import Layout, Packed
from t5x_like.data.ragged import Examples, Ragged
from t5x_like.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConverter(FeatureConverter):
    """Lays out whatever of the arrays above belongs to its task features.

    Attributes:
      max_sequences: most sequences of a packed row.
    """

    max_sequences: int = 8
    task_features: ClassVar[tuple[str, ...]] = ("inputs", "token_types")

    def __post_init__(self) -> None:
        if self.max_sequences < 1:
            raise UserError(
                f"{type(self).__name__}.max_sequences is {self.max_sequences}; give at least 1."
            )

    def convert(self, packed: Packed, lengths: Lengths, *, pack: bool) -> Batch:
        inputs = packed.examples["inputs"]
        layout = Layout.of(packed, inputs, lengths["inputs"])
        starts = layout.index[inputs.offsets[:-1]] % lengths["inputs"]
        batch = {
            "encoder_input_tokens": layout.place(inputs.values),
            "encoder_token_types": layout.place(packed.examples["token_types"].values),
            **segments("encoder", packed, inputs, layout),
        }
        if pack:
            batch["encoder_sequence_starts"] = self._slots(packed, pack).place(starts)
        else:
            del batch["encoder_positions"]
        if "targets" in self.task_features:
            batch |= _targets(packed, starts, lengths["targets"])
        if "label" in self.task_features:
            slots = self._slots(packed, pack)
            batch["class_labels"] = slots.place(packed.examples["label"].values)
            batch["class_loss_weights"] = slots.place(np.ones(len(starts))).astype(np.float32)
        return batch

    def _slots(self, packed: Packed, pack: bool) -> Layout:
        """One place a sequence."""
        each = np.arange(len(packed.row) + 1)
        return Layout.of(packed, Ragged(each[:-1], each), self.max_sequences if pack else 1)

    def _limited(self) -> tuple[str, ...]:
        return tuple(name for name in ("inputs", "targets") if name in self.task_features)

    def _lengths(self, lengths: Lengths) -> dict[str, int]:
        return {**super()._lengths(lengths), "sequences": self.max_sequences}

    def _totals(self, examples: Examples) -> tuple[Int[np.ndarray, " examples_plus_1"], ...]:
        return (*super()._totals(examples), np.arange(len(examples["inputs"]) + 1))


def _targets(packed: Packed, starts: Int[np.ndarray, " examples"], length: int) -> Batch:
    targets, positions = packed.examples["targets"], packed.examples["target_positions"]
    layout = Layout.of(packed, targets, length)
    in_row = positions.values + np.repeat(starts, positions.lengths)
    return {
        "encoder_target_tokens": layout.place(targets.values),
        "encoder_target_positions": layout.place(in_row),
        "encoder_loss_weights": layout.place(np.ones(len(in_row))).astype(np.float32),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedLmConverter(EncoderConverter):
    """For masked language modelling without next-sentence prediction."""

    task_features: ClassVar[tuple[str, ...]] = (
        "inputs",
        "token_types",
        "targets",
        "target_positions",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextSentenceConverter(EncoderConverter):
    """For masked language modelling with next-sentence prediction."""

    task_features: ClassVar[tuple[str, ...]] = (*MaskedLmConverter.task_features, "label")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassificationConverter(EncoderConverter):
    """For the classification of sequences."""

    task_features: ClassVar[tuple[str, ...]] = ("inputs", "token_types", "label")
