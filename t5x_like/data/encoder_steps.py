"""Steps between the token cache and an encoder-only model: sequences, sentence pairs, masking.

A task is a step that lays sequences out ([CLS] a [SEP], or [CLS] a [SEP] b [SEP]), then
`MaskTokens` where the masked language model is trained. `lexicon` says which ids these three and
the mask are. The noise of a group of documents depends on the generator alone, which the pipeline
makes from the seed and the position: every epoch has its own (RoBERTa's dynamic masking).
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Int

from t5x_like.data.denoisers import Context, Preprocessor, concatenate
from t5x_like.data.lexicon import Lexicon, lexicon
from t5x_like.data.ragged import Examples, Ragged, join_rows
from t5x_like.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sequences(Preprocessor):
    """Reads the documents "targets"; writes "inputs", "token_types" and what else there is."""

    specials: ClassVar[int] = 2

    def apply(self, examples: Examples, context: Context, rng: np.random.Generator) -> Examples:
        room = context.length("inputs") - self.specials
        if room < 2:
            raise UserError(
                f"The inputs' length {context.length('inputs')} is too short for "
                f"{type(self).__name__}: two tokens and {self.specials} special ones take "
                f"{self.specials + 2}. Give longer task_feature_lengths."
            )
        return self._sequences(examples, room, _lexicon(context), rng)

    @abstractmethod
    def _sequences(
        self, examples: Examples, room: int, words: Lexicon, rng: np.random.Generator
    ) -> Examples: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullSentences(_Sequences):
    """RoBERTa's FULL-SENTENCES (Liu et al. 2019, arXiv:1907.11692): no next-sentence prediction.

    The documents of a group are put end to end, a separator after each, and cut into the longest
    sequences [CLS] tokens [SEP] that fit the inputs' length.
    """

    def _sequences(
        self, examples: Examples, room: int, words: Lexicon, rng: np.random.Generator
    ) -> Examples:
        documents = examples["targets"].append(words.sep_id)
        return _single(concatenate(documents).split_rows(room), words)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passages(_Sequences):
    """Each document by itself: one sequence [CLS] tokens [SEP], or several if it is long.

    A feature "label" of one value a document goes with every passage of it.
    """

    def _sequences(
        self, examples: Examples, room: int, words: Lexicon, rng: np.random.Generator
    ) -> Examples:
        documents = examples["targets"]
        passages = _single(documents.split_rows(room), words)
        if "label" not in examples:
            return passages
        return passages | {"label": examples["label"].take(_document_of_piece(documents, room))}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SentencePairs(_Sequences):
    """[CLS] a [SEP] b [SEP]: does b follow a? BERT's (Devlin et al. 2018, arXiv:1810.04805).

    A document is cut into windows of the longest length that fits. A window is split at the end
    of a sentence, chosen at random; where it has none, at the start of a word, else anywhere. Then
    either b is the rest of the window ("label" 0), or with `random_fraction` it is replaced by as
    many tokens of another document of the group ("label" 1), from a place where that one was
    split too. (Only if the group has a single document, from elsewhere in it.) A remainder of
    one token is left out.

    Attributes:
      random_fraction: of the pairs, that do not belong together.
    """

    random_fraction: float = 0.5
    specials: ClassVar[int] = 3

    def __post_init__(self) -> None:
        _check_fractions(self, "random_fraction")

    def _sequences(
        self, examples: Examples, room: int, words: Lexicon, rng: np.random.Generator
    ) -> Examples:
        documents = examples["targets"]
        windows = documents.split_rows(room)
        rows = np.flatnonzero(windows.lengths > 1)
        document = _document_of_piece(documents, room)[rows]
        split = _split_points(windows, words, rng)[rows]
        start, end = windows.offsets[:-1][rows], windows.offsets[1:][rows]

        other = _of_another_document(document, rng)
        swapped = (rng.random(len(rows)) < self.random_fraction) & (other != np.arange(len(rows)))
        b_start = np.where(swapped, split[other], split)
        b_room = documents.offsets[1:][document[other]] - split[other]
        b_length = np.where(swapped, np.minimum(end - split, b_room), end - split)

        a = _slices(documents.values, start, split - start)
        b = _slices(documents.values, b_start, b_length).append(words.sep_id)
        inputs = join_rows(a.prepend(words.cls_id).append(words.sep_id), b)
        is_b = inputs.position_of_value >= np.repeat(a.lengths + 2, inputs.lengths)
        return {
            "inputs": inputs,
            "token_types": dataclasses.replace(inputs, values=is_b.astype(np.int32)),
            "label": Ragged(swapped.astype(np.int32), np.arange(len(rows) + 1)),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskTokens(Preprocessor):
    """BERT's masking: what is chosen becomes the mask, a random token, or stays (80/10/10).

    In every sequence exactly round(density * length) tokens are chosen, the special ones counted
    in the length but never chosen, and at least one, at most as many as the length of "targets"
    (BERT's max_predictions_per_seq). Whole words are taken in random order as far as they fit into
    that number, so that fewer may be chosen. Writes "targets", the chosen tokens as they were, and
    "target_positions", their places in the sequence.

    Attributes:
      density: fraction of the tokens that are chosen.
      whole_words: choose all pieces of a word or none (see `lexicon.Lexicon.starts_word`).
      mask_fraction: of the chosen tokens, become the mask.
      random_fraction: of the chosen tokens, become any token that is not special; the others stay.
    """

    density: float = 0.15
    whole_words: bool = False
    mask_fraction: float = 0.8
    random_fraction: float = 0.1
    keeps_examples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_fractions(self, "density", "mask_fraction", "random_fraction")
        if self.mask_fraction + self.random_fraction > 1:
            raise UserError(
                f"MaskTokens: mask_fraction {self.mask_fraction} and random_fraction "
                f"{self.random_fraction} add up to more than 1. Lower one of them."
            )

    def apply(self, examples: Examples, context: Context, rng: np.random.Generator) -> Examples:
        words, inputs = _lexicon(context), examples["inputs"]
        most = context.length("targets")
        quota = np.clip(np.rint(inputs.lengths * self.density).astype(np.int64), 1, most)
        chosen = self._choose(inputs, quota, words, rng)
        before = inputs.values[chosen]
        ordinary = np.flatnonzero(~words.special)
        random = ordinary[rng.integers(len(ordinary), size=len(before))]
        draw = rng.random(len(before))
        values = inputs.values.copy()
        values[chosen] = np.select(
            [draw < self.mask_fraction, draw < self.mask_fraction + self.random_fraction],
            [words.mask_id, random],
            before,
        )
        positions = dataclasses.replace(inputs, values=inputs.position_of_value.astype(np.int32))
        return {
            **examples,
            "inputs": dataclasses.replace(inputs, values=values),
            "targets": inputs.select(chosen),
            "target_positions": positions.select(chosen),
        }

    def _choose(
        self,
        inputs: Ragged,
        quota: Int[np.ndarray, " rows"],
        words: Lexicon,
        rng: np.random.Generator,
    ) -> Bool[np.ndarray, " total"]:
        """Which tokens are chosen: at most `quota` of each row, unit by unit."""
        place = np.flatnonzero(~words.special[inputs.values])
        row = inputs.row_of_value[place]
        first = np.ones(len(place), bool)  # of a unit
        if self.whole_words:
            first[1:] = (np.diff(place) > 1) | (np.diff(row) > 0)
            first |= words.starts_word[inputs.values[place]]
        unit = np.cumsum(first) - 1
        size, unit_row = np.bincount(unit), row[first]
        # Units of a row in random order; then the first of every row, the second of every row...
        order = np.lexsort((rng.random(len(size)), unit_row))
        counts = np.bincount(unit_row, minlength=len(inputs))
        rank = Ragged.from_lengths(order, counts).position_of_value
        taken = np.zeros(len(size), bool)
        left = quota.copy()
        for units in np.split(order[np.argsort(rank, kind="stable")], np.cumsum(np.bincount(rank))):
            fits = units[size[units] <= left[unit_row[units]]]
            taken[fits] = True
            left[unit_row[fits]] -= size[fits]
        chosen = np.zeros(len(inputs.values), bool)
        chosen[place] = taken[unit]
        return chosen


STEPS = (FullSentences, Passages, SentencePairs, MaskTokens)


def _lexicon(context: Context) -> Lexicon:
    return lexicon(context.features["targets"].vocabulary)


def _single(tokens: Ragged, words: Lexicon) -> dict[str, Ragged]:
    inputs = tokens.prepend(words.cls_id).append(words.sep_id)
    types = dataclasses.replace(inputs, values=np.zeros_like(inputs.values))
    return {"inputs": inputs, "token_types": types}


def _document_of_piece(documents: Ragged, limit: int) -> Int[np.ndarray, " pieces"]:
    """The row of `documents` that each row of `documents.split_rows(limit)` is cut from."""
    return np.repeat(np.arange(len(documents)), -(-documents.lengths // limit))


def _split_points(
    windows: Ragged, words: Lexicon, rng: np.random.Generator
) -> Int[np.ndarray, " rows"]:
    """Where in `windows.values` the second part of each (not empty) window starts."""
    values = windows.values
    score = rng.random(len(values)) + words.starts_word[values]
    score[1:] += 2 * words.ends_sentence[values[:-1]]
    score[windows.offsets[:-1]] = -1  # the first part has a token at least
    best = np.lexsort((score, windows.row_of_value))
    return best[windows.offsets[1:] - 1]


def _of_another_document(
    document: Int[np.ndarray, " n"], rng: np.random.Generator
) -> Int[np.ndarray, " n"]:
    """For each of n windows one of another document, where there is one; `document` ascends."""
    count = len(document)
    first = np.searchsorted(document, document, "left")
    last = np.searchsorted(document, document, "right")
    if count and last[0] == count:  # one document: any other window
        first, last = np.arange(count), np.arange(1, count + 1)
    others = count - (last - first)
    draw = (rng.random(count) * others).astype(np.int64)
    return np.where(others == 0, first, draw + np.where(draw < first, 0, last - first))


def _slices(
    values: Int[np.ndarray, " total"],
    starts: Int[np.ndarray, " rows"],
    lengths: Int[np.ndarray, " rows"],
) -> Ragged:
    """Row i is `values[starts[i]:starts[i] + lengths[i]]`."""
    rows = Ragged.from_lengths(values[:0], lengths)
    index = np.arange(rows.offsets[-1]) + np.repeat(starts - rows.offsets[:-1], lengths)
    return dataclasses.replace(rows, values=values[index])


def _check_fractions(step: Preprocessor, *names: str) -> None:
    for name in names:
        value = getattr(step, name)
        if not 0 <= value <= 1:
            raise UserError(
                f"{type(step).__name__}.{name} is {value}; it must lie between 0 and 1."
            )
