"""Metric functions of the Tasks, in SeqIO's manner: (targets, predictions) -> {name: value}."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from t5x_like.data.templates import RECORD
from t5x_like.errors import UserError

_LIBRARY = "t5x_like.evaluation.metrics"


def exact_match(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Percent of predictions that are the target, whitespace at the ends aside."""
    pairs = zip(targets, predictions, strict=True)
    right = sum(target.strip() == prediction.strip() for target, prediction in pairs)
    return {"exact_match": 100.0 * right / max(1, len(targets))}


def accuracy(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """The same, under the name that classification has for it."""
    return {"accuracy": exact_match(targets, predictions)["exact_match"]}


def named(name: str) -> Callable[[Sequence[Any], Sequence[Any]], Mapping[str, Any]]:
    """The function `name` of `t5x_like.evaluation.metrics`, looked up when it is called."""

    def metric(targets: Sequence[Any], predictions: Sequence[Any]) -> Mapping[str, Any]:
        library = importlib.import_module(_LIBRARY)
        if not hasattr(library, name):
            raise UserError(f"{_LIBRARY} has no metric {name!r}.")
        return getattr(library, name)(targets, predictions)

    metric.__name__ = name
    return metric


def all_answers(text: str, *, example: Mapping[str, Any], is_target: bool) -> str | list[str]:
    """Postprocess function: as targets, all accepted answers of the record."""
    if not is_target:
        return text
    record = read_record(example)
    return list(record.get("answers") or [record["answer"]])


def read_record(example: Mapping[str, Any]) -> dict[str, Any]:
    """The record of an example that SeqIO gives."""
    return json.loads(bytes(int(byte) for byte in example[RECORD]))
