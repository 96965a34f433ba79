"""Rotary positions in config.json, in both forms.

Published files have `rope_theta` and `rope_scaling` at the top level; transformers 5 writes one
dict, `rope_parameters`. Both are read, as transformers does where a file has both. The published
form is written, which all versions read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from t5x_like.errors import UserError, did_you_mean
from t5x_like.layers.rope import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeConfig,
    YarnScaling,
)

Json = Mapping[str, Any]
_COMMON = {"type", "rope_type", "rope_theta", "partial_rotary_factor"}
# What says nothing that another key does not, or nothing that the model computes with.
_IDLE = {"original_max_position_embeddings", "finetuned"}


def read_rope(config: Json, parameters: Json | None = None, *, theta: float = 1e4) -> RopeConfig:
    """The rotary positions of a model.

    Args:
      config: config.json.
      parameters: the dict of these positions, where a model has several; None takes
        `rope_scaling` or `rope_parameters` of `config`.
      theta: for a config.json that does not say.

    Raises:
      UserError: a scaling, or a key of one, that we do not have.
    """
    if parameters is None:
        parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in _READERS:
        raise UserError(
            f"config.json: rope type '{kind}' is not supported; known: {', '.join(_READERS)}."
            + did_you_mean(kind, _READERS)
        )
    reader, keys = _READERS[kind]
    unknown = sorted(parameters.keys() - _COMMON - _IDLE - keys)
    if unknown:
        raise UserError(f"config.json: rope type '{kind}' has no {', '.join(map(repr, unknown))}.")
    fraction = parameters.get("partial_rotary_factor") or config.get("partial_rotary_factor")
    return RopeConfig(
        theta=float(parameters.get("rope_theta") or config.get("rope_theta") or theta),
        fraction=fraction or 1.0,
        scaling=reader(config, parameters),
    )


def _original_length(config: Json, parameters: Json) -> int:
    """Phi-3 has it at the top level, where transformers looks first."""
    return (
        config.get("original_max_position_embeddings")
        or parameters.get("original_max_position_embeddings")
        or config["max_position_embeddings"]
    )


def _read_linear(config: Json, parameters: Json) -> LinearScaling:
    return LinearScaling(factor=float(parameters["factor"]))


def _read_dynamic(config: Json, parameters: Json) -> DynamicScaling:
    return DynamicScaling(
        factor=float(parameters["factor"]), original_length=config["max_position_embeddings"]
    )


def _read_llama3(config: Json, parameters: Json) -> Llama3Scaling:
    return Llama3Scaling(
        factor=float(parameters["factor"]),
        low_frequency_factor=float(parameters["low_freq_factor"]),
        high_frequency_factor=float(parameters["high_freq_factor"]),
        original_length=_original_length(config, parameters),
    )


def _read_yarn(config: Json, parameters: Json) -> YarnScaling:
    original = _original_length(config, parameters)
    factor = float(parameters.get("factor") or config["max_position_embeddings"] / original)
    if not parameters.get("truncate", True):
        raise UserError("config.json: YaRN with 'truncate' false is not supported.")
    attention = parameters.get("attention_factor")
    numerator, denominator = (parameters.get(key) for key in ("mscale", "mscale_all_dim"))
    if attention is None and numerator and denominator:
        # DeepSeek's: the paper's factor with a coefficient, over that with another.
        scales = (0.1 * m * math.log(factor) + 1 for m in (numerator, denominator))
        attention = next(scales) / next(scales)
    return YarnScaling(
        factor=factor,
        original_length=original,
        beta_fast=float(parameters.get("beta_fast") or 32),
        beta_slow=float(parameters.get("beta_slow") or 1),
        attention_factor=attention,
    )


def _read_longrope(config: Json, parameters: Json) -> LongRopeScaling:
    original, longest = _original_length(config, parameters), config["max_position_embeddings"]
    factor, attention = parameters.get("factor"), parameters.get("attention_factor")
    if attention is None and factor is not None and factor != longest / original:
        attention = math.sqrt(1 + max(math.log(factor), 0.0) / math.log(original))
    return LongRopeScaling(
        short_factors=tuple(parameters["short_factor"]),
        long_factors=tuple(parameters["long_factor"]),
        original_length=original,
        max_length=longest,
        attention_factor=attention,
    )


_LONGROPE_KEYS = {"short_factor", "long_factor", "factor", "attention_factor"}
_READERS: dict[str, tuple[Any, set[str]]] = {
    "default": (lambda config, parameters: None, set()),
    "linear": (_read_linear, {"factor"}),
    "dynamic": (_read_dynamic, {"factor"}),
    "llama3": (_read_llama3, {"factor", "low_freq_factor", "high_freq_factor"}),
    "yarn": (
        _read_yarn,
        {
            *("factor", "attention_factor", "beta_fast", "beta_slow"),
            *("mscale", "mscale_all_dim", "truncate"),
        },
    ),
    "longrope": (_read_longrope, _LONGROPE_KEYS),
    "su": (_read_longrope, _LONGROPE_KEYS),  # Its first name.
}


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """Keys of config.json, and the lengths that a scaling refers to, which our models have only
    with one. `rope_parameters` is null, lest that of another file stays in force beside it."""
    scaling, lengths = _scaling(rope.scaling)
    fraction = {} if rope.fraction == 1 else {"partial_rotary_factor": rope.fraction}
    return {
        "rope_theta": rope.theta,
        "rope_scaling": scaling,
        "rope_parameters": None,
        **fraction,
        **lengths,
    }


def rope_parameters(rope: RopeConfig) -> dict[str, Any]:
    """The form of transformers 5, for what the published form cannot say."""
    scaling = _scaling(rope.scaling)[0] or {"rope_type": "default"}
    return {"rope_theta": rope.theta, **scaling}


def _scaling(scaling: Any) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """(`rope_scaling`, further keys of config.json)."""
    match scaling:
        case None:
            return None, {}
        case LinearScaling():
            return {"rope_type": "linear", "factor": scaling.factor}, {}
        case DynamicScaling():
            length = {"max_position_embeddings": scaling.original_length}
            return {"rope_type": "dynamic", "factor": scaling.factor}, length
        case Llama3Scaling():
            return {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_frequency_factor,
                "high_freq_factor": scaling.high_frequency_factor,
                "original_max_position_embeddings": scaling.original_length,
            }, {}
        case YarnScaling():
            found = {
                "rope_type": "yarn",
                "factor": scaling.factor,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "original_max_position_embeddings": scaling.original_length,
            }
        case LongRopeScaling():
            found = {
                "rope_type": "longrope",
                "short_factor": list(scaling.short_factors),
                "long_factor": list(scaling.long_factors),
                "original_max_position_embeddings": scaling.original_length,
            }
    if scaling.attention_factor is not None:
        found["attention_factor"] = scaling.attention_factor
    longest = getattr(scaling, "max_length", None) or round(
        scaling.factor * scaling.original_length
    )
    return found, {"max_position_embeddings": longest}
