"""Instruction templates: a record becomes inputs and targets, in words drawn anew for each example.

A record is a flat JSON object of strings, numbers and lists of strings. The cache stores it as the
bytes of its JSON, so that the draw, the exemplars and the tokenization come after the cache point:
fresh in every epoch, and without TensorFlow. The recipe is that of FLAN (Wei et al. 2022,
https://arxiv.org/abs/2109.01652; Longpre et al. 2023, https://arxiv.org/abs/2301.13688).
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import json
import re
import string
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from t5x_like.data import vocabularies
from t5x_like.data.cache_format import VocabularySpec
from t5x_like.data.denoisers import Context, Preprocessor
from t5x_like.data.ragged import Examples, Ragged
from t5x_like.errors import UserError, did_you_mean

RECORD = "record"
"""Feature that holds a record: the UTF-8 bytes of its JSON, as integers."""
GROUP = "group"
"""Field of a record: it takes exemplars of the same group only (MMLU: the subject)."""
KINDS = ("zero_shot", "few_shot", "chain_of_thought", "inversion", "t5")

Record = Mapping[str, Any]

_PUNCTUATION = re.compile(f"([{re.escape(string.punctuation)}])")


def _padded(text: str) -> str:
    """Spaces around punctuation, as T5 has them in question answering."""
    return " ".join(_PUNCTUATION.sub(r" \1 ", text).split())


def _lettered(items: Sequence[str], separator: str) -> str:
    return separator.join(f"({chr(65 + i)}) {item}" for i, item in enumerate(items))


def _or(items: Sequence[str]) -> str:
    return " or ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


# What may follow the colon in "{field:form}".
_FORMS: dict[str, Callable[[Any], str]] = {
    "": str,
    "lower": lambda text: text.lower(),
    "padded": _padded,
    "letter": lambda index: chr(65 + index),
    "number": lambda index: str(index + 1),
    "commas": ", ".join,
    "or": _or,
    "words": " ".join,
    "lines": lambda items: "\n".join(f"- {item}" for item in items),
    "letters": lambda items: _lettered(items, "\n"),
    "letters_inline": lambda items: _lettered(items, " "),
    "numbers": lambda items: " ".join(f"({i}) {item}" for i, item in enumerate(items, 1)),
}


@functools.lru_cache(maxsize=4096)
def _parse(text: str) -> tuple[tuple[str, str, Callable[[Any], str] | None], ...]:
    """Pieces (literal, field, form) of a format string; a last literal has no field."""
    pieces = []
    for literal, field, form, _ in string.Formatter().parse(text):
        if form and form not in _FORMS:
            raise UserError(
                f"The template {text!r} asks for the form {form!r}.{did_you_mean(form, _FORMS)} "
                f"Known: {', '.join(filter(None, _FORMS))}."
            )
        pieces.append((literal, field or "", None if field is None else _FORMS[form or ""]))
    return tuple(pieces)


@dataclasses.dataclass(frozen=True)
class Template:
    """Two format strings over the fields of a record: "{question}", "{choices:letters}".

    It applies to records that have all of its fields, none of them empty.

    Attributes:
      inputs, targets: the format strings.
      kind: one of `KINDS`.
      shots: how many solved examples stand before the inputs, at most: fewer if they do not fit.
      weight: how often it is drawn, in proportion to the others that apply.
      answer_prefix: between the inputs and the targets of a solved example.
      separator: between solved examples.
    """

    inputs: str
    targets: str
    _: dataclasses.KW_ONLY
    kind: str = "zero_shot"
    shots: int = 0
    weight: float = 1.0
    answer_prefix: str = "\n"
    separator: str = "\n\n"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"Template.kind is {self.kind!r}, not one of {', '.join(KINDS)}.")
        if self.shots < 0 or not self.weight > 0:
            raise UserError(
                f"A template has shots = {self.shots} and weight = {self.weight}; shots must be at "
                "least 0 and the weight positive."
            )
        if not self.fields:
            raise UserError(f"The template {self.inputs!r} has no field such as '{{question}}'.")

    @functools.cached_property
    def fields(self) -> frozenset[str]:
        """Names of the fields that it needs."""
        pieces = (*_parse(self.inputs), *_parse(self.targets))
        return frozenset(field for _, field, _ in pieces if field)

    def applies(self, record: Record) -> bool:
        return all(record.get(field) not in (None, "", []) for field in self.fields)

    def render(self, record: Record) -> tuple[str, str]:
        """Inputs and targets of a record that it applies to, without exemplars."""
        return _fill(self.inputs, record), _fill(self.targets, record)

    def solved(self, record: Record) -> str:
        """The record as an exemplar."""
        return self.answer_prefix.join(self.render(record))

    def with_exemplars(self, record: Record, exemplars: Sequence[Record]) -> str:
        """The inputs of `record` after the solved `exemplars`."""
        shown = [self.solved(exemplar) for exemplar in exemplars]
        return self.separator.join([*shown, _fill(self.inputs, record)])


def _fill(text: str, record: Record) -> str:
    return "".join(
        literal + (form(record[field]) if form else "") for literal, field, form in _parse(text)
    )


def few_shot(template: Template, *, shots: int) -> Template:
    """The same template after `shots` solved examples."""
    return dataclasses.replace(template, kind="few_shot", shots=shots)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instruct(Preprocessor):
    """Draws a template for each record, and exemplars for it; gives "inputs" and "targets".

    A record that no template applies to is left out. The feature "record" stays, for metrics.

    Attributes:
      templates: what to draw from.
      exemplars: records to draw solved examples from; never the record itself.
    """

    templates: tuple[Template, ...]
    exemplars: tuple[Record, ...] = ()

    def __post_init__(self) -> None:
        as_templates = (t if isinstance(t, Template) else Template(**t) for t in self.templates)
        object.__setattr__(self, "templates", tuple(as_templates))
        object.__setattr__(self, "exemplars", tuple(self.exemplars))
        if not self.templates:
            raise UserError("Instruct has no template. Give at least one.")

    def to_dict(self) -> dict[str, Any]:
        step = super().to_dict()
        step["args"]["templates"] = [dataclasses.asdict(t) for t in self.templates]
        step["args"]["exemplars"] = list(self.exemplars)
        return step

    def apply(self, examples: Examples, context: Context, rng: np.random.Generator) -> Examples:
        encode = load_vocabulary(context.features["targets"].vocabulary).encode
        limit = context.length("inputs") - context.features["inputs"].add_eos
        kept, inputs, targets = [], [], []
        for i, record in enumerate(read_records(examples[RECORD])):
            template = self._draw(record, rng)
            if template is None:
                continue
            kept.append(i)
            inputs.append(self._inputs(template, record, rng, encode=encode, limit=limit))
            targets.append(np.array(encode(template.render(record)[1]), np.int32))
        return {
            "inputs": Ragged.from_rows(inputs),
            "targets": Ragged.from_rows(targets),
            RECORD: examples[RECORD].take(np.array(kept, np.int64)),
        }

    def _draw(self, record: Record, rng: np.random.Generator) -> Template | None:
        """One draw of `rng` whatever comes of it."""
        draw = rng.random()
        templates = [t for t in self.templates if t.applies(record)]
        if not templates:
            return None
        bounds = list(itertools.accumulate(t.weight for t in templates))
        return templates[min(bisect.bisect(bounds, draw * bounds[-1]), len(templates) - 1)]

    def _inputs(
        self,
        template: Template,
        record: Record,
        rng: np.random.Generator,
        *,
        encode: Callable[[str], list[int]],
        limit: int,
    ) -> np.ndarray:
        """Ids of the inputs, with as many exemplars as leave room for the question itself."""
        exemplars = self._exemplars(template, record, rng)
        while True:
            ids = encode(template.with_exemplars(record, exemplars))
            if len(ids) <= limit or not exemplars:
                return np.array(ids, np.int32)
            exemplars = exemplars[1:]

    def _exemplars(
        self, template: Template, record: Record, rng: np.random.Generator
    ) -> list[Record]:
        if not template.shots:
            return []
        group = record.get(GROUP)
        pool = [
            exemplar
            for exemplar in self.exemplars
            if exemplar.get(GROUP) == group and exemplar != record and template.applies(exemplar)
        ]
        chosen = rng.permutation(len(pool))[: template.shots]
        return [pool[i] for i in chosen]


STEPS = (Instruct,)


def read_records(rows: Ragged) -> list[dict[str, Any]]:
    """The records whose bytes are the rows."""
    flat = rows.values.astype(np.uint8).tobytes()
    return [json.loads(flat[a:b]) for a, b in itertools.pairwise(rows.offsets.tolist())]


def write_record(record: Record) -> bytes:
    """Bytes of a record, as the cache stores it.

    Raises:
      UserError: a value is neither string, number nor list of strings.
    """
    for name, value in record.items():
        strings = value if isinstance(value, list) else [value]
        if not all(isinstance(item, str | int | float) for item in strings):
            raise UserError(
                f"The field {name!r} of a record is {value!r}; a string, a number or a list of "
                "strings is wanted. Flatten it in the Task's `prepare`."
            )
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()


@functools.lru_cache(maxsize=8)
def load_vocabulary(spec: VocabularySpec) -> vocabularies.Vocabulary:
    """Loads what `spec` describes; a file in a bucket is copied here first.

    Raises:
      UserError: the file has gone or changed, or only SeqIO knows such a vocabulary.
    """
    if "://" not in spec.path:
        return vocabularies.from_spec(spec)
    remote = epath.Path(spec.path)
    with tempfile.TemporaryDirectory() as scratch:
        local = Path(scratch) / remote.name
        local.write_bytes(remote.read_bytes())
        return vocabularies.from_spec(dataclasses.replace(spec, path=str(local)))
