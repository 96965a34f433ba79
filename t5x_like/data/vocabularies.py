"""Vocabularies without TensorFlow: SentencePiece, bytes, and any Hugging Face tokenizer.json.

All keep T5's layout of ids: 0 is padding, and the sentinels stand at the end in descending order,
so that `<extra_id_i>` is the id `size - 1 - i`. `seqio_vocabularies` wraps the same files for
SeqIO.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from t5x_like.data.cache_format import VocabularySpec
from t5x_like.errors import UserError

PAD_ID = 0


class Vocabulary(Protocol):
    """What encodes text to ids. `spec` says which ids are special."""

    spec: VocabularySpec

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without an end of sequence."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` up to the first end of sequence, padding left out."""
        ...

    def pieces(self) -> list[str]:
        """Every id's piece, as the vocabulary's file spells it."""
        ...


class SentencePiece:
    """A SentencePiece model file with sentinels added after its pieces, as T5 adds them."""

    def __init__(self, path: str, *, extra_ids: int = 100):
        from sentencepiece import SentencePieceProcessor
        from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

        contents = _read(path)
        model = ModelProto.FromString(contents)
        user_defined = ModelProto.SentencePiece.USER_DEFINED
        for i in reversed(range(extra_ids)):
            model.pieces.add(piece=f"▁<extra_id_{i}>", score=0.0, type=user_defined)
        self._processor = SentencePieceProcessor()
        self._processor.LoadFromSerializedProto(model.SerializeToString())
        if self._processor.pad_id() != PAD_ID:
            raise UserError(
                f"The vocabulary {path} has padding id {self._processor.pad_id()}, not 0. Train it "
                "with pad_id=0, eos_id=1, unk_id=2, as T5's are."
            )
        self.spec = VocabularySpec(
            kind="sentencepiece",
            size=self._processor.get_piece_size(),
            sha256=hashlib.sha256(contents).hexdigest(),
            eos_id=self._processor.eos_id(),
            unk_id=self._processor.unk_id(),
            extra_ids=extra_ids,
            path=path,
        )

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode(_strip(ids, self.spec))

    def pieces(self) -> list[str]:
        return self._processor.id_to_piece(list(range(self.spec.size)))


class Bytes:
    """UTF-8 bytes as ids 3 to 258 (0 padding, 1 end, 2 unknown), sentinels after them.

    ByT5 (https://arxiv.org/abs/2105.13626). With the default of 125 sentinels there are 384 ids.
    """

    _SPECIAL = 3

    def __init__(self, *, extra_ids: int = 125):
        self.spec = VocabularySpec(
            kind="bytes",
            size=self._SPECIAL + 256 + extra_ids,
            sha256=hashlib.sha256(b"bytes").hexdigest(),
            eos_id=1,
            unk_id=2,
            extra_ids=extra_ids,
        )

    def encode(self, text: str) -> list[int]:
        return [byte + self._SPECIAL for byte in text.encode("utf-8")]

    def decode(self, ids: Iterable[int]) -> str:
        stripped = (i - self._SPECIAL for i in _strip(ids, self.spec))
        return bytes(i for i in stripped if 0 <= i < 256).decode("utf-8", errors="replace")

    def pieces(self) -> list[str]:
        sentinels = [f"<extra_id_{i}>" for i in reversed(range(self.spec.extra_ids))]
        return ["<pad>", "</s>", "<unk>", *map(chr, range(256)), *sentinels]


