"""What the families with mixtures of experts have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from t5x_like.errors import UserError
from t5x_like.interop.hugging_face.adapter import TRANSPOSE, Entry, Op
from t5x_like.layers.mlp import MlpConfig
from t5x_like.layers.moe.layer import MoeConfig
from t5x_like.layers.moe.routers import TopKRouter
from t5x_like.models.block import BlockConfig


def sparse_layers(blocks: Sequence[BlockConfig]) -> tuple[int, ...]:
    """Numbers of the layers that are mixtures."""
    return tuple(layer for layer, block in enumerate(blocks) if isinstance(block.mlp, MoeConfig))


def dense_layers(blocks: Sequence[BlockConfig]) -> tuple[int, ...]:
    """Numbers of the layers that are not."""
    return tuple(layer for layer, block in enumerate(blocks) if isinstance(block.mlp, MlpConfig))


def top_k_mixture(blocks: Sequence[BlockConfig], *, name: str) -> tuple[MoeConfig, TopKRouter]:
    """The first mixture of experts among `blocks`, and its router; UserError if it has another."""
    for block in blocks:
        if isinstance(block.mlp, MoeConfig):
            if not isinstance(block.mlp.router, TopKRouter):
                raise UserError(f"{name} has a TopKRouter, not a {type(block.mlp.router).__name__}")
            return block.mlp, block.mlp.router
    raise UserError(f"{name} has mixtures of experts")


def mixture_entries(
    moe: MoeConfig, ours: str, theirs: Mapping[str, str], *, layers: tuple[int, ...]
) -> list[Entry]:
    """Router and experts, of which they have a torch.nn.Linear each without bias.

    A layer's experts are read and written together: they are one parameter here.

    Args:
      moe: the mixture.
      ours: where it is, `decoder/layers/mlp`.
      theirs: their name of `router`, and with `{expert}` in it of `wi_0` and so on.
      layers: numbers of the layers that are mixtures.
    """
    experts, op = range(moe.num_experts), _stacked(moe.num_experts)
    router = Entry(f"{ours}/router/kernel", f"{theirs['router']}.weight", TRANSPOSE, layers=layers)
    return [router] + [
        Entry(
            f"{ours}/experts/{linear}/kernel",
            tuple(f"{name}.weight".replace("{expert}", str(expert)) for expert in experts),
            op,
            layers=layers,
        )
        for linear, name in theirs.items()
        if linear != "router"
    ]


def _stacked(count: int) -> Op:
    """Ours [experts, in, out]; theirs (out, in), one an expert."""

    def each(x: Sequence[Any]) -> Any:
        return x[0] if count == 1 else tuple(x)

    return Op(
        to_ours=lambda *theirs: (np.stack([x.T for x in theirs]),),
        to_theirs=lambda x: each([expert.T for expert in x]),
        theirs_shape=lambda shape: each([(shape[2], shape[1])] * count),
    )
