"""Converters for decoder-only models that are tuned on instructions: loss on the answers alone."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from t5x_like.data.chat import WEIGHTS
from t5x_like.data.converters import Batch, DecoderConverter, Lengths, PrefixLMConverter
from t5x_like.data.packing import Layout, Packed


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetsLMConverter(PrefixLMConverter):
    """ "inputs" followed by "targets", all of it seen causally, loss on the targets only."""

    def convert(self, packed: Packed, lengths: Lengths, *, pack: bool) -> Batch:
        batch = super().convert(packed, lengths, pack=pack)
        del batch["decoder_causal_attention"]
        return batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightedLMConverter(DecoderConverter):
    """ "targets" with loss where "targets_weights" is 1: conversations of several turns."""

    task_features: ClassVar[tuple[str, ...]] = ("targets", WEIGHTS)

    def convert(self, packed: Packed, lengths: Lengths, *, pack: bool) -> Batch:
        targets, weights = packed.examples["targets"], packed.examples[WEIGHTS]
        batch = self._decoder(packed, targets, lengths["targets"], pack)
        layout = Layout.of(packed, targets, lengths["targets"])
        batch["decoder_loss_weights"] = layout.place(weights.values).astype(np.float32)
        return batch

    def _limited(self) -> tuple[str, ...]:
        return ("targets",)
