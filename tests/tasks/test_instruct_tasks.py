"""Instruction Tasks on both routes: cached and read by Grain, and streamed by SeqIO."""

from __future__ import annotations

import collections
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seqio

from t5x_like.data import cache_job, vocabularies
from t5x_like.data.chat import WEIGHTS
from t5x_like.data.dataset import DatasetConfig
from t5x_like.data.instruct_converters import TargetsLMConverter, WeightedLMConverter
from t5x_like.errors import UserError
from tasks.instruct import embedded, register
from tasks.instruct.register import add_chat_tasks, add_mixture, add_tasks
from tasks.instruct.schemas.all import COLLECTIONS
from tasks.instruct.sources import CountingSource, RecordSource, read_examples, records_of
from tests.cache.conftest import remove
from tests.tasks.instruct_examples import TFDS, all_examples

MODULE = "tasks.instruct.embedded"
KJV = vocabularies.load("tasks/kjv/vocabulary.model")
LENGTHS = {"inputs": 128, "targets": 32}
TASKS = ("embedded_larger", "embedded_list_count", "embedded_arithmetic_zero_shot")


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cache")
    for task in TASKS:
        cache_job.cache(task, module=MODULE, cache_dir=directory)
    return directory


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Path]:
    """A folder for files; Tasks called own_* are forgotten."""
    yield tmp_path
    remove("own")


def config(cache_dir: Path, task: str, **changes: Any) -> DatasetConfig:
    settings: dict[str, Any] = {
        "task_feature_lengths": LENGTHS,
        "batch_size": 8,
        "cache_dir": str(cache_dir),
        "module": MODULE,
    }
    return DatasetConfig(mixture_or_task_name=task, **settings | changes)


def pairs(batch: dict[str, np.ndarray]) -> list[tuple[str, str]]:
    """Inputs and targets of every example of a batch, packed or not, by segment."""
    found = []
    for row in range(len(batch["decoder_target_tokens"])):
        sides = []
        for side, tokens in (("encoder", "input"), ("decoder", "target")):
            ids = batch[f"{side}_{tokens}_tokens"][row]
            segments = batch.get(f"{side}_segment_ids", (batch[f"{side}_{tokens}_tokens"] > 0))[row]
            count = int(segments.max())
            sides.append([KJV.decode(ids[segments == i + 1]) for i in range(count)])
        found += list(zip(*sides, strict=True))
    return found


def answers(task: str, split: str) -> dict[str, str]:
    """What every answer template of an embedded task makes of every record, by inputs."""
    collection = embedded.COLLECTIONS[task]
    made = {}
    for example in read_examples(embedded.source_of(task), split):
        for record in records_of(collection.prepare, example):
            for template in collection.templates:
                if template.applies(record) and template.kind != "inversion":
                    inputs, targets = template.render(record)
                    made[inputs] = targets
    return made


@pytest.mark.parametrize("use_cached", [True, False])
def test_held_out_examples_come_once_with_their_answers(cache_dir, use_cached):
    """On both routes: each record of the validation split, by one of the templates."""
    task = "embedded_arithmetic_zero_shot"
    dataset = config(
        cache_dir, task, split="validation", num_epochs=1, shuffle=False, use_cached=use_cached
    )
    found = [pair for batch in dataset.build() for pair in pairs(batch)]
    wanted = answers("arithmetic", "validation")
    assert len(found) == len(wanted) // 6  # five templates and one with the steps
    for inputs, targets in found:
        assert wanted[inputs] == targets
    assert len({re.search(r"\d+ [+-] \d+", inputs)[0] for inputs, _ in found}) == len(found)


def test_templates_are_fresh_in_every_epoch_and_follow_from_the_seed(cache_dir):
    def batches(seed: int) -> list[list[tuple[str, str]]]:
        dataset = config(
            cache_dir, TASKS[2], split="validation", num_epochs=2, shuffle=False, seed=seed
        ).build()
        return [pair for batch in dataset for pair in pairs(batch)]  # type: ignore[misc]

    both = batches(0)
    half = len(both) // 2
    first, second = both[:half], both[half:]
    assert [targets for _, targets in first] == [targets for _, targets in second]
    same = sum(a == b for a, b in zip(first, second, strict=True))
    assert same < 0.5 * half  # one in five, by chance
    assert both == batches(0) != batches(1)


