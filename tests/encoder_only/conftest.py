"""A BERT of a few parameters, and batches for it."""

from __future__ import annotations

from typing import Any

import numpy as np

from t5x_like.layers.attention import AttentionConfig
from t5x_like.layers.mlp import MlpConfig
from t5x_like.layers.norms import NormConfig
from t5x_like.layers.positions import LearnedPositionsConfig
from t5x_like.models.block import BlockConfig
from t5x_like.models.encoder_only import EncoderOnlyConfig

VOCAB_SIZE, LENGTH = 60, 16


def tiny_bert(**changes: Any) -> EncoderOnlyConfig:
    return EncoderOnlyConfig(
        **{
            "vocab_size": VOCAB_SIZE,
            "num_layers": 2,
            "block": BlockConfig(
                embed_dim=16,
                attention=AttentionConfig(
                    num_heads=2,
                    head_dim=8,
                    logit_scale="rsqrt_head_dim",
                    qkv_bias=True,
                    out_bias=True,
                ),
                mlp=MlpConfig(mlp_dim=32, activations=("gelu_exact",), use_bias=True),
                norm=NormConfig(kind="layer", epsilon=1e-12, use_bias=True),
                norm_placement="post",
            ),
            "positions": LearnedPositionsConfig(max_length=LENGTH),
            "num_token_types": 2,
            "embedding_norm": True,
            "logits_bias": True,
            "num_classes": 2,
            "dtype": "float32",
            **changes,
        }
    )


def random_batch(seed: int = 0, *, rows: int = 8, targets: int = 4) -> dict[str, np.ndarray]:
    """Packed rows of two sequences; rows differ much in what is masked, the first has nothing."""
    rng = np.random.default_rng(seed)
    first = rng.integers(4, LENGTH - 6, (rows, 1))
    end = first + rng.integers(2, 6, (rows, 1))
    place = np.arange(LENGTH)
    segments = np.where(place < first, 1, np.where(place < end, 2, 0))
    real = np.arange(targets) < np.arange(rows)[:, None] % (targets + 1)
    places = np.sort(rng.permuted(np.tile(np.arange(6), (rows, 1)), axis=1)[:, :targets], axis=1)
    batch = {
        "encoder_input_tokens": rng.integers(1, VOCAB_SIZE, segments.shape) * (segments > 0),
        "encoder_token_types": rng.integers(0, 2, segments.shape),
        "encoder_segment_ids": segments,
        "encoder_positions": np.where(segments == 2, place - first, place) * (segments > 0),
        "encoder_sequence_starts": np.concatenate([0 * first, first, 0 * first], axis=1),
        "encoder_target_tokens": rng.integers(1, VOCAB_SIZE, real.shape) * real,
        "encoder_target_positions": places * real,
        "class_labels": rng.integers(0, 2, (rows, 3)),
    }
    batch = {name: array.astype(np.int32) for name, array in batch.items()}
    weights = np.tile(np.float32([1, 1, 0]), (rows, 1))
    return batch | {"encoder_loss_weights": real.astype(np.float32), "class_loss_weights": weights}
