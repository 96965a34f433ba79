"""`t5x_like cache` through SeqIO: sources, manifests, what is shared, what is an error."""

from __future__ import annotations

import json
import re
import sys
import threading
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from t5x_like.cli import main
from t5x_like.data import cache_format, cache_job, sources, task_modules, vocabularies
from t5x_like.errors import UserError
from tests.cache.conftest import (
    KJV_VOCABULARY,
    cache_text,
    files_below,
    read_bytes,
    read_split,
    remove,
    write_jsonl,
)

TRAIN = ["the first document", "a second, with ümlaut", "漢字"]
VALIDATION = ["only this one is held out"]


def write_tfrecord(path: Path, documents: list[str]) -> None:
    import tensorflow as tf

    with tf.io.TFRecordWriter(str(path)) as writer:
        for document in documents:
            value = tf.train.Feature(bytes_list=tf.train.BytesList(value=[document.encode()]))
            features = tf.train.Features(feature={"text": value})
            writer.write(tf.train.Example(features=features).SerializeToString())


def write_parquet(path: Path, documents: list[str]) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), path)


def write_lines(path: Path, documents: list[str]) -> None:
    path.write_text("\n".join(documents) + "\n")


def write_tfds(root: Path, config: str, splits: dict[str, list[str]]) -> None:
    """A data set in C4's schema, as TFDS's own script would leave it in its data_dir."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    fields = ("text", "url", "timestamp", "content-type", "content-length")
    features = tfds.features.FeaturesDict({field: tfds.features.Text() for field in fields})
    directory = root / "c4" / config
    directory.mkdir(parents=True)
    infos = []
    for split, documents in splits.items():
        path = directory / f"c4-{split}.tfrecord-00000-of-00001"
        records = [
            features.serialize_example(dict.fromkeys(fields, "x") | {"text": document})
            for document in documents
        ]
        with tf.io.TFRecordWriter(str(path)) as writer:
            for record in records:
                writer.write(record)
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[len(records)],
                num_bytes=sum(map(len, records)),
                filename_template=tfds.core.ShardedFileTemplate(
                    dataset_name="c4", data_dir=directory, split=split, filetype_suffix="tfrecord"
                ),
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=directory, features=features, split_infos=infos, check_data=False
    )


@pytest.mark.parametrize(
    ("suffix", "format", "write"),
    [
        ("jsonl", "", write_jsonl),
        ("parquet", "", write_parquet),
        ("tfrecord", "", write_tfrecord),
        ("txt", "lines", write_lines),
    ],
)
def test_every_source_gives_the_same_corpus(tmp_path, suffix, format, write):
    for split, documents in (("train", TRAIN), ("validation", VALIDATION)):
        for i, document in enumerate(documents):
            write(tmp_path / f"{split}-{i}.{suffix}", [document])
    task = cache_text(
        tmp_path / "cache",
        files=str(tmp_path / f"train-*.{suffix}"),
        validation_files=str(tmp_path / f"validation-*.{suffix}"),
        format=format,
    )
    assert read_bytes(tmp_path / "cache", task, "train") == [d.encode() for d in TRAIN]
    assert read_bytes(tmp_path / "cache", task, "validation") == [d.encode() for d in VALIDATION]
    assert task.output_features["targets"].vocabulary == vocabularies.Bytes().spec


@pytest.fixture
def tfds_dir(tmp_path):
    write_tfds(tmp_path / "tfds", "en/2.2.0", {"train": TRAIN, "validation": VALIDATION})
    yield tmp_path / "tfds"
    import seqio

    seqio.set_tfds_data_dir_override(None)


def test_c4_by_name_in_c4s_schema(tmp_path, tfds_dir, monkeypatch):
    import seqio

    from tasks import c4, text

    # T5's vocabulary lies on the network; all else is the Task as it is registered.
    definition = seqio.TaskRegistry.get("c4_v220_span_corruption")
    assert definition.source.tfds_dataset.name == "c4/en:2.2.0"
    vocabulary = definition.output_features["targets"].vocabulary
    assert vocabulary.sentencepiece_model_file == c4.T5_VOCABULARY and vocabulary.extra_ids == 100
    remove("local_c4")
    names = text.add_tasks(
        "local_c4",
        source=definition.source,
        vocabulary=seqio.SentencePieceVocabulary(
            vocabularies.find_file(KJV_VOCABULARY), extra_ids=100
        ),
    )
    c4_names = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    assert {name.replace("local_c4", "c4_v220") for name in names} <= c4_names
    task = cache_job.cache(
        "local_c4_ul2", module=None, cache_dir=tmp_path / "cache", tfds_data_dir=str(tfds_dir)
    )
    assert task.kind == "mixture" and len(task.tasks) == 7
    member = cache_format.read_task(tmp_path / "cache", task.tasks[0][0])
    assert member is not None
    reference = vocabularies.load(KJV_VOCABULARY)
    for split, documents in (("train", TRAIN), ("validation", VALIDATION)):
        examples = read_split(tmp_path / "cache", member, split)
        assert [reference.decode(e["targets"]) for e in examples] == documents


def test_tfds_by_gin_settings(tmp_path, tfds_dir):
    import seqio

    seqio.set_tfds_data_dir_override(str(tfds_dir))
    task = cache_text(tmp_path / "cache", files="c4/en:2.2.0", format="tfds")
    assert read_bytes(tmp_path / "cache", task, "train") == [d.encode() for d in TRAIN]


def test_a_cache_of_another_version_is_made_anew(tmp_path, caplog):
    cache_job.cache("kjv_causal_lm", module="tasks.kjv", cache_dir=tmp_path, splits=["validation"])
    path = cache_format.task_file(tmp_path, "kjv_causal_lm")
    old = json.loads(path.read_text()) | {"format_version": 1, "a_field_of_old": 7}
    path.write_text(json.dumps(old))
    assert cache_format.read_task(tmp_path, "kjv_causal_lm") is None
    assert "has format version 1, not" in caplog.text
    cache_job.cache("kjv_causal_lm", module="tasks.kjv", cache_dir=tmp_path, splits=["validation"])
    assert cache_format.read_task(tmp_path, "kjv_causal_lm") is not None


def test_tasks_over_the_same_tokens_share_a_corpus(tmp_path):
    for name in ("kjv_ul2", "kjv_causal_lm", "kjv_span_corruption"):
        cache_job.cache(name, module="tasks.kjv", cache_dir=tmp_path, splits=["validation"])
    (corpus,) = {p.parent.name for p in tmp_path.rglob("COMPLETED")}
    mixture = cache_format.read_task(tmp_path, "kjv_ul2")
    causal = cache_format.read_task(tmp_path, "kjv_causal_lm")
    assert mixture is not None and causal is not None
    members = [cache_format.read_task(tmp_path, name) for name, _ in mixture.tasks]
    assert {m.corpus for m in members if m} == {corpus} == {causal.corpus}
    assert causal.pipeline == ({"op": "FullLM", "args": {}},)
    assert causal.output_features.keys() == {"targets"}
    assert [rate for _, rate in mixture.tasks] == [1.0] * 7
    manifest = cache_format.read_corpus(tmp_path, corpus)
    vocabulary = vocabularies.load(KJV_VOCABULARY)
    examples = read_split(tmp_path, causal, "validation")
    assert manifest.splits["validation"].records == len(examples) == 71
    assert vocabulary.decode(examples[0]["targets"]).startswith("Now it came to pass in the days")
    assert causal.output_features["targets"].vocabulary == vocabulary.spec
    assert manifest.features["targets"].dtype == "uint16"


def test_invalid_bytes_and_empty_documents_are_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good\n \t \n\nb\xe9d \xff\xff\n")
    task = cache_text(
        tmp_path / "cache", files=str(tmp_path / "a.txt"), format="lines", validation_fraction=0
    )
    split = cache_format.read_corpus(tmp_path / "cache", task.corpus).splits["train"]
    assert (split.records, split.dropped_documents, split.replaced_bytes) == (2, 2, 3)
    assert read_bytes(tmp_path / "cache", task, "train")[1].decode() == "b\ufffdd \ufffd\ufffd"


def test_documents_are_held_out_whole_and_once(tmp_path):
    documents = [f"document {i}" for i in range(300)]
    write_jsonl(tmp_path / "a.jsonl", documents)
    write_jsonl(tmp_path / "b.jsonl", documents[:50])  # equal ones stay together
    task = cache_text(tmp_path / "cache", files=str(tmp_path / "*.jsonl"), validation_fraction=0.1)
    train = read_bytes(tmp_path / "cache", task, "train")
    validation = read_bytes(tmp_path / "cache", task, "validation")
    assert not set(train) & set(validation)
    assert len(train) + len(validation) == 350 and 15 < len(validation) < 60


@pytest.mark.parametrize("text", ["", " \n ", "\n\n"])
def test_an_empty_corpus_leaves_nothing_complete(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(UserError, match="'train' is empty"):
        cache_text(tmp_path / "cache", files=str(tmp_path / "a.txt"), validation_fraction=0)
    assert not list(tmp_path.rglob("COMPLETED")) and not (tmp_path / "cache" / "tasks").exists()


def test_errors_inside_of_tensorflow_come_out_as_one_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\nnot json\n')
    with pytest.raises(UserError, match=r"a\.jsonl:2 is not JSON") as caught:
        cache_text(tmp_path / "cache", files=str(tmp_path / "a.jsonl"), validation_fraction=0)
    assert "\n" not in str(caught.value)
    (tmp_path / "a.tfrecord").write_bytes(b"no tfrecord, but long enough to hold a header")
    with pytest.raises(UserError, match=r"a\.tfrecord is not a TFRecord file"):
        cache_text(tmp_path / "cache", files=str(tmp_path / "a.tfrecord"), validation_fraction=0)
    assert not list(tmp_path.rglob("COMPLETED"))


def test_another_vocabulary_under_the_same_name(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", TRAIN)
    settings = {"name": "same", "files": str(tmp_path / "a.jsonl"), "validation_fraction": 0}
    cache_text(tmp_path / "cache", **settings)
    before = files_below(tmp_path / "cache")
    with pytest.raises(UserError, match="made with another vocabulary for 'targets'"):
        cache_text(tmp_path / "cache", **settings, vocabulary=KJV_VOCABULARY)
    assert files_below(tmp_path / "cache") == before


def test_a_cache_goes_stale_with_its_definition(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", TRAIN)
    cache_dir = tmp_path / "cache"

    def found() -> tuple[cache_format.TaskManifest | None, str]:
        return task_modules.find_cached(cache_dir, "mine_causal_lm", "tasks.user")

    assert found()[1].endswith(f"is not in the cache {cache_dir}")
    task = cache_text(
        cache_dir, name="mine", files=str(tmp_path / "a.jsonl"), validation_fraction=0
    )
    assert found() == (task, "")
    command = task_modules.cache_command(cache_dir, "mine_causal_lm", "tasks.user")
    assert {"--files=" + str(tmp_path / "a.jsonl"), "--vocabulary=bytes"} <= set(command)
    sources.bind({"validation_fraction": 0.5})
    assert found() == (None, "TextCorpus changed since 'mine_causal_lm' was cached")
    sources.bind({"validation_fraction": 0})
    (cache_dir / "corpora" / task.corpus / "COMPLETED").unlink()
    assert "is not complete" in found()[1]
    monkeypatch.setattr(task_modules, "module_sha256", lambda module: "changed")
    assert "the source of 'tasks.user' changed" in found()[1]


def test_overwrite_and_changed_files(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", TRAIN)
    settings = {"name": "again", "files": str(tmp_path / "a.jsonl"), "validation_fraction": 0}
    first = cache_text(tmp_path / "cache", **settings)
    write_jsonl(tmp_path / "a.jsonl", VALIDATION)
    second = cache_text(tmp_path / "cache", **settings)
    assert first.corpus != second.corpus
    corpus = tmp_path / "cache" / "corpora" / second.corpus
    before = files_below(corpus)
    (corpus / "train" / "00000-of-00001.arrayrecord").write_bytes(b"damaged")
    cache_job.cache(second.name, module="tasks.user", cache_dir=tmp_path / "cache", overwrite=True)
    assert files_below(corpus) == before


FOREIGN = """
import functools
import seqio
import tensorflow as tf