class HuggingFace:
    """A Hugging Face tokenizer.json.

    Ids are those of the file, as models that were trained with it expect. Where it has an ordinary
    token as id 0 (GPT-2's "!"), `spec.zero_is_token` says so.
    Sentinels that the file has at its end in T5's order are used; otherwise `extra_ids` of them are
    added after its last id.
    """

    _EOS = ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "[SEP]")
    _UNK = ("<unk>", "[UNK]", "<|unk|>")

    def __init__(self, path: str, *, extra_ids: int = 100):
        from tokenizers import Tokenizer

        contents = _read(path)
        try:
            self._tokenizer = Tokenizer.from_str(contents.decode("utf-8"))
        # The Rust side of `tokenizers` raises plain Exception.
        except Exception as error:
            raise UserError(f"{path} is not a Hugging Face tokenizer.json ({error}).") from None
        added = self._tokenizer.get_added_tokens_decoder()
        in_file = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        found = self._sentinels_at_end(in_file)
        self.spec = VocabularySpec(
            kind="huggingface",
            size=in_file + (0 if found else extra_ids),
            sha256=hashlib.sha256(contents).hexdigest(),
            eos_id=self._special_id(self._eos_candidates(path), path),
            unk_id=self._unk_id(),
            extra_ids=found or extra_ids,
            path=path,
            zero_is_token=not (PAD_ID in added and added[PAD_ID].special),
        )

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Sentinels come back as their names, other special tokens are left out."""
        first_sentinel = self.spec.size - self.spec.extra_ids
        text, run = [], []
        for i in _strip(ids, self.spec):
            if i < first_sentinel:
                run.append(i)
                continue
            text += [self._tokenizer.decode(run), f"<extra_id_{self.spec.size - 1 - i}>"]
            run = []
        return "".join([*text, self._tokenizer.decode(run)])

    def pieces(self) -> list[str]:
        size, first_sentinel = self.spec.size, self.spec.size - self.spec.extra_ids
        return [
            self._tokenizer.id_to_token(i)
            or (f"<extra_id_{size - 1 - i}>" if i >= first_sentinel else "<pad>")
            for i in range(size)
        ]

    def _sentinels_at_end(self, in_file: int) -> int:
        count = 0
        while self._tokenizer.token_to_id(f"<extra_id_{count}>") == in_file - 1 - count:
            count += 1
        return count

    def _eos_candidates(self, path: str) -> tuple[str, ...]:
        """The end of sequence named in tokenizer_config.json beside the file, else usual names."""
        config = Path(path).with_name("tokenizer_config.json")
        named = json.loads(config.read_text()).get("eos_token") if config.exists() else None
        if isinstance(named, dict):
            named = named["content"]
        return (named,) if named else self._EOS

    def _special_id(self, candidates: Sequence[str], path: str) -> int:
        for token in candidates:
            known = self._tokenizer.token_to_id(token)
            if known is not None:
                return known
        raise UserError(
            f"{path} has no end-of-sequence token among {', '.join(candidates)}. Name it as "
            '"eos_token" in a tokenizer_config.json beside the file.'
        )

    def _unk_id(self) -> int | None:
        names = (getattr(self._tokenizer.model, "unk_token", None), *self._UNK)
        known = [self._tokenizer.token_to_id(name) for name in names if name]
        return next((i for i in known if i is not None), None)


@functools.lru_cache(maxsize=8)
def load(name: str, *, extra_ids: int | None = None) -> Vocabulary:
    """Loads a vocabulary: "bytes", a SentencePiece .model file, or a tokenizer.json.

    Args:
      name: "bytes" or a path, relative to the working directory or to where `tasks` is installed.
      extra_ids: number of sentinels; None for T5's habit (100; 125 for bytes).

    Raises:
      UserError: no such file, or neither kind.
    """
    options = {} if extra_ids is None else {"extra_ids": extra_ids}
    if name == "bytes":
        return Bytes(**options)
    if name.endswith(".json"):
        return HuggingFace(find_file(name), **options)
    if name.endswith(".model"):
        return SentencePiece(find_file(name), **options)
    raise UserError(
        f"Unknown vocabulary {name!r}: give 'bytes', a SentencePiece file ending in .model or a "
        "Hugging Face tokenizer ending in .json."
    )


def from_spec(spec: VocabularySpec) -> Vocabulary:
    """Loads the vocabulary that `spec` describes, to decode what a cache holds.

    Raises:
      UserError: the file has gone or changed.
    """
    if spec.kind not in ("bytes", "sentencepiece", "huggingface"):
        raise UserError(f"A vocabulary of kind {spec.kind!r} can only be used through SeqIO.")
    vocabulary = load(spec.path or spec.kind, extra_ids=spec.extra_ids)
    if not vocabulary.spec.same_as(spec):
        raise UserError(
            f"The vocabulary {spec.path} has changed: its sha256 is "
            f"{vocabulary.spec.sha256[:12]}, not {spec.sha256[:12]}."
        )
    return vocabulary


def find_file(name: str) -> str:
    """Absolute path of `name`, sought in the working directory and beside the package."""
    for root in (Path.cwd(), Path(__file__).parents[2]):
        if (root / name).is_file():
            return str((root / name).resolve())
    raise UserError(f"There is no file {name!r}.")


def _read(path: str) -> bytes:
    return Path(path).read_bytes()


def _strip(ids: Iterable[int], spec: VocabularySpec) -> list[int]:
    kept = []
    for i in map(int, ids):
        if i == spec.eos_id:
            break
        if i != PAD_ID or spec.zero_is_token:
            kept.append(i)
    return kept
