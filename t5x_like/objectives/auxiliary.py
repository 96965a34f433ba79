"""What mixtures of experts add to a loss and to its metrics, whatever the objective.

An auxiliary loss is a mean over the real tokens of the global batch and over the layers that have
experts, those of encoder and decoder alike, added to the normalised loss (as T5X does). Every
layer gives it as a sum over tokens, and the number of tokens of the global batch is known before
any of it is computed: so microbatches and devices only add up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from t5x_like.layers.moe.layer import Auxiliary
from t5x_like.models.future import has_future
from t5x_like.models.padding import real_tokens

Auxiliaries = dict[str, Auxiliary]
SummedMetrics = dict[str, tuple[Float[Array, ""], Float[Array, ""]]]

STACKS = ("encoder", "decoder", "future")
# Before the path of the layers: the metric that holds the load of each of their experts.
LOADS = "moe_loads/"


def auxiliaries_of(module: Any) -> Auxiliaries:
    """What the layers of a called model left, by path (`decoder/layers`); a dense one has none.

    Every array has a leading dim, the layers that share the path.
    """
    found = {}
    for stack in STACKS:
        left = getattr(getattr(module, stack, None), "auxiliary", None)
        for path, auxiliary in ({} if left is None else left.get_value()).items():
            found[f"{stack}/{path}"] = auxiliary
    return found


def auxiliary_loss(
    auxiliaries: Auxiliaries, whole_batch: Mapping[str, Array], *, divisor: Float[Array, ""]
) -> Float[Array, ""]:
    """The part of a microbatch in `divisor` times the mean auxiliary loss of the global batch.

    Args:
      auxiliaries: of the microbatch.
      whole_batch: the global batch.
      divisor: what the caller will divide the summed loss of all microbatches by.
    """
    total = jnp.float32(0)
    num_layers = sum(len(auxiliary.load) for auxiliary in auxiliaries.values())
    for path, auxiliary in auxiliaries.items():
        tokens = _tokens(path, whole_batch, layers=len(auxiliary.load))
        loss = jnp.sum(auxiliary.sums["auxiliary_loss"][0] / jnp.maximum(tokens, 1))
        total += loss * (divisor / num_layers)
    return total


def _tokens(path: str, batch: Mapping[str, Array], *, layers: int) -> Float[Array, "#layers"]:
    """How many tokens of the batch each of the layers at `path` works on."""
    stack = path.split("/")[0]
    if stack == "future":
        return jnp.sum(has_future(batch, depth=layers), axis=(1, 2), dtype=jnp.float32)
    real = real_tokens(batch, stack=stack)
    assert real is not None
    return jnp.sum(real, dtype=jnp.float32)[None]


def auxiliary_metrics(auxiliaries: Auxiliaries) -> SummedMetrics:
    """Metrics as (sum, weight), over all layers (`moe/NAME`) and by path (`moe/PATH/NAME`)."""
    metrics: SummedMetrics = {}
    for path, auxiliary in auxiliaries.items():
        for name, pair in auxiliary.sums.items():
            total, weight = (jnp.sum(part) for part in jax.lax.stop_gradient(pair))
            for key in {f"moe/{name}", f"moe/{path}/{name}"}:
                before = metrics.get(key, (jnp.float32(0), jnp.float32(0)))
                metrics[key] = (before[0] + total, before[1] + weight)
    return metrics


def load_metrics(loads: Mapping[str, Float[Array, "layers experts"]]) -> dict[str, Array]:
    """`max_expert_load`, the largest load over the mean: the mean over layers, and by path.

    Of loads that are summed over the global batch: a maximum does not add up.
    """
    ratios = {
        path: jnp.max(load, axis=1) / jnp.maximum(jnp.mean(load, axis=1), 1e-9)
        for path, load in loads.items()
    }
    if not ratios:
        return {}
    metrics = {f"moe/{path}/max_expert_load": jnp.mean(r) for path, r in ratios.items()}
    every = jnp.concatenate(list(ratios.values()))
    return {"moe/max_expert_load": jnp.mean(every), **metrics}
