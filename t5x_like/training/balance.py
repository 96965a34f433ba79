"""The balance bias of sigmoid routers, moved once a step by what the whole global batch chose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from t5x_like.layers.moe.layer import Moe
from t5x_like.layers.moe.routers import SigmoidRouter
from t5x_like.models.base import ModelDef


def bias_rates(model_def: ModelDef) -> dict[str, float]:
    """Path of the layers (`decoder/layers`) -> step of their bias, where they have one."""
    rates = {}
    for path, module in model_def.modules():
        if isinstance(module, Moe) and isinstance(module.config.router, SigmoidRouter):
            rates[path.removesuffix("/mlp")] = module.config.router.bias_rate
    return rates


def rebalance(
    params: dict[str, Any],
    loads: Mapping[str, Float[Array, "layers experts"]],
    rates: Mapping[str, float],
    *,
    keep: Array,
) -> dict[str, Any]:
    """Returns `params` with every bias one step nearer to balance (DeepSeek-V3, section 2.1.2).

    `bias += rate * sign(mean load - load)`. The loads are integers in float32, exact below 2**24
    tokens an expert, and summed over the global batch before the sign: every device of every mesh
    takes the same step.

    Args:
      params: nested dict.
      loads: by path of the layers.
      rates: what `bias_rates` returned.
      keep: True leaves the bias alone, for a step that is skipped.
    """
    for path, rate in rates.items():
        if path not in loads:  # modules of multi-token prediction that the objective does not run
            continue
        load = loads[path]
        step = rate * jnp.sign(jnp.mean(load, axis=1, keepdims=True) - load)
        names = [*path.split("/"), "mlp", "router", "balance_bias"]
        params = _with_added(params, names, jnp.where(keep, 0.0, step))
    return params


def _with_added(tree: dict[str, Any], names: list[str], step: Array) -> dict[str, Any]:
    """A copy of nested dicts with `step` added to one leaf."""
    first, *rest = names
    new = _with_added(tree[first], rest, step) if rest else tree[first] + step
    return {**tree, first: new}
