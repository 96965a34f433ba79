"""Tasks over the embedded corpus: the King James Bible (see README.md and `tasks.text`).

Besides those of `tasks.text`: kjv_genre, which of six genres a passage is of.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import seqio
import tensorflow as tf

from t5x_like.data.encoder_steps import Passages
from t5x_like.data.seqio_sources import DocumentSource
from tasks.kjv.make_corpus import BOOKS
from tasks.text import add_tasks

_HERE = Path(__file__).parent
_FILES = {split: [str(_HERE / "data" / f"{split}.jsonl.xz")] for split in ("train", "validation")}
_VOCABULARY = seqio.SentencePieceVocabulary(str(_HERE / "vocabulary.model"), extra_ids=100)

# The traditional division, as numbers of books in the order of the Bible: Esther ends the history,
# Malachi the prophets, Acts the gospels; Revelation stands with the letters.
GENRES = {"law": 5, "history": 12, "wisdom": 5, "prophets": 17, "gospels": 5, "letters": 22}
_GENRE_OF_BOOK = dict(
    zip(BOOKS.values(), np.repeat(range(6), list(GENRES.values())).tolist(), strict=True)
)


def label_genre(dataset: tf.data.Dataset, *, genres: Mapping[str, int]) -> tf.data.Dataset:
    """Preprocessor: lines of the corpus to {"targets": text, "label": i32[1]}."""

    def read(line: bytes) -> tuple[bytes, np.ndarray]:
        chapter = json.loads(line)
        return chapter["text"].encode(), np.array([genres[chapter["book"]]], np.int32)

    def read_example(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        text, label = tf.numpy_function(read, [example["text"]], [tf.string, tf.int32])
        return {"targets": tf.ensure_shape(text, []), "label": tf.ensure_shape(label, [1])}

    return dataset.map(read_example)


add_tasks("kjv", source=DocumentSource(_FILES), vocabulary=_VOCABULARY)

seqio.TaskRegistry.add(
    "kjv_genre",
    source=DocumentSource(_FILES, format="lines"),
    preprocessors=[
        functools.partial(label_genre, genres=_GENRE_OF_BOOK),
        functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False),
        seqio.CacheDatasetPlaceholder(),
        Passages().__call__,
    ],
    output_features=dict.fromkeys(
        ("inputs", "targets"), seqio.Feature(_VOCABULARY, add_eos=False, required=False)
    ),
)
