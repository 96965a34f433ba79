"""Tasks over the embedded excerpt of WordNet."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from t5x_like.data.templates import Record
from tasks.instruct import metrics
from tasks.instruct.embedded.common import collection, rng_of
from tasks.instruct.embedded.passages import choose
from tasks.instruct.sources import Example, read_xz

FILE = Path(__file__).parent / "data" / "wordnet.jsonl.xz"
# Shares of the entries that are kept, so that the classes are about equally frequent.
_KEPT_KINDS = {"person": 0.15, "thing": 0.15, "act": 0.2, "place": 0.6, "substance": 0.7}
_PARTS = ("noun", "verb", "adjective")
_KEPT_PARTS = {"noun": 0.26}


@functools.cache
def _entries() -> list[dict[str, Any]]:
    return read_xz(FILE)


@functools.cache
def _words(part: str) -> list[str]:
    return [entry["word"] for entry in _entries() if entry["part"] == part]


@functools.cache
def _hypernyms() -> list[str]:
    return sorted({e["hypernym"] for e in _entries() if e["hypernym"].isalpha()})


@functools.cache
def _kinds() -> list[str]:
    return sorted({entry["kind"] for entry in _entries() if entry["kind"]})


def _kept(task: str, entry: Example, share: float) -> bool:
    return rng_of(task, entry["word"], entry["part"]).random() < share


def _fields(entry: Example, answer: str) -> dict[str, str]:
    return {"word": entry["word"], "definition": entry["definition"], "answer": answer}


def prepare_kind(entry: Example) -> Record | None:
    kind = entry["kind"]
    if not kind or not _kept("kind", entry, _KEPT_KINDS.get(kind, 1.0)):
        return None
    return _fields(entry, kind) | {"choices": _kinds()}


def prepare_part(entry: Example) -> Record | None:
    if not _kept("part", entry, _KEPT_PARTS.get(entry["part"], 1.0)):
        return None
    return _fields(entry, entry["part"]) | {"choices": list(_PARTS)}


def prepare_part_choice(entry: Example) -> Record | None:
    """The part of speech among two."""
    record = prepare_part(entry)
    if record is None:
        return None
    rng = rng_of("part_choice", entry["word"], entry["part"])
    return dict(record) | choose(entry["part"], _PARTS, rng, wrong=1)


def prepare_hypernym(entry: Example) -> Record | None:
    """Nouns only: what a noun is a kind of."""
    if entry["part"] != "noun" or not entry["hypernym"].isalpha():
        return None
    return _fields(entry, entry["hypernym"])


def prepare_hypernym_choice(entry: Example) -> Record | None:
    record = prepare_hypernym(entry)
    if record is None or not _kept("hypernym_choice", entry, 0.2):
        return None
    rng = rng_of("hypernym_choice", entry["word"])
    return dict(record) | choose(entry["hypernym"], _hypernyms(), rng)


def prepare_definition(entry: Example) -> Record:
    """The word that a definition defines, among others of its part of speech."""
    rng = rng_of("definition", entry["word"], entry["part"])
    return _fields(entry, entry["word"]) | choose(entry["word"], _words(entry["part"]), rng)


COLLECTIONS = {
    "word_kind": collection(
        prepare_kind,
        "What is {word}: {choices:or}?",
        "{word}: {definition}. What kind is it?",
        "kind of {word}: {definition}",
        "Is {word}, that is {definition}, {choices:or}?",
        "{definition}. Say the kind of it, one of {choices:commas}.",
        inverse=("Name a word of the kind {answer}.", "{word}"),
        metric=metrics.accuracy,
    ),
    "word_part": collection(
        prepare_part,
        "{word}: {definition}. Is it {choices:or}?",
        "part of speech of {word}: {definition}",
        "{definition}. {choices:or}?",
        "What part of speech is {word}, that is {definition}?",
        "Is {word} {choices:or}? {definition}",
        metric=metrics.accuracy,
    ),
    "part_choice": collection(
        prepare_part_choice,
        "Which is {word}, {choices:or}? {definition}",
        "{word}: {definition}. Choose: {choices:or}.",
        "Say {choices:or}: {word}, {definition}",
        "{definition}. Is the word for it {choices:or}?",
        "Of the two, {choices:or}, which is {word}? {definition}",
        metric=metrics.accuracy,
    ),
    "hypernym": collection(
        prepare_hypernym,
        "{word}: {definition}. What is it a kind of?",
        "Of what is {word} a kind? {definition}",
        "{word}, that is {definition}, is a kind of",
        "more general than {word}: {definition}",
        "{definition}. In one word, it is a kind of what?",
        inverse=("Name a kind of {answer}.", "{word}"),
    ),
    "definition": collection(
        prepare_definition,
        "Which word meaneth {definition}: {choices:or}?",
        "{definition}. Is that {choices:or}?",
        "Choose the word of {choices:commas}: {definition}",
        "{choices:or}: {definition}",
        "What do we call it, {choices:or}? {definition}",
        inverse=("What is the meaning of {word}?", "{definition}"),
        metric=metrics.accuracy,
    ),
    "hypernym_choice": collection(
        prepare_hypernym_choice,
        "{word}: {definition}. Is it a kind of {choices:or}?",
        "Of which is {word} a kind, {choices:or}? {definition}",
        "Choose what {word} is a kind of: {choices:or}. {definition}",
        "{definition}. Is that {choices:or}?",
        "{word} is a kind of {choices:or}?",
        metric=metrics.accuracy,
    ),
}
