"""Multiple choice by log-likelihood: a record becomes an example for each of its choices."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import numpy as np

from t5x_like.data.denoisers import Context
from t5x_like.data.ragged import Examples, Ragged
from t5x_like.data.templates import (
    RECORD,
    Instruct,
    Record,
    load_vocabulary,
    read_records,
    write_record,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choices(Instruct):
    """Gives each choice an example of its own: the same inputs, exemplars included.

    The template's targets see the choice as the field "answer" and its index as "label". The
    feature "record" becomes, for metrics, {"question": digest, "choice": index, "choices": their
    number, "is_right": 0 or 1, "text": the choice}. A record without a right choice, as in a split
    without labels, is left out.

    Attributes:
      choices: field that lists the choices.
      right: field that says which is right: its index, its text, or a list of texts.
    """

    choices: str = "choices"
    right: str = "answer"

    def apply(self, examples: Examples, context: Context, rng: np.random.Generator) -> Examples:
        encode = load_vocabulary(context.features["targets"].vocabulary).encode
        limit = context.length("inputs") - context.features["inputs"].add_eos
        inputs, targets, records = [], [], []
        for record in read_records(examples[RECORD]):
            template = self._draw(record, rng)
            found = marked(record, choices=self.choices, right=self.right)
            if template is None or not any(is_right for _, is_right in found):
                continue
            asked = self._inputs(template, record, rng, encode=encode, limit=limit)
            shared = {"question": _digest(record), "choices": len(found)}
            for index, (text, is_right) in enumerate(found):
                answer = template.render({**record, "answer": text, "label": index})[1]
                of_choice = shared | {"choice": index, "is_right": int(is_right), "text": text}
                inputs.append(asked)
                targets.append(np.array(encode(answer), np.int32))
                records.append(np.frombuffer(write_record(of_choice), np.uint8).astype(np.int32))
        named = {"inputs": inputs, "targets": targets, RECORD: records}
        return {name: Ragged.from_rows(rows) for name, rows in named.items()}


def marked(record: Record, *, choices: str, right: str) -> list[tuple[str, bool]]:
    """The choices of a record, and whether each is right; see `Choices` for the arguments."""
    texts, told = record.get(choices, []), record.get(right)
    if isinstance(told, int):
        return [(text, index == told) for index, text in enumerate(texts)]
    accepted: Any = told if isinstance(told, list) else [told]
    return [(text, text in accepted) for text in texts]


STEPS = (Choices,)


def _digest(record: Record) -> str:
    return hashlib.sha256(write_record(record)).hexdigest()[:16]
