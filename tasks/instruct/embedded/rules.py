"""Arithmetic and operations on lists, computed by rule. An example is a number."""

from __future__ import annotations

import functools
import lzma
import re
from collections.abc import Callable
from pathlib import Path

from t5x_like.data.templates import Record
from tasks.instruct.embedded.common import collection, rng_of
from tasks.instruct.sources import Example

COUNT = 4000
"""Examples of each task, train and validation together."""
# Sums of two numbers below it, and what takes one of them away again: every pair comes once.
BELOW = 32
PAIRS = BELOW * BELOW * 2
_CORPUS = Path(__file__).parents[2] / "kjv" / "data" / "train.jsonl.xz"
_NAMES = 300


@functools.cache
def names() -> list[str]:
    """The most frequent words of the King James text that are always written with a capital."""
    counts: dict[str, int] = {}
    lower = set()
    with lzma.open(_CORPUS, "rt", encoding="utf-8") as lines:
        for line in lines:
            for word in re.findall(r"(?<=[a-z,] )[A-Za-z]{3,9}\b", line):
                counts[word] = counts.get(word, 0) + 1
                lower.add(word if word.islower() else "")
    proper = [w for w in counts if w.istitle() and w.lower() not in lower]
    return sorted(proper, key=lambda word: (-counts[word], word))[:_NAMES]


def prepare_arithmetic(example: Example) -> Record:
    number = int(example)  # type: ignore[call-overload]
    minus, pair = divmod(number, BELOW * BELOW)
    a, b = divmod(pair, BELOW)
    a += b if minus else 0
    sign, answer = ("-", a - b) if minus else ("+", a + b)
    tens = b - b % 10
    halfway = a - tens if minus else a + tens
    steps = f"{a} {sign} {tens} = {halfway}, {halfway} {sign} {b % 10} = {answer}"
    return {"sum": f"{a} {sign} {b}", "steps": steps, "answer": str(answer)}


def prepare_larger(example: Example) -> Record:
    """All pairs of different numbers below 64 but the last few."""
    a, b = divmod(int(example), 63)  # type: ignore[call-overload]
    numbers = (a, (a + 1 + b) % 64)
    return {"numbers": [str(n) for n in numbers], "answer": str(max(numbers))}


def _list_task(task: str, answer: Callable[[list[str]], str]) -> Callable[[Example], Record]:
    def prepare(example: Example) -> Record:
        rng = rng_of(task, str(example))
        items = rng.sample(names(), rng.randint(3, 5))
        numbered = ", ".join(f"{i} {item}" for i, item in enumerate(items, 1))
        return {"items": items, "numbered": numbered, "answer": answer(items)}

    return prepare


COLLECTIONS = {
    "arithmetic": collection(
        prepare_arithmetic,
        "What is {sum}?",
        "{sum} =",
        "Say the number: {sum}",
        "How many are {sum}?",
        "number: {sum}",
        steps=("What is {sum}? Show the way.", "{steps}"),
        inverse=("Which numbers make {answer}?", "{sum}"),
    ),
    "list_last": collection(
        _list_task("last", lambda items: items[-1]),
        "Who is the last? {items:commas}",
        "{items:commas} Which name is last?",
        "last: {items:commas}",
        "Say the last name of these: {items:commas}",
        "Of {items:commas}, who is at the end?",
    ),
    "list_second": collection(
        _list_task("second", lambda items: items[1]),
        "Who is the second? {items:commas}",
        "{items:commas} Which name is second?",
        "second: {items:commas}",
        "Say the second name of these: {items:commas}",
        "Of {items:commas}, who is the second?",
    ),
    "list_reverse": collection(
        _list_task("reverse", lambda items: " ".join(reversed(items))),
        "Say these names from the last to the first: {items:commas}",
        "{items:commas} Turn the names about.",
        "turn: {items:commas}",
        "Set the last name first: {items:commas}",
        "What are these names, the other way? {items:commas}",
    ),
    "list_count": collection(
        _list_task("count", lambda items: str(len(items))),
        "How many names are these? {items:commas}",
        "{items:commas} How many are they?",
        "number of names: {items:commas}",
        "Number these names: {items:commas}",
        "Say how many: {items:commas}",
        steps=("How many names are these? Number them. {items:commas}", "{numbered}: {answer}"),
    ),
    "list_first": collection(
        _list_task("first", lambda items: items[0]),
        "Who is the first? {items:commas}",
        "{items:commas} Which name is first?",
        "first: {items:commas}",
        "Say the first name of these: {items:commas}",
        "Of {items:commas}, who is at the beginning?",
    ),
    "larger": collection(
        prepare_larger,
        "Which is greater, {numbers:or}?",
        "{numbers:or}: which number is more?",
        "greater: {numbers:commas}",
        "Say the greater number of {numbers:commas}.",
        "Is {numbers:or} the greater number?",
    ),
}
