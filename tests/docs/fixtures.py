"""The files that the documentation's commands read, small, under a directory that stands for /."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet
import tokenizers

from t5x_like.data import sources

ROOT = Path(__file__).parents[2]
_CANDIDATES = [
    f"In the beginning was the word number {i}, and the word was with all the others, " * 8
    for i in range(1000)
]
# One of them is held out by the default share.
DOCUMENTS = [
    *_CANDIDATES[:15],
    next(document for document in _CANDIDATES if sources.held_out(document.encode(), 0.01)),
]


def make(data: Path) -> None:
    """Fills `data`, which stands for /data."""
    for i, document in enumerate(DOCUMENTS):
        write(data / f"{i}.txt", document.encode())
    write(data / "lines.txt", "\n".join(DOCUMENTS).encode())
    lines = "".join(json.dumps({"text": document}) + "\n" for document in DOCUMENTS).encode()
    for split in ("train", "validation"):
        write(data / split / "a.jsonl.gz", gzip.compress(lines))
    pyarrow.parquet.write_table(pyarrow.table({"body": DOCUMENTS}), data / "a.parquet")
    shutil.copy(ROOT / "tasks/kjv/vocabulary.model", data / "vocabulary.model")
    write_tokenizer(data / "tokenizer.json")
    write_tfrecord(data / "a.tfrecord", DOCUMENTS)
    write_instructions(data)
    write(data / "prompts.txt", b"In the beginning\nWhat is 1+1?\n")
    asked = [{"inputs": f"What is {i}+1?", "targets": str(i + 1)} for i in range(4)]
    write(data / "questions.jsonl", "".join(json.dumps(a) + "\n" for a in asked).encode())


def write_instructions(data: Path) -> None:
    """Problems, an exam and conversations in the schemas of docs/instruction.md."""
    problems = [
        {"question": f"What is {i}+1?", "answer": f"It is {i}+1.\n#### {i + 1}"} for i in range(20)
    ]
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    for name, examples in (("gsm8k", problems), ("chat", [{"messages": turns}] * 5)):
        lines = "".join(json.dumps(example) + "\n" for example in examples)
        write(data / f"{name}.jsonl", lines.encode())
    exam = [
        {"question": f"Is {i} even?", "subject": "sums", "choices": ["yes", "no"], "answer": i % 2}
        for i in range(8)
    ]
    (data / "exam").mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(exam), data / "exam/mmlu.parquet")


def write(path: Path, contents: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(contents)


def write_tokenizer(path: Path) -> None:
    special = ["<pad>", "</s>", "<unk>"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.WordLevelTrainer(special_tokens=special)
    tokenizer.train_from_iterator(DOCUMENTS, trainer)
    tokenizer.save(str(path))


def write_tfrecord(path: Path, documents: Sequence[str]) -> None:
    import tensorflow as tf

    with tf.io.TFRecordWriter(str(path)) as writer:
        for document in documents:
            value = tf.train.Feature(bytes_list=tf.train.BytesList(value=[document.encode()]))
            features = tf.train.Features(feature={"text": value})
            writer.write(tf.train.Example(features=features).SerializeToString())
