"""The one FLOP-counting rule, and the chips' peaks that MFU is measured against.

Rule: matmul FLOPs of the forward pass, times three for a training step. A matmul of [m, k] by
[k, n] is 2*m*k*n. Attention scores and values are counted over half of the square where attention
is causal. Every position of the batch counts, padding included. Rematerialised work, embedding
look-ups, norms and softmax do not count. A window counts the pairs inside it. Of experts the
active ones count: k of a token, whether they find room or not; their router counts too.
Modules of multi-token prediction count, with an output each, as if their objective ran them.
MFU = FLOPs / (seconds * devices * dense peak).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from t5x_like.layers.attention import Attention, AttentionConfig
from t5x_like.layers.latent_attention import LatentAttention, LatentAttentionConfig
from t5x_like.layers.linear import Linear
from t5x_like.layers.moe.layer import Moe
from t5x_like.models.base import ModelDef

# Dense peak in FLOP/s of one JAX device, by a substring of `device.device_kind` (vendors' data
# sheets): bfloat16, then float32 as XLA runs it by default there.
PEAKS: tuple[tuple[str, float, float], ...] = (
    ("H200", 989e12, 67e12),
    ("H100", 989e12, 67e12),
    ("A100", 312e12, 19.5e12),
    ("TPU7x", 1153e12, 1153e12),
    ("TPU v6", 918e12, 918e12),
    ("TPU v5p", 459e12, 459e12),
    ("TPU v5 lite", 197e12, 197e12),
    ("TPU v5e", 197e12, 197e12),
    ("TPU v5", 459e12, 459e12),
    ("TPU v4", 275e12, 275e12),
)


def named_leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of a nested dict with their paths, as `encoder/layers/mlp/wo/kernel`."""
    for name, value in tree.items():
        path = f"{prefix}/{name}" if prefix else name
        if isinstance(value, Mapping):
            yield from named_leaves(value, path)
        else:
            yield path, value


def forward_flops(model_def: ModelDef, batch_shapes: Mapping[str, tuple[int, ...]]) -> float:
    """Forward matmul FLOPs of one batch by the rule above.

    Args:
      model_def: the model.
      batch_shapes: name -> global shape: `decoder_input_tokens` [B, L], `encoder_input_tokens`
        [B, T], whichever the model has; `encoder_target_tokens` [B, P], for which alone the head
        of an encoder is run, and `encoder_sequence_starts` [B, K].
    """
    sizes = _Sizes.of(batch_shapes)
    total = 0.0
    for path, module in model_def.modules():
        if isinstance(module, Linear):
            weights = math.prod(module.kernel.get_value().shape)
            total += 2.0 * sizes.rows(path) * weights
        elif isinstance(module, Moe):
            total += 2.0 * sizes.rows(path) * _active_weights(module)
        elif isinstance(module, Attention | LatentAttention):
            query = module.query.kernel
            stacked = query.get_value().shape[0] if query.logical_axes[0] == "layers" else 1
            pairs = sizes.batch * sizes.pairs(path, module.config)
            total += pairs * stacked * module.flops_per_pair
    if sizes.outputs:
        tied = getattr(model_def.config, "logits", None) != "dense"
        times = tied + getattr(model_def.config, "future_depth", 0)
        table = model_def.param_info["token_embedder"]["embedding"]
        total += 2.0 * times * sizes.outputs * math.prod(table.shape)
    return total


def _active_weights(module: Moe) -> float:
    """Weights that a token is multiplied with: its experts' and the router's."""
    share = module.config.active_experts / module.config.num_experts
    kernels = [linear.kernel for linear in module.experts.linears().values()]
    experts = share * sum(math.prod(kernel.get_value().shape) for kernel in kernels)
    router = getattr(module.router, "kernel", None)
    return experts + (0 if router is None else math.prod(router.get_value().shape))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sizes:
    """Rows of the batch, positions of a row on either side, and rows that the heads work on."""

    batch: int
    encoder: int
    decoder: int
    outputs: int
    sequences: int

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]]) -> _Sizes:
        batch = next(iter(shapes.values()))[0]
        encoder, decoder = (
            shapes.get(f"{side}_input_tokens", (0, 0))[1] for side in ("encoder", "decoder")
        )
        targets = shapes.get("encoder_target_tokens", (0, 0))[1]
        return cls(
            batch=batch,
            encoder=encoder,
            decoder=decoder,
            outputs=batch * (decoder or targets),
            sequences=batch * shapes.get("encoder_sequence_starts", (0, 1))[1],
        )

    def rows(self, path: str) -> int:
        """How many vectors a projection is applied to."""
        parts = path.split("/")
        first, parent, name = parts[0], parts[-2] if len(parts) > 1 else "", parts[-1]
        if name == "relative":  # of distances, the same for all rows of the batch
            return 2 * (self.encoder if first == "encoder" else self.decoder)
        if first in ("pooler", "classifier"):
            return self.sequences
        if first in ("masked_lm_head", "logits_projection"):
            return self.outputs
        if first == "embedding_projection":
            return self.batch * (self.encoder + self.decoder)
        of_context = parent == "encoder_decoder_attention" and name in ("key", "value")
        on_encoder = first.startswith("encoder") or of_context
        return self.batch * (self.encoder if on_encoder else self.decoder)

    def pairs(self, path: str, config: AttentionConfig | LatentAttentionConfig) -> float:
        """Pairs of query and key in one row of the batch; half of the square if causal."""
        if path.endswith("encoder_decoder_attention"):
            return float(self.decoder * self.encoder)
        on_encoder = path.startswith("encoder")
        length = self.encoder if on_encoder else self.decoder
        window = min(config.window or length, length)
        pairs = window * (length - window / 2)  # behind the query, as an area
        blocks = length // (config.global_block_size or length + 1)
        return (2 * pairs if on_encoder else pairs) + length * blocks


def training_flops(model_def: ModelDef, batch_shapes: Mapping[str, tuple[int, ...]]) -> float:
    """FLOPs of one training step: three times the forward pass."""
    return 3.0 * forward_flops(model_def, batch_shapes)


def matmul_peak(dtype: jnp.dtype, *, size: int = 1536, seconds: float = 0.4) -> float:
    """Measured FLOP/s of a square matmul on the default device: a CPU's stand-in for a peak."""
    x = jnp.ones((size, size), dtype)
    multiply = jax.jit(jnp.matmul)
    multiply(x, x).block_until_ready()
    best, start = 0.0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        before = time.perf_counter()
        multiply(x, x).block_until_ready()
        best = max(best, 2.0 * size**3 / (time.perf_counter() - before))
    return best


def peak_flops(device: jax.Device, dtype: jnp.dtype) -> float | None:
    """Dense peak FLOP/s of one device in `dtype`; measured on a CPU, None for unknown chips.

    A CPU simulated as several devices shares one set of cores, so each gets its share.
    """
    if device.platform == "cpu":
        return matmul_peak(dtype) / jax.local_device_count()
    for name, bfloat16, float32 in PEAKS:
        if name.lower() in device.device_kind.lower():
            return bfloat16 if jnp.dtype(dtype) == jnp.bfloat16 else float32
    return None
