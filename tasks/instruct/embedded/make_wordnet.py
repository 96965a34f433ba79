"""Makes the embedded excerpt of WordNet 3.0 from Debian's package wordnet-base (1:3.0-37).

    apt-get download wordnet-base && dpkg-deb -x wordnet-base_*.deb extracted
    python tasks/instruct/embedded/make_wordnet.py extracted/usr/share/wordnet

Writes data/wordnet.jsonl.xz beside this file, and WordNet's licence with it: a line {"word",
"part", "kind", "definition", "hypernym"} for the most frequent sense of each noun, verb and
adjective of one word that the King James text has, or that is frequent in WordNet's own texts. The
bytes are the same on every run.
"""

from __future__ import annotations

import itertools
import json
import lzma
import re
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
DATA = HERE / "data"
CORPUS = HERE.parents[1] / "kjv" / "data" / "train.jsonl.xz"
# Occurrences in WordNet's tagged texts from which on a word counts as frequent: fewer for the nouns
# of `KINDS`.
FREQUENT, FREQUENT_OF_KIND = 8, 1
LONGEST_DEFINITION = 90
# Remarks of WordNet on words that are no fit examples.
UNFIT = re.compile("slur|offens|disparag|derogat|obscen|vulgar|insult|slang")
PARTS = {"noun": "1", "verb": "2", "adj": "3"}
NAMES = {"noun": "noun", "verb": "verb", "adj": "adjective"}
# lexnames(5WN): the files of nouns whose names a child would understand.
KINDS = {
    "04": "act",
    "05": "animal",
    "06": "thing",
    "08": "body",
    "12": "feeling",
    "13": "food",
    "15": "place",
    "18": "person",
    "20": "plant",
    "27": "substance",
    "28": "time",
}


def corpus_words() -> set[str]:
    with lzma.open(CORPUS, "rt", encoding="utf-8") as lines:
        return {word for line in lines for word in re.findall(r"\b[a-z]+\b", line)}


def counts(folder: Path) -> dict[tuple[str, str], int]:
    """Occurrences of the first sense of each (lemma, number of its part of speech)."""
    found: dict[tuple[str, str], int] = {}
    for line in (folder / "cntlist.rev").read_text().splitlines():
        key, sense, count = line.split()
        lemma, _, rest = key.partition("%")
        if sense == "1":
            part = rest[0].replace("5", "3")  # an adjective of a cluster
            found[lemma, part] = max(found.get((lemma, part), 0), int(count))
    return found


def synsets(folder: Path, part: str) -> dict[str, tuple[list[str], str, str, str]]:
    """Offset to (words, number of the lexicographer's file, offset of hypernym, gloss)."""
    found = {}
    for line in (folder / f"data.{part}").read_text().splitlines():
        if line.startswith("  "):
            continue
        fields, _, gloss = line.partition(" | ")
        offset, file, _, number, *rest = fields.split()
        end = 2 * int(number, 16)
        words, pointers = rest[:end:2], rest[end + 1 :]
        hypernyms = [b for a, b in itertools.pairwise(pointers) if a in ("@", "@i")]
        found[offset] = (words, file, hypernyms[0] if hypernyms else "", gloss)
    return found


def definition_of(gloss: str) -> str:
    """The first definition of a gloss, without examples and remarks on usage."""
    text = re.split(r"[;:]", gloss.partition(' "')[0])[0]
    return re.sub(r"^\([^)]*\)\s*", "", text.strip()).strip()


def entries(folder: Path) -> Iterator[dict[str, str]]:
    known, frequency = corpus_words(), counts(folder)
    for part, number in PARTS.items():
        senses = synsets(folder, part)
        for line in (folder / f"index.{part}").read_text().splitlines():
            word, *fields = line.split() if line[0] != " " else [""]
            if not re.fullmatch("[a-z]{3,}", word):
                continue
            # Offsets end the line, those of frequent senses first: as many as the second field.
            words, file, hypernym, gloss = senses[fields[-int(fields[1])]]
            if UNFIT.search(gloss) or not {word, f"{word}(a)", f"{word}(p)"} & {*words}:
                continue  # the index has names in lower case
            kind = KINDS.get(file, "") if part == "noun" else ""
            least = FREQUENT_OF_KIND if kind else FREQUENT
            if word not in known and frequency.get((word, number), 0) < least:
                continue
            definition = definition_of(gloss)
            if not 5 <= len(definition) <= LONGEST_DEFINITION or word in definition.split():
                continue
            above = senses[hypernym][0][0].replace("_", " ") if hypernym else ""
            yield {
                "word": word,
                "part": NAMES[part],
                "kind": kind,
                "definition": definition,
                "hypernym": above,
            }


def main(folder: Path) -> None:
    lines = [json.dumps(entry) for entry in entries(folder)]
    packed = lzma.compress("".join(f"{line}\n" for line in lines).encode(), preset=9)
    DATA.mkdir(exist_ok=True)
    (DATA / "wordnet.jsonl.xz").write_bytes(packed)
    licence = [s for s in (folder / "data.noun").read_text().splitlines() if s.startswith("  ")]
    text = "\n".join(re.sub(r"^ +\d+ ?", "", line).rstrip() for line in licence)
    (DATA / "WORDNET_LICENSE.txt").write_text(text + "\n")
    print(f"{len(lines)} words, {len(packed)} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
