"""All families, found by their config.json or by our model config."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from t5x_like.errors import UserError, did_you_mean
from t5x_like.interop.hugging_face import bert, deepseek, gemma, gpt, llama, mixtral, switch, t5
from t5x_like.interop.hugging_face.adapter import ConfigJson, Family, transfers
from t5x_like.layers.attention import AttentionConfig
from t5x_like.layers.moe.layer import MoeConfig
from t5x_like.models.block import BlockConfig
from t5x_like.models.stack import as_pattern

# Of families that could say the same model, the first is written.
FAMILIES: tuple[Family, ...] = (
    *t5.FAMILIES,
    *switch.FAMILIES,
    *gpt.FAMILIES,
    *llama.FAMILIES,
    *mixtral.FAMILIES,
    *gemma.FAMILIES,
    *bert.FAMILIES,
    *deepseek.FAMILIES,
)

# Fields of our configs that change how a model is run or trained, not what it computes. Of experts
# these are the losses, the noise, and which tokens an expert of limited capacity drops: like
# generation, a converted model drops none.
_TRAINING_ONLY = frozenset(
    {
        *("dtype", "remat", "scan_unroll", "dropout_rate", "broadcast_dropout", "init_stddev"),
        *("balance_loss", "sequence_loss", "z_loss", "bias_rate", "jitter", "random_second"),
        *("dispatcher", "group_size", "prioritized", "expert_dropout_rate"),
    }
)


def find_family(config_json: Mapping[str, Any]) -> Family:
    """The family of a config.json.

    Raises:
      UserError: an architecture that no family has.
    """
    given = config_json.get("architectures")
    if given:
        key, names = "architecture", given if isinstance(given, list) else [given]
        known = {a: family for family in FAMILIES for a in family.architectures}
    else:
        key, names = "model_type", [config_json.get("model_type")]
        known = {t: family for family in FAMILIES for t in family.model_types}
    for name in names:
        if str(name) in known:
            return known[str(name)]
    near = did_you_mean(str(names[0]), known)
    raise UserError(
        f"config.json: {key} '{names[0]}' is not known.{near} Known: {', '.join(sorted(known))}."
    )


def our_config(
    config_json: Mapping[str, Any], *, names_in_files: Iterable[str] | None = None
) -> tuple[Family, Any]:
    """(family, our model config) of a config.json; UserError if we cannot say it."""
    family = find_family(config_json)
    tensors = None
    if names_in_files is not None:
        tensors = frozenset(family.canonical(name) for name in names_in_files)
    try:
        return family, family.from_config(ConfigJson(config_json, tensors))
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        # Values of a type that no adapter expects: {"num_layers": "three"}.
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"config.json of {family.name} cannot be understood: {reason}.") from error


def their_config(
    config: Any, *, carried: Mapping[str, Any] | None = None
) -> tuple[Family, dict[str, Any]]:
    """(family, config.json) in which our model config can be said.

    Args:
      carried: the config.json that the model came with, if it did: its family is preferred, and
        what it says besides (token ids, ...) stays.

    Raises:
      UserError: no family computes what this model does; the nearest one and the differences.
    """
    plain = _is_plain(config)
    first = [find_family(carried)] if carried else []
    reasons: dict[str, list[str]] = {}
    for family in (*first, *FAMILIES):
        if family.plain and not plain:
            continue
        try:
            written = family.to_config(config)
            found = list(differences(config, _read_back(family, written, config)))
        except UserError:  # It has no word for something in `config`.
            continue
        if not found:
            return family, _merge(family, written, carried or {}, config)
        reasons[family.name] = found
    near = min(reasons, key=lambda name: len(reasons[name]), default=None)
    why = f" (nearest is {near}: {'; '.join(reasons[near])})" if near else ""
    raise UserError(
        "No architecture of Hugging Face that is known here computes this model"
        f"{_parts(config)}{why}; keep it in the format of this system."
    )


def _blocks(config: Any) -> list[BlockConfig]:
    sides = (config.block, getattr(config, "encoder_block", None) or config.block)
    return [block for pattern in sides for block in as_pattern(pattern)]


def _is_plain(config: Any) -> bool:
    """Whether `Family.plain` adapters can take it."""
    heads = all(isinstance(block.attention, AttentionConfig) for block in _blocks(config))
    return heads and not config.leading_blocks


def _parts(config: Any) -> str:
    """` with ...`, of a model with experts or leading blocks."""
    found = [
        f"mixtures of {block.mlp.num_experts} experts"
        for block in _blocks(config)
        if isinstance(block.mlp, MoeConfig)
    ][:1]
    if config.leading_blocks:
        found.append(f"{len(config.leading_blocks)} leading_blocks")
    return f" with {' and '.join(found)}" if found else ""


def _merge(
    family: Family, written: dict[str, Any], carried: Mapping[str, Any], config: Any
) -> dict[str, Any]:
    """`written`, in the words of `carried` if that is a config.json of the same model."""
    if carried.get("model_type") != written["model_type"]:
        return written
    merged = {**written, **carried}
    if any(differences(config, _read_back(family, merged, config))):
        return {**carried, **written}
    return merged


def _read_back(family: Family, config_json: Mapping[str, Any], config: Any) -> Any:
    """The model of a config.json beside which lie the tensors of `config`."""
    table = transfers(family.entries(config), config)
    tensors = frozenset(name for t in table for name in t.theirs)
    return family.from_config(ConfigJson(config_json, tensors))


def differences(a: Any, b: Any, path: str = "") -> Iterator[str]:
    """Yields `path: a's value, b's value` where two model configs compute something else."""
    if dataclasses.is_dataclass(a) and type(a) is type(b):
        for field in dataclasses.fields(a):
            if field.name not in _TRAINING_ONLY:
                one, other = getattr(a, field.name), getattr(b, field.name)
                yield from differences(one, other, f"{path}.{field.name}".lstrip("."))
    elif isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        for i, (one, other) in enumerate(zip(a, b, strict=True)):
            yield from differences(one, other, f"{path}[{i}]")
    elif a != b:
        yield f"{path} is {_short(a)}, there {_short(b)}"


def _short(value: Any) -> str:
    return type(value).__name__ if dataclasses.is_dataclass(value) else repr(value)
