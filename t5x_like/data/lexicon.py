"""What encoder-only pre-training must know of a vocabulary's pieces: words, sentences, specials."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from jaxtyping import Bool

from t5x_like.data import vocabularies
from t5x_like.data.cache_format import VocabularySpec
from t5x_like.errors import UserError

_SENTENCE_ENDS = (".", "?", "!", "。", "？", "！")  # noqa: RUF001
# Names of the sequence's start, the separator and the mask: BERT's, RoBERTa's.
_SPECIAL_NAMES = (("[CLS]", "[SEP]", "[MASK]"), ("<s>", "</s>", "<mask>"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lexicon:
    """Arrays have an element for every id of the vocabulary.

    Attributes:
      starts_word: the piece is not the continuation of a word; a word is what stands between
        spaces, or what a WordPiece vocabulary takes for one.
      ends_sentence: the piece ends with a full stop, question or exclamation mark.
      special: padding, end of sequence, sentinels, and the three ids below: never masked.
      cls_id, sep_id, mask_id: start of a sequence, separator, mask.
    """

    starts_word: Bool[np.ndarray, " vocab"]
    ends_sentence: Bool[np.ndarray, " vocab"]
    special: Bool[np.ndarray, " vocab"]
    cls_id: int
    sep_id: int
    mask_id: int


@functools.lru_cache(maxsize=8)
def lexicon(spec: VocabularySpec) -> Lexicon:
    """Looks a vocabulary up.

    The special ids are those of pieces named [CLS], [SEP], [MASK] or <s>, </s>, <mask>, if the
    vocabulary has all three; else the sentinels <extra_id_0>, <extra_id_1>, <extra_id_2>, the
    last three ids in T5's layout.

    Raises:
      UserError: a vocabulary that only SeqIO can read, a file that has gone or changed, or
        neither such pieces nor three sentinels.
    """
    pieces = vocabularies.from_spec(spec).pieces()
    cls_id, sep_id, mask_id = _special_ids(spec, pieces)
    special = np.zeros(spec.size, bool)
    special[[0, spec.eos_id, cls_id, sep_id, mask_id]] = True
    special[spec.size - spec.extra_ids :] = True
    return Lexicon(
        starts_word=np.array(_starts_word(pieces)),
        ends_sentence=np.array([piece.endswith(_SENTENCE_ENDS) for piece in pieces]),
        special=special,
        cls_id=cls_id,
        sep_id=sep_id,
        mask_id=mask_id,
    )


def _special_ids(spec: VocabularySpec, pieces: list[str]) -> tuple[int, int, int]:
    for names in _SPECIAL_NAMES:
        if set(names) <= set(pieces):
            first, separator, mask = map(pieces.index, names)
            return first, separator, mask
    if spec.extra_ids < 3:
        raise UserError(
            f"The vocabulary {spec.path or spec.kind} has no [CLS], [SEP] and [MASK] and "
            f"{spec.extra_ids} sentinels; masked language modelling needs 3 of them. Give it "
            "extra_ids of at least 3."
        )
    return spec.size - 1, spec.size - 2, spec.size - 3


def _starts_word(pieces: list[str]) -> list[bool]:
    if any(piece.startswith("##") and len(piece) > 2 for piece in pieces):  # WordPiece
        return [not piece.startswith("##") for piece in pieces]
    # SentencePiece's space, byte-level BPE's, and plain ones of a vocabulary of bytes.
    return [piece.startswith(("▁", "Ġ", " ", "\n", "\t", "\r")) for piece in pieces]
