"""Records, shards, manifests and their checks, without TensorFlow."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from t5x_like.data import cache_format, cache_writer
from t5x_like.data.cache_format import CachedFeature
from t5x_like.errors import UserError

FEATURES = {"targets": CachedFeature(dtype="uint16")}
IDENTITY = {"of": "the test"}


def write(cache_dir: Path, documents: list[list[int]], *, num_shards: int = 3) -> Path:
    corpus = cache_format.corpus_dir(cache_dir, cache_format.fingerprint(IDENTITY))
    names = [cache_format.shard_name(i, num_shards) for i in range(num_shards)]
    for i, name in enumerate(names):
        cache_writer.write_shard(
            ({"targets": np.array(d, np.int32), "replaced_bytes": 2} for d in documents[i::3]),
            corpus=corpus,
            split="train",
            name=name,
            features=FEATURES,
            token_features=["targets"],
        )
    cache_writer.complete_corpus(
        cache_dir, identity=IDENTITY, features=FEATURES, shards={"train": names}
    )
    return Path(corpus)


def random_documents(count: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, 60000, rng.integers(0, 9)).tolist() for _ in range(count)]


def test_records_of_every_kind_come_back():
    features = {
        "a": CachedFeature(dtype="uint16"),
        "b": CachedFeature(dtype="uint32"),
        "c": CachedFeature(dtype="float32", rank=2),
        "d": CachedFeature(dtype="bytes", rank=0),
        "e": CachedFeature(dtype="bytes"),
        "f": CachedFeature(dtype="int64", rank=0),
        "g": CachedFeature(dtype="bool"),
    }
    example = {
        "a": np.array([0, 1, 65535], np.int32),
        "b": np.array([], np.int64),
        "c": np.array([[1.5, np.nan]], np.float32),
        "d": b"text\0",
        "e": np.array([b"x", b"yz\0"], object),
        "f": np.int64(-7),
        "g": np.array([True, False]),
    }
    found = cache_format.decode_record(cache_format.encode_record(example, features), features)
    assert found.keys() == features.keys()
    for name, value in example.items():
        np.testing.assert_array_equal(
            found[name], np.asarray(value, object if name in "de" else None)
        )
        assert found[name].ndim == features[name].rank
    assert found["a"].dtype == found["b"].dtype == np.int32


@pytest.mark.parametrize("token", [-1, 65536])
def test_ids_outside_of_the_vocabulary_are_an_error(token):
    with pytest.raises(UserError, match="'targets' holds"):
        cache_format.encode_record({"targets": np.array([token])}, FEATURES)


def test_manifest_counts_what_was_written(tmp_path):
    documents = random_documents(100)
    write(tmp_path, documents)
    manifest = cache_format.read_corpus(tmp_path, cache_format.fingerprint(IDENTITY))
    split = manifest.splits["train"]
    tokens = np.concatenate(documents).astype(int)
    counts = np.bincount(tokens)
    p = counts[counts > 0] / len(tokens)
    assert split.records == sum(map(bool, documents))
    assert split.dropped_documents == 100 - split.records > 0
    assert split.tokens == {"targets": len(tokens)}
    assert split.unigram_entropy["targets"] == pytest.approx(-(p * np.log(p)).sum(), rel=1e-12)
    assert split.replaced_bytes == 200
    assert manifest.features == FEATURES and manifest.identity == IDENTITY


def test_the_same_documents_give_the_same_bytes(tmp_path):
    first, second = (write(tmp_path / name, random_documents(50)) for name in "ab")
    files = sorted(p.relative_to(first) for p in first.rglob("*") if p.is_file())
    assert len(files) == 3 * 2 + 2
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes(), file


def test_a_corpus_without_completed_is_not_read(tmp_path):
    corpus = write(tmp_path, random_documents(9))
    (corpus / "COMPLETED").unlink()
    with pytest.raises(UserError, match="not complete"):
        cache_format.read_corpus(tmp_path, corpus.name)


def test_another_format_version_is_an_error(tmp_path):
    corpus = write(tmp_path, random_documents(9))
    manifest = corpus / "manifest.json"
    current = cache_format.FORMAT_VERSION
    changed = manifest.read_text().replace(f'"format_version": {current}', '"format_version": 99')
    manifest.write_text(changed)
    with pytest.raises(UserError, match=f"format version 99; this program reads {current}"):
        cache_format.read_corpus(tmp_path, corpus.name)


def test_an_empty_split_is_never_complete(tmp_path):
    with pytest.raises(UserError, match="'train' is empty: 4 documents, none with text"):
        write(tmp_path, [[], [], [], []])
    assert not list(tmp_path.rglob("COMPLETED")) and not list(tmp_path.rglob("manifest.json"))


def test_verify_names_the_file_and_the_offset(tmp_path):
    corpus = write(tmp_path, random_documents(300))
    cache_writer.verify(tmp_path, corpus.name)
    path = corpus / "train" / "00001-of-00003.arrayrecord"
    whole = path.read_bytes()

    def check(contents: bytes | None, message: str) -> None:
        path.unlink() if contents is None else path.write_bytes(contents)
        with pytest.raises(UserError, match=rf"00001-of-00003\.arrayrecord {message}"):
            cache_writer.verify(tmp_path, corpus.name)

    check(whole[:-70000], rf"ends at offset {len(whole) - 70000}, not at {len(whole)}: .*truncated")
    check(whole[:300] + b"\xff" + whole[301:], r"is corrupted: .* at byte \d+")
    check(whole[:-40000] + b"\xff" + whole[-39999:], "is corrupted")
    check(None, "is missing")


def test_a_shard_is_finished_only_when_both_files_are_there(tmp_path):
    corpus = write(tmp_path, random_documents(30))
    name = "00000-of-00003"
    assert cache_writer.finished(corpus, "train", name) is not None
    assert cache_writer.finished(corpus, "train", "00009-of-00010") is None
    records = Path(cache_format.record_file(corpus, "train", name))
    whole = records.read_bytes()
    records.write_bytes(whole[:-1])
    assert cache_writer.finished(corpus, "train", name) is None
    records.write_bytes(whole)
    Path(cache_format.stats_file(corpus, "train", name)).unlink()
    assert cache_writer.finished(corpus, "train", name) is None


def test_the_trainers_side_loads_no_tensorflow():
    code = (
        "import sys\n"
        "from t5x_like.cli import cache\n"
        "from t5x_like.data import cache_format, cache_job, cache_writer, sources\n"
        "from t5x_like.data import task_modules, vocabularies\n"
        "vocabularies.load('tasks/kjv/vocabulary.model').encode('text')\n"
        "task_modules.module_sha256('tasks.kjv')\n"
        "sys.exit(any(m.split('.')[0] in ('tensorflow', 'seqio') for m in sys.modules))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
