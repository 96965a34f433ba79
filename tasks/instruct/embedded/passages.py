"""Tasks over the King James text. A passage is a few clauses of a chapter, 8 to 28 words long."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

from t5x_like.data.templates import Record
from tasks.instruct import metrics
from tasks.instruct.embedded.common import BLANK, collection, rng_of
from tasks.instruct.sources import Example
from tasks.kjv.make_corpus import BOOKS, VALIDATION_BOOKS

_SHORTEST, _LONGEST = 8, 28
_PER_CHAPTER = 8
_ORDER = list(BOOKS.values())
_LAST_BOOK = {
    "Deuteronomy": "law",
    "Esther": "history",
    "Song of Solomon": "wisdom",
    "Malachi": "prophecy",
    "John": "gospel",
    "Acts": "history",
    "Jude": "letter",
    "Revelation": "prophecy",
}
# Passages of a chapter, so that the kinds, and the testaments, are about equally frequent.
_OF_KIND = {"law": 7, "history": 5, "wisdom": 6, "prophecy": 5, "gospel": 20, "letter": 12}
_OF_TESTAMENT = {"old": 5, "new": 22}
_HELD_OUT = {"old": 8, "new": 10}
# The most frequent words, and names with the share that is kept.
_SMALL = re.findall(
    r"\w+",
    "the and of to in that shall he unto his a for they be is them him not with it all thou thy "
    "was which my their me thee said will have from ye as are were out upon by you when but",
)
_FEW_OF = {"LORD": 0.1, "God": 0.2, "Israel": 0.25, "Lord": 0.5}
_NAMES = _FEW_OF | dict.fromkeys(
    re.findall(
        r"\w+",
        "David Moses Judah Jerusalem Jesus Egypt Christ Saul Jacob Aaron Solomon Babylon Pharaoh "
        "Joseph Abraham Joshua Jordan Zion Paul Peter",
    ),
    1.0,
)


def kind_of(book: str) -> str:
    last = next(b for b in _ORDER[_ORDER.index(book) :] if b in _LAST_BOOK)
    return _LAST_BOOK[last]


def testament_of(book: str) -> str:
    return "old" if _ORDER.index(book) <= _ORDER.index("Malachi") else "new"


def passages(chapter: Example) -> list[str]:
    """The passages of a chapter, in order. What is left over at its end is none."""
    found: list[str] = []
    clauses: list[str] = []
    for clause in re.split(r"(?<=[.:;?!]) ", chapter["text"]):
        if len(" ".join([*clauses, clause]).split()) > _LONGEST:
            clauses = []
        clauses.append(clause)
        if _SHORTEST <= len(" ".join(clauses).split()) <= _LONGEST:
            found.append(" ".join(clauses))
            clauses = []
    return found


def some(chapter: Example, task: str, *, most: int = _PER_CHAPTER) -> list[str]:
    """At most `most` passages of a chapter, others for each task."""
    found = passages(chapter)
    return rng_of(task, chapter["text"]).sample(found, min(most, len(found)))


def words_of(text: str) -> list[str]:
    """The words of a text, without punctuation, in their order."""
    return re.findall(r"[A-Za-z][A-Za-z'-]*", text)


def prepare_testament(chapter: Example) -> Sequence[Record]:
    answer = testament_of(chapter["book"])
    counts = _HELD_OUT if chapter["book"] in VALIDATION_BOOKS else _OF_TESTAMENT
    chosen = some(chapter, "testament", most=counts[answer])
    return [{"passage": p, "answer": answer, "choices": ["old", "new"]} for p in chosen]


def prepare_kind(chapter: Example) -> Sequence[Record]:
    answer = kind_of(chapter["book"])
    held_out = chapter["book"] in VALIDATION_BOOKS
    chosen = some(chapter, "kind", most=10 if held_out else _OF_KIND[answer])
    return [{"passage": p, "answer": answer, "choices": list(_OF_KIND)} for p in chosen]


def prepare_kind_choice(chapter: Example) -> Sequence[Record]:
    """The kind among two."""
    made = []
    for record in prepare_kind(chapter):
        passage, answer = str(record["passage"]), str(record["answer"])
        rng = rng_of("kind_choice", passage)
        made.append({"passage": passage} | choose(answer, list(_OF_KIND), rng, wrong=1))
    return made


def prepare_book(chapter: Example) -> Sequence[Record]:
    return [{"passage": p, "answer": chapter["book"]} for p in some(chapter, "book")]


def prepare_book_choice(chapter: Example) -> Sequence[Record]:
    """The book among two."""
    made = []
    for passage in some(chapter, "book_choice", most=2):
        rng = rng_of("book_choice", passage)
        made.append({"passage": passage} | choose(chapter["book"], _ORDER, rng, wrong=1))
    return made


def _blanks(chapter: Example, task: str) -> Iterator[tuple[str, str, random.Random]]:
    """(passage with a blank, word that is missing, random numbers)"""
    for passage in some(chapter, task):
        rng = rng_of(task, passage)
        places = [m for m in re.finditer(r"\b[a-z]{4,}\b", passage) if passage.count(m[0]) == 1]
        if places:
            place = rng.choice(places)
            yield passage[: place.start()] + BLANK + passage[place.end() :], place[0], rng


def prepare_missing_word(chapter: Example) -> Sequence[Record]:
    return [{"passage": p, "answer": word} for p, word, _ in _blanks(chapter, "missing_word")]


def prepare_missing_choice(chapter: Example) -> Sequence[Record]:
    """The wrong choices are words of the same chapter."""
    others = sorted(set(re.findall(r"\b[a-z]{4,}\b", chapter["text"])))
    made = []
    for passage, word, rng in _blanks(chapter, "missing_choice"):
        made.append({"passage": passage} | choose(word, others, rng))
    return made


def prepare_small_word(chapter: Example) -> Sequence[Record]:
    """The missing word is one of the most frequent; all of these are asked for equally often."""
    return [{"passage": p, "answer": word} for p, word, _ in _known_blanks(chapter, "small_word")]


def prepare_small_choice(chapter: Example) -> Sequence[Record]:
    found = _known_blanks(chapter, "small_choice", most=2)
    return [{"passage": p} | choose(word, _SMALL, rng, wrong=1) for p, word, rng in found]


def prepare_name(chapter: Example) -> Sequence[Record]:
    return [{"passage": p, "answer": name} for p, name, _ in _known_blanks(chapter, "name")]


def prepare_name_choice(chapter: Example) -> Sequence[Record]:
    found = _known_blanks(chapter, "name_choice")
    return [{"passage": p} | choose(name, list(_NAMES), rng, wrong=1) for p, name, rng in found]


def _known_blanks(
    chapter: Example, task: str, *, most: int = _PER_CHAPTER
) -> Iterator[tuple[str, str, random.Random]]:
    """As `_blanks`, of words that are asked for again and again: names or small words."""
    words = _NAMES if task.startswith("name") else dict.fromkeys(_SMALL, 1.0)
    for passage in some(chapter, task, most=most):
        rng = rng_of(task, passage)
        there = [w for w in words if re.search(rf"\b{w}\b", passage) and rng.random() < words[w]]
        if there:
            word = rng.choice(there)
            place = rng.choice(list(re.finditer(rf"\b{word}\b", passage)))
            yield passage[: place.start()] + BLANK + passage[place.end() :], word, rng


def choose(
    answer: str, others: Sequence[str], rng: random.Random, *, wrong: int = 2
) -> dict[str, Any]:
    """The answer among `wrong` others, in random order."""
    found = rng.sample([other for other in others if other != answer], wrong)
    choices = rng.sample([answer, *found], wrong + 1)
    return {"answer": answer, "choices": choices, "label": choices.index(answer)}


def _cut(passage: str, rng: random.Random) -> tuple[str, str] | None:
    """A beginning of a passage and the word that comes next; no punctuation between them."""
    words = passage.split()
    places = [i for i in range(4, len(words)) if words[i - 1].isalpha() and words[i].isalpha()]
    if not places:
        return None
    place = rng.choice(places)
    return " ".join(words[:place]), words[place]


def prepare_next_word(chapter: Example) -> Sequence[Record]:
    cuts = [_cut(p, rng_of("next_word", p)) for p in some(chapter, "next_word")]
    return [{"passage": cut[0], "answer": cut[1]} for cut in cuts if cut]


def prepare_next_choice(chapter: Example) -> Sequence[Record]:
    others = sorted({word for word in chapter["text"].split() if word.isalpha()})
    made = []
    for passage in some(chapter, "next_choice", most=4):
        rng = rng_of("next_choice", passage)
        if cut := _cut(passage, rng):
            made.append({"passage": cut[0]} | choose(cut[1], others, rng))
    return made


def prepare_restore(chapter: Example) -> Sequence[Record]:
    """Four to six words of a passage, shuffled."""
    made = []
    for passage in some(chapter, "restore"):
        rng = rng_of("restore", passage)
        words, size = words_of(passage), rng.randint(4, 6)
        start = rng.randint(0, max(0, len(words) - size))
        phrase = words[start : start + size]
        shuffled = rng.sample(phrase, len(phrase))
        if shuffled != phrase:
            made.append({"shuffled": shuffled, "answer": " ".join(phrase)})
    return made


def prepare_order(chapter: Example) -> Sequence[Record]:
    """Three clauses that follow each other; the answer is the order of their letters."""
    made = []
    for passage in some(chapter, "order"):
        clauses = re.split(r"(?<=[,.:;?!]) ", passage)
        if len(clauses) >= 3 and len(set(clauses[:3])) == 3:
            order = rng_of("order", passage).sample(range(3), 3)
            letters = ["ABC"[order.index(i)] for i in range(3)]
            shown = [clauses[i] for i in order]
            made.append({"parts": shown, "answer": " ".join(letters)})
    return made


_FILL = (
    "fill in the word: {passage}",
    "{passage} What is the word that is missing?",
    "Which word is missing here? {passage}",
    "{passage} Say the missing word.",
    "Find the word for " + BLANK + " in this: {passage}",
)
COLLECTIONS = {
    "testament": collection(
        prepare_testament,
        "Is this of the old or the new testament? {passage}",
        "{passage} Which testament is it, {choices:or}?",
        "testament: {passage}",
        "Old or new testament: {passage}",
        "{passage} Is that in the old testament or in the new?",
        metric=metrics.accuracy,
    ),
    "kind": collection(
        prepare_kind,
        "What kind of book is this of: {choices:or}? {passage}",
        "{passage} Is that {choices:or}?",
        "kind of book: {passage}",
        "{passage} Of what kind is the book?",
        "Say the kind of book, one of {choices:commas}: {passage}",
        metric=metrics.accuracy,
    ),
    "kind_choice": collection(
        prepare_kind_choice,
        "Which kind of book is this of, {choices:or}? {passage}",
        "{passage} Of which kind is the book, {choices:or}?",
        "kind of book, {choices:or}: {passage}",
        "Say the kind of the two, {choices:or}: {passage}",
        "{passage} Is that of {choices:or}?",
        metric=metrics.accuracy,
    ),
    "book": collection(
        prepare_book,
        "In which book is this written? {passage}",
        "{passage} Which book is it?",
        "book: {passage}",
        "Say the book of these words: {passage}",
        "{passage} In the book of",
        metric=metrics.accuracy,
    ),
    "book_choice": collection(
        prepare_book_choice,
        "In which book is this written, {choices:or}? {passage}",
        "{passage} Which book is it, {choices:or}?",
        "book, {choices:or}: {passage}",
        "Say the book of the two, {choices:or}: {passage}",
        "{passage} Is that in the book of {choices:or}?",
        metric=metrics.accuracy,
    ),
    "missing_word": collection(prepare_missing_word, *_FILL),
    "missing_choice": collection(
        prepare_missing_choice,
        "{passage} Is the missing word {choices:or}?",
        "Choose the missing word of {choices:commas}: {passage}",
        "{choices:or}: {passage}",
        "Which of {choices:commas} is missing here? {passage}",
        "{passage} {choices:or}?",
        metric=metrics.accuracy,
    ),
    "small_word": collection(
        prepare_small_word,
        "Which small word is missing? {passage}",
        "{passage} Say the small word that is missing.",
        "small word: {passage}",
        "{passage} What is the small word?",
        "Find the small word for " + BLANK + ": {passage}",
        metric=metrics.accuracy,
    ),
    "small_choice": collection(
        prepare_small_choice,
        "Which small word is missing, {choices:or}? {passage}",
        "{passage} Say the small word that is missing, {choices:or}.",
        "small word, {choices:or}: {passage}",
        "{passage} Is the small word {choices:or}?",
        "Find the small word for " + BLANK + ", {choices:or}: {passage}",
        metric=metrics.accuracy,
    ),
    "name": collection(
        prepare_name,
        "Which name is missing? {passage}",
        "{passage} Say the name that is missing.",
        "name: {passage}",
        "{passage} What is the name?",
        "Find the name for " + BLANK + ": {passage}",
        metric=metrics.accuracy,
    ),
    "name_choice": collection(
        prepare_name_choice,
        "Which name is missing, {choices:or}? {passage}",
        "{passage} Say the name that is missing, {choices:or}.",
        "name, {choices:or}: {passage}",
        "{passage} Is the name {choices:or}?",
        "Find the name for " + BLANK + ", {choices:or}: {passage}",
        metric=metrics.accuracy,
    ),
    "next_word": collection(
        prepare_next_word,
        "What is the next word? {passage}",
        "{passage} What word is next?",
        "continue: {passage}",
        "Say the word that followeth: {passage}",
        "{passage} " + BLANK,
    ),
    "restore": collection(
        prepare_restore,
        "Set these words in order: {shuffled:words}",
        "{shuffled:words} Put the words in order.",
        "order the words: {shuffled:commas}",
        "Make a sentence of these words: {shuffled:commas}",
        "What is said here, in the right order? {shuffled:words}",
        inverse=("Set these words in another order: {answer}", "{shuffled:words}"),
    ),
    "order": collection(
        prepare_order,
        "Set in order: {parts:letters_inline}",
        "In which order are these? {parts:letters_inline}",
        "{parts:letters_inline} What is their order?",
        "order: {parts:letters_inline}",
        "Which is first, which is second, which is last? {parts:letters_inline}",
    ),
    "next_choice": collection(
        prepare_next_choice,
        "Is the next word {choices:or}? {passage}",
        "{passage} Is it {choices:or} that followeth?",
        "Choose the word that followeth of {choices:commas}: {passage}",
        "{passage} {choices:or}?",
        "Which of {choices:commas} is next? {passage}",
        metric=metrics.accuracy,
    ),
}