def test_packing_keeps_inputs_and_targets_together(cache_dir):
    wanted = answers("larger", "train")
    dataset = config(cache_dir, "embedded_larger", pack=True).build()
    batch = next(dataset)
    found = pairs(batch)
    assert len(found) > 3 * 8 and batch["encoder_segment_ids"].max() > 3
    for inputs, targets in found:
        # Of a few-shot prompt, the last question is the one to be answered.
        questions = [question for question in wanted if inputs.endswith(question)]
        assert wanted[max(questions, key=len)] == targets


def test_decoders_have_loss_on_targets_only(cache_dir):
    dataset = config(
        cache_dir, "embedded_larger", pack=True, feature_converter=TargetsLMConverter()
    )
    batch = next(dataset.build())
    tokens, weights = batch["decoder_target_tokens"], batch["decoder_loss_weights"]
    assert "decoder_causal_attention" not in batch
    for row in range(8):
        segments = batch["decoder_segment_ids"][row]
        for segment in range(1, segments.max() + 1):
            inside = (segments == segment) & (weights[row] > 0)
            assert KJV.decode(tokens[row][inside]).isdigit()
            assert tokens[row][inside][-1] == 1


def test_training_loads_no_tensorflow(cache_dir):
    script = f"""
import sys
from t5x_like.data.dataset import DatasetConfig
data = DatasetConfig(mixture_or_task_name="embedded_list_count", batch_size=4, pack=True,
                     task_feature_lengths={LENGTHS}, cache_dir={str(cache_dir)!r}, use_cached=True)
batches = data.build()
next(batches), next(batches)
assert not {{"tensorflow", "seqio", "tasks"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_state_is_restored(cache_dir):
    data = config(cache_dir, "embedded_list_count", pack=True)
    batches = data.build()
    for _ in range(3):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    wanted = [next(batches) for _ in range(3)]
    again = data.build()
    again.set_state(state)
    for batch in wanted:
        for name, array in next(again).items():
            np.testing.assert_array_equal(array, batch[name])


def test_embedded_mixture():
    mixture = seqio.get_mixture_or_task("embedded_train")
    trained = {task.name.removeprefix("embedded_") for task in mixture.tasks}
    assert len(trained) >= 8 and not trained & {*embedded.HELD_OUT}
    assert trained | {*embedded.HELD_OUT} == embedded.COLLECTIONS.keys()
    held_out = {task.name for task in seqio.get_mixture_or_task("embedded_held_out").tasks}
    assert held_out == {f"embedded_{name}_zero_shot" for name in embedded.HELD_OUT}
    for name, collection in embedded.COLLECTIONS.items():
        zero_shot = [t for t in collection.templates if t.kind == "zero_shot"]
        assert len(zero_shot) >= 5, name


@pytest.mark.parametrize("name", embedded.COLLECTIONS)
def test_the_vocabulary_has_all_that_the_embedded_tasks_say(name):
    """No unknown token, and the text comes back; nor does a record of validation occur in train."""
    collection, source = embedded.COLLECTIONS[name], embedded.source_of(name)
    splits = {}
    for split in ("train", "validation"):
        examples = [e for e, _ in zip(read_examples(source, split), range(60), strict=False)]
        made = [dict(r) for e in examples for r in records_of(collection.prepare, e)]
        splits[split] = {json.dumps(record) for record in made}
        for record in made[:20]:
            for template in collection.templates:
                for text in template.render(record) if template.applies(record) else ():
                    ids = KJV.encode(text)
                    assert KJV.spec.unk_id not in ids
                    assert KJV.decode(ids) == " ".join(text.split())
    assert splits["validation"] and not splits["train"] & splits["validation"]


# A user's own files


def write(path: Path, examples: list[Any]) -> RecordSource:
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return RecordSource({"train": [str(path)]})


def test_own_files_with_all_kinds_of_templates(own):
    examples = [
        {"question": f"What is {i}+1?", "answer": f"It is {i}+1.\n#### {i + 1}"} for i in range(90)
    ]
    source = write(own / "a.jsonl", examples)
    names = add_tasks(
        "own_gsm8k", COLLECTIONS["gsm8k"], source=source, vocabulary=seqio.ByteVocabulary()
    )
    kinds = ("zero_shot", "few_shot", "chain_of_thought", "inversion")
    assert set(names) == {"own_gsm8k", *(f"own_gsm8k_{kind}" for kind in kinds)}
    lengths = {"inputs": 300, "targets": 64}
    seen = collections.Counter()
    task = seqio.get_mixture_or_task("own_gsm8k")
    for example in task.get_dataset(lengths, "train", shuffle=False).as_numpy_iterator():
        inputs, targets = (
            vocabularies.load("bytes").decode(example[name]) for name in ("inputs", "targets")
        )
        kind = "inversion" if inputs.startswith("Solution") else "zero_shot"
        kind = "few_shot" if inputs.count("What is") > 1 else kind
        kind = "chain_of_thought" if "It is" in targets else kind
        seen[kind] += 1
    assert sum(seen.values()) == 90
    # Expected 45, 27, 9, 9: within 4 sigma.
    for kind, share in register.SHARES.items():
        assert abs(seen[kind] - 90 * share) <= 4 * np.sqrt(90 * share * (1 - share)), seen


def test_exemplars_are_of_the_train_split_and_grouped(own):
    many = [{"question": f"q{i}", "answer": f"#### {i}"} for i in range(300)]
    source = write(own / "a.jsonl", many)
    pool = register.exemplars(source, "train", COLLECTIONS["gsm8k"].prepare)
    assert len({record["question"] for record in pool}) == 64
    choices = {"choices": ["a", "b"], "answer": 0}
    exam = [
        choices | {"question": f"{subject}{i}", "subject": subject}
        for subject in ("law", "art")
        for i in range(9)
    ]
    pool = register.exemplars(write(own / "b.jsonl", exam), "train", COLLECTIONS["mmlu"].prepare)
    assert collections.Counter(record["group"] for record in pool) == {"law": 5, "art": 5}


def test_chat_tasks_on_both_routes(own):
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "So long."},
    ]
    shared = [
        {"from": {"user": "human"}.get(t["role"], "gpt"), "value": t["content"]} for t in turns
    ]
    source = write(own / "a.jsonl", [{"messages": turns}, {"conversations": shared}] * 8)
    add_chat_tasks("own_chat", source=source, vocabulary=seqio.ByteVocabulary())
    cache_job.cache("own_chat_lm", module=None, cache_dir=own / "cache")
    found = {}
    for use_cached in (True, False):
        data = config(
            own / "cache",
            "own_chat_lm",
            task_feature_lengths={"targets": 160},
            feature_converter=WeightedLMConverter(),
            module=None,
            pack=True,
            num_epochs=1,
            shuffle=False,
            use_cached=use_cached,
        )
        found[use_cached] = [batch for batch in data.build()]
    for cached, streamed in zip(found[True], found[False], strict=True):
        for name, array in cached.items():
            np.testing.assert_array_equal(array, streamed[name])
    batch = found[True][0]
    written = batch["decoder_target_tokens"][0][batch["decoder_loss_weights"][0] > 0]
    text = bytes(int(i) - 3 if i > 2 else 10 for i in written).decode()
    assert text.splitlines()[:4] == ["Hello.", "So long."] * 2
    assert batch["decoder_segment_ids"][0].max() == 2
    dataset = seqio.get_mixture_or_task("own_chat_lm").get_dataset({"targets": 50}, "train")
    for example in dataset.take(3).as_numpy_iterator():
        assert len(example["targets"]) == len(example[WEIGHTS]) <= 50


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": "x"}, "no assistant's turn"),
        ({"messages": [{"role": "user", "content": None}]}, "has no text"),
        (
            {"messages": [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "y"}]},
            "role 'tool'",
        ),
    ],
)
def test_bad_conversations_stop_the_cache(own, line, message):
    add_chat_tasks(
        "own_bad", source=write(own / "a.jsonl", [line]), vocabulary=seqio.ByteVocabulary()
    )
    with pytest.raises(UserError, match=message):
        cache_job.cache("own_bad_lm", module=None, cache_dir=own / "cache")


# Mixtures


def test_mixture_rates(own):
    for name, count in (("own_small", 100), ("own_large", 10_000)):
        add_tasks(
            name,
            embedded.COLLECTIONS["larger"],
            source=CountingSource(count, validation_fraction=0.0),
            vocabulary=seqio.ByteVocabulary(),
        )
    names = ["own_small", "own_large"]
    cases: list[tuple[dict[str, Any], list[float]]] = [
        ({}, [100, 10_000]),
        ({"cap": 400}, [100, 400]),
        ({"temperature": 2.0}, [10, 100]),
        ({"cap": 400, "temperature": 2.0}, [10, 20]),
    ]
    for i, (settings, rates) in enumerate(cases):
        add_mixture(f"own_mixture_{i}", names, **settings)
        mixture = seqio.get_mixture_or_task(f"own_mixture_{i}")
        found = {task.name: mixture.get_rate(task) for task in mixture.tasks}
        assert [found[name] for name in names] == pytest.approx(rates)
    add_mixture("own_explicit", {"own_small": 3.0, "own_large": 1.0})
    mixture = seqio.get_mixture_or_task("own_explicit")
    assert {task.name: mixture.get_rate(task) for task in mixture.tasks} == {
        "own_small": 3.0,
        "own_large": 1.0,
    }
    for settings in ({"cap": 0}, {"temperature": 0.0}):
        with pytest.raises(UserError, match="must be"):
            add_mixture("own_bad", names, **settings)
    with pytest.raises(UserError, match="must be positive"):
        add_mixture("own_bad", {"own_small": 0.0})


def test_public_tasks_are_registered():
    """Over TFDS, without reading it."""
    import tasks.instruct.public  # noqa: F401

    mixture = seqio.get_mixture_or_task("flan_like")
    assert {task.name for task in mixture.tasks} == TFDS.keys()
    t5 = {n for n, c in COLLECTIONS.items() if c.tfds and any(t.kind == "t5" for t in c.templates)}
    assert {f"{name}_t5" for name in t5} <= set(seqio.TaskRegistry.names())


def test_a_public_collection_from_tfds_files(own):
    """The whole road from TFDS's own files, nested features included."""
    tfds = pytest.importorskip("tensorflow_datasets")
    features = tfds.builder("squad/v1.1", data_dir=own, try_gcs=False).info.features
    (example,) = all_examples(TFDS)["squad"]
    import tensorflow as tf

    encoded = features.encode_example(example)
    tensors = tf.nest.map_structure(
        lambda v: tf.constant(v.tolist() if hasattr(v, "tolist") else v), encoded
    )
    source = seqio.FunctionDataSource(
        lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensors(tensors),
        splits=["train"],
    )
    vocabulary = seqio.ByteVocabulary()
    add_tasks("own_squad", COLLECTIONS["squad"], source=source, vocabulary=vocabulary)
    lengths = {"inputs": 512, "targets": 64}
    dataset = seqio.get_mixture_or_task("own_squad_t5").get_dataset(lengths, "train")
    (made,) = dataset.take(1).as_numpy_iterator()
    bytes_ = vocabularies.load("bytes")
    assert bytes_.decode(made["inputs"]).startswith("question: Where does the Elbe rise ? context:")
    assert bytes_.decode(made["targets"]) == "Bohemia"
    task = seqio.get_mixture_or_task("own_squad_t5")
    target = task.postprocess_fn("Bohemia", example=made, is_target=True)
    assert target == ["Bohemia", "in Bohemia."]
