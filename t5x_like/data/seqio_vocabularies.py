"""SeqIO's side of vocabularies: the same files, as `seqio.Vocabulary`, and back to a spec."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from t5x_like.data import vocabularies
from t5x_like.data.cache_format import VocabularySpec
from t5x_like.data.seqio_host import seqio, tf


class HuggingFaceVocabulary(seqio.Vocabulary):
    """A Hugging Face tokenizer.json in SeqIO (see `vocabularies.HuggingFace`)."""

    def __init__(self, path: str, extra_ids: int = 100):
        self._path = vocabularies.find_file(path)
        self._vocabulary = vocabularies.load(self._path, extra_ids=extra_ids)
        super().__init__(extra_ids=self.spec.extra_ids)

    # SeqIO copies and pickles vocabularies; the Rust tokenizer is loaded anew.
    def __reduce__(self) -> tuple[type[HuggingFaceVocabulary], tuple[str, int]]:
        return HuggingFaceVocabulary, (self._path, self.extra_ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HuggingFaceVocabulary) and self.spec.same_as(other.spec)

    def __hash__(self) -> int:
        return hash(self.spec.sha256)

    @property
    def spec(self) -> VocabularySpec:
        return self._vocabulary.spec

    @property
    def eos_id(self) -> int:
        return self.spec.eos_id

    @property
    def unk_id(self) -> int | None:
        return self.spec.unk_id

    @property
    def _base_vocab_size(self) -> int:
        return self.spec.size - self.spec.extra_ids

    def decode(self, ids: Iterable[int]) -> str:
        # The base class turns sentinels into unknown tokens before `_decode`.
        return self._vocabulary.decode(ids)

    def _encode(self, s: str) -> Sequence[int]:
        return self._vocabulary.encode(s)

    def _decode(self, ids: Iterable[int]) -> str:
        return self._vocabulary.decode(ids)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        def encode(text: bytes | np.ndarray) -> np.ndarray:
            raw = text if isinstance(text, bytes) else text.item()  # an array outside of a graph
            return np.array(self._vocabulary.encode(raw.decode("utf-8", "replace")), np.int32)

        return tf.ensure_shape(
            tf.numpy_function(encode, [tf.convert_to_tensor(s)], tf.int32), [None]
        )

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        def decode(batch: np.ndarray) -> np.ndarray:
            rows = batch.reshape(-1, batch.shape[-1])
            texts = [self._vocabulary.decode(row).encode() for row in rows]
            return np.array(texts, object).reshape(batch.shape[:-1])

        return tf.ensure_shape(tf.numpy_function(decode, [ids], tf.string), ids.shape[:-1])


def to_seqio(vocabulary: vocabularies.Vocabulary) -> seqio.Vocabulary:
    """The `seqio.Vocabulary` that gives the same ids as `vocabulary`."""
    spec = vocabulary.spec
    if spec.kind == "bytes":
        return seqio.ByteVocabulary(extra_ids=spec.extra_ids)
    if spec.kind == "sentencepiece":
        return seqio.SentencePieceVocabulary(spec.path, extra_ids=spec.extra_ids)
    return HuggingFaceVocabulary(spec.path, extra_ids=spec.extra_ids)


def spec_of(vocabulary: seqio.Vocabulary) -> VocabularySpec:
    """Describes any `seqio.Vocabulary`; one that only SeqIO knows gets its class name as kind."""
    if isinstance(vocabulary, HuggingFaceVocabulary):
        return vocabulary.spec
    if isinstance(vocabulary, seqio.ByteVocabulary):
        return vocabularies.Bytes(extra_ids=vocabulary.extra_ids).spec
    if isinstance(vocabulary, seqio.SentencePieceVocabulary):
        kind, path = "sentencepiece", str(vocabulary.sentencepiece_model_file)
        digest = _file_digest(path)
    else:
        kind, path = type(vocabulary).__name__, ""
        digest = hashlib.sha256(str(vocabulary).encode()).hexdigest()
    return VocabularySpec(
        kind=kind,
        size=vocabulary.vocab_size,
        sha256=digest,
        eos_id=-1 if vocabulary.eos_id is None else vocabulary.eos_id,
        unk_id=vocabulary.unk_id,
        extra_ids=vocabulary.extra_ids,
        path=path,
    )


def token_ids(vocabulary: seqio.Vocabulary, token: str) -> tuple[int, ...]:
    """The one id of a special token such as "[NLU]"; the ids of its text if there is none."""
    if isinstance(vocabulary, seqio.SentencePieceVocabulary):
        # Encoding would put a word boundary before it.
        piece = vocabulary.tokenizer.piece_to_id(token)
        if piece != vocabulary.unk_id:
            return (piece,)
    return tuple(int(i) for i in vocabulary.encode(token))


@functools.lru_cache
def _file_digest(path: str) -> str:
    with tf.io.gfile.GFile(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()