VOCABULARY = seqio.ByteVocabulary()
FEATURES = {"inputs": seqio.Feature(VOCABULARY), "targets": seqio.Feature(VOCABULARY)}


def dataset_fn(split, shuffle_files, seed=None):
    return tf.data.Dataset.from_tensor_slices({"inputs": ["question"], "targets": ["answer"]})


def add(name, *steps):
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(dataset_fn, splits=["train"]),
        preprocessors=steps,
        output_features=FEATURES,
    )


CACHE = seqio.CacheDatasetPlaceholder()
add("foreign_plain", seqio.preprocessors.tokenize, CACHE, seqio.preprocessors.append_eos_after_trim)
add("foreign_uncached", seqio.preprocessors.tokenize)
add("foreign_step", seqio.preprocessors.tokenize, CACHE, lambda dataset: dataset)
seqio.MixtureRegistry.add("foreign_mixture", [("foreign_plain", 3), ("foreign_step", 0.5)])
"""


def test_tasks_of_somebody_elses_module(tmp_path, monkeypatch):
    (tmp_path / "foreign_tasks.py").write_text(FOREIGN)
    monkeypatch.chdir(tmp_path)  # a module in the working directory is found, as in T5X
    monkeypatch.setattr(
        "sys.path", ["" if p == str(tmp_path) else p for p in __import__("sys").path]
    )

    def cache(name: str) -> cache_format.TaskManifest:
        return cache_job.cache(name, module="foreign_tasks", cache_dir=tmp_path / "cache")

    plain = cache("foreign_plain")
    assert plain.pipeline == ({"op": "AppendEos", "args": {}},)
    (example,) = read_split(tmp_path / "cache", plain, "train")
    assert example["inputs"].tolist() == [b + 3 for b in b"question"]
    assert example["targets"].tolist() == [b + 3 for b in b"answer"]
    assert example["targets_pretokenized"].item() == b"answer"

    uncached = cache("foreign_uncached")
    assert (uncached.pipeline, uncached.corpus) == (None, "")
    assert "no CacheDatasetPlaceholder" in uncached.not_serializable
    step = cache("foreign_step")
    assert step.pipeline is None and "foreign_tasks.<lambda>" in step.not_serializable

    mixture = cache("foreign_mixture")
    assert dict(mixture.tasks) == {"foreign_plain": 3.0, "foreign_step": 0.5}
    found, reason = task_modules.find_cached(tmp_path / "cache", "foreign_mixture", "foreign_tasks")
    assert (found, reason) == (mixture, "")
    with pytest.raises(UserError, match=r"no Task or Mixture 'foreign_plan'.*'foreign_plain'"):
        cache("foreign_plan")


def test_two_jobs_at_once_write_one_whole_corpus(tmp_path):
    errors: list[BaseException] = []

    def job() -> None:
        try:
            cache_job.cache("kjv_prefix_lm", module="tasks.kjv", cache_dir=tmp_path / "both")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=job) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    cache_job.cache("kjv_prefix_lm", module="tasks.kjv", cache_dir=tmp_path / "one")
    assert files_below(tmp_path / "both") == files_below(tmp_path / "one")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks=kjv_spam_corruption", "--module=tasks.kjv"], "Did you mean 'kjv_span_corru"),
        (["--tasks=kjv_ul2", "--module=tasks.kvj"], "There is no module 'tasks.kvj'"),
        (["--tasks=kjv_ul2", "--module=nonesuch.tasks"], "There is no module 'nonesuch.tasks'"),
        (["--tasks=kjv_ul2", "--module=tasks.kjv", "--splits", "test"], "has no split 'test'"),
        (["--tasks=kjv_ul2", "--verify"], "'kjv_ul2' is not in the cache"),
        (["--tasks=x_ul2", "--files=none*", "--vocabulary=bytes"], "No Task or Mixture|no Task"),
    ],
)
def test_command_line_errors(tmp_path, capfd, arguments, message):
    assert main.main(["cache", f"--cache_dir={tmp_path / 'cache'}", *arguments]) == 2
    assert re.search(message, capfd.readouterr().err.splitlines()[-1])
    assert not (tmp_path / "cache").exists()


def test_command_line_caches_and_verifies(tmp_path, capfd):
    write_jsonl(tmp_path / "a.jsonl", TRAIN)
    common = ["cache", f"--cache_dir={tmp_path / 'cache'}", "--tasks=cli_causal_lm"]
    files = [f"--files={tmp_path}/*.jsonl", "--name=cli", "--vocabulary=bytes"]
    sys.modules.pop("tasks.user", None)
    assert main.main([*common, *files, "--validation_fraction=0"]) == 0
    assert main.main([*common, "--verify"]) == 0
    assert capfd.readouterr().out == "cli_causal_lm: every record is whole\n"
    (path,) = (tmp_path / "cache").rglob("*.arrayrecord")
    path.write_bytes(path.read_bytes()[:1000])
    assert main.main([*common, "--verify"]) == 2
    assert "ends at offset 1000" in capfd.readouterr().err
