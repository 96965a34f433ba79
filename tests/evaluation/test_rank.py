"""Rank classification through `t5x_like eval`: public schemas, and the embedded held-out Tasks."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from t5x_like.cli.main import main
from t5x_like.data import cache_job, vocabularies
from t5x_like.errors import UserError
from t5x_like.evaluation.predictor import Prompt
from t5x_like.evaluation.requests import TaskSource
from tasks.instruct import rank
from tests.cache.conftest import remove
from tests.evaluation.conftest import ROOT
from tests.evaluation.test_predictor import one_by_one, serve
from tests.tasks.instruct_examples import HUGGING_FACE, TFDS, all_examples

KJV = vocabularies.load("tasks/kjv/vocabulary.model")
COLLECTIONS = ("mmlu", "hellaswag", "truthful_qa", "bool_q", "anli_r1")
SUFFIXES = ("mmlu_rank", "hellaswag_rank", "truthful_qa_mc1", "truthful_qa_mc2", "bool_q_rank")
SUFFIXES = (*SUFFIXES, "anli_r1_rank")
MODULE = """
import seqio
from tasks.instruct.rank import add_rank_tasks
from tasks.instruct.sources import RecordSource

vocabulary = seqio.ByteVocabulary(extra_ids=125)
for name in {names}:
    files = ["{data}/" + name + ".jsonl"]
    source = RecordSource(dict.fromkeys(("train", "validation", "dev"), files))
    add_rank_tasks("own_" + name, name, source=source, vocabulary=vocabulary)
    add_rank_tasks(
        "own_lm_" + name, name, source=source, vocabulary=vocabulary, continuation=True
    )
"""
# Model: what its Tasks are called, and lengths that its 48 positions allow.
MODELS = {
    "pretrained": ("own", {"inputs": 200, "targets": 40}),
    "decoder": ("own_lm", {"inputs": 20, "targets": 24}),
}


@pytest.fixture(scope="module")
def cached(tmp_path_factory) -> Iterator[Path]:
    """The true schemas as JSON Lines, the module `rank_tasks` over them, and their cache."""
    root = tmp_path_factory.mktemp("rank")
    for name in COLLECTIONS:
        examples = [*all_examples(TFDS).get(name, []), *all_examples(HUGGING_FACE).get(name, [])]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(e) + "\n" for e in examples))
    (root / "rank_tasks.py").write_text(MODULE.format(names=COLLECTIONS, data=root))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root))
        for task in (f"{name}_{suffix}" for name, _ in MODELS.values() for suffix in SUFFIXES):
            jobs = cache_job.local(1)
            cache_job.cache(task, module="rank_tasks", cache_dir=root / "cache", run_jobs=jobs)
        yield root
    remove("own")


@pytest.fixture(scope="module", params=MODELS)
def evaluated(request, cached) -> tuple[str, dict[str, Path], str]:
    """The model's fixture, the output directories by suffix, and what was printed."""
    name, lengths = MODELS[request.param]
    tasks = {suffix: f"{name}_{suffix}" for suffix in SUFFIXES}
    out = cached / f"out_{request.param}"
    flags = ["--module=rank_tasks", f"--tasks={list(tasks.values())}"]
    flags += [f"--gin.TASK_FEATURE_LENGTHS={lengths}", f"--gin.CACHE_DIR={cached / 'cache'}"]
    model_dir = request.getfixturevalue(request.param)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.chdir(ROOT)
        assert main(["eval", str(model_dir), *flags, f"--gin.EVAL_OUTPUT_DIR={out}"]) == 0
    return request.param, {s: out / task for s, task in tasks.items()}, said.getvalue()


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_scores_are_those_of_a_plain_forward_pass(evaluated, request) -> None:
    model, directories, _ = evaluated
    encoder = model == "pretrained"
    served, _, params = serve(request.getfixturevalue(model))
    params = jax.device_get(params)
    for task, directory in directories.items():
        questions: dict[str, list[tuple[float, float, bool]]] = {}
        for line in examples(directory):
            target = line["targets"]
            # In MMLU the letters are scored.
            answer = "ABCD"[target["choice"]] if "mmlu" in task else target["text"]
            ids = prompt(line["inputs"], answer, MODELS[model][1], encoder=encoder)
            expected = one_by_one(served, params, ids, encoder=encoder)
            # float32, summed over at most 40 tokens.
            assert line["score"] == pytest.approx(expected, abs=1e-3)
            row = (expected, expected / len(target["text"].encode()), bool(target["is_right"]))
            questions.setdefault(target["question"], []).append(row)
        check_metrics(task, lines(directory / "metrics.jsonl")[-1], list(questions.values()))


def examples(directory: Path) -> list[dict]:
    (file,) = [path for path in directory.glob("*.jsonl") if path.stem.isdigit()]
    return lines(file)


def prompt(inputs: str, answer: str, limits: dict[str, int], *, encoder: bool) -> Prompt:
    """Bytes as ids by the rule of ByT5, the end of sequence for instruction Tasks only."""
    sides = []
    for name, text in (("inputs", inputs), ("targets", answer if encoder else f" {answer}")):
        ids = [byte + 3 for byte in text.encode()][: limits[name] - encoder]
        sides.append([*ids, 1] if encoder else ids)
    first = [] if encoder else [0]
    return Prompt(index=0, inputs=[*first, *sides[0]], targets=sides[1])


def check_metrics(task: str, logged: dict, questions: list[list[tuple]]) -> None:
    """By hand, from (score, score per byte, is right) of the choices of every question."""
    share = lambda values: pytest.approx(100 * sum(values) / len(values), abs=1e-2)  # noqa: E731
    likeliest = [max(choices)[2] for choices in questions]
    if task.endswith("_rank"):
        assert logged["accuracy"] == share(likeliest)
        per_byte = [max(choices, key=lambda row: row[1])[2] for choices in questions]
        assert logged["accuracy_normalized"] == share(per_byte)
    elif task.endswith("_mc1"):
        assert logged["mc1"] == share(likeliest) and "mc2" not in logged
    else:
        mass = [
            sum(math.exp(s) for s, _, right in choices if right)
            / sum(math.exp(s) for s, _, _ in choices)
            for choices in questions
        ]
        assert logged["mc2"] == share(mass) and "mc1" not in logged


def test_every_choice_is_asked_with_the_same_prompt(evaluated) -> None:
    _, directories, printed = evaluated
    found = {task: examples(directory) for task, directory in directories.items()}
    for task, rows in found.items():
        assert f"{task}: " in printed
        for question in {row["targets"]["question"] for row in rows}:
            same = [row for row in rows if row["targets"]["question"] == question]
            assert len({row["inputs"] for row in same}) == 1
            assert sorted(row["targets"]["choice"] for row in same) == list(range(len(same)))
    right = {
        task: sorted({row["targets"]["text"] for row in rows if row["targets"]["is_right"]})
        for task, rows in found.items()
    }
    assert right == {
        "mmlu_rank": ["carbon dioxide"],
        "hellaswag_rank": ["make a loop.", "sets the sail."],
        "truthful_qa_mc1": ["Yes, without oxygen"],
        "truthful_qa_mc2": ["Fish need oxygen", "Yes, without oxygen"],
        "bool_q_rank": ["no"],
        "anli_r1_rank": ["no", "yes"],
    }


# ---- Limits, and what cannot be scored.


def target(question: str, choice: int, *, of: int = 2, right: int = 0) -> dict:
    is_right = int(choice == right)
    shared = {"question": question, "choice": choice, "choices": of}
    return shared | {"is_right": is_right, "text": "ab"[choice]}


def test_half_a_question_is_left_out_and_a_second_copy_counts() -> None:
    metric = rank.ranked("rank_classification")
    whole = [target("x", 0), target("x", 1), target("y", 1, right=1), target("y", 0, right=1)]
    scores = [-1.0, -2.0, -3.0, -1.0]
    assert metric(whole, scores)["accuracy"] == 50.0
    assert metric([*whole, target("z", 0)], [*scores, -1.0])["accuracy"] == 50.0
    assert metric([*whole, *whole[:2]], [*scores, *scores[:2]])["accuracy"] == pytest.approx(
        200 / 3
    )
    with pytest.raises(UserError, match="EVALUATOR_NUM_EXAMPLES"):
        metric(whole[:1], scores[:1])


def test_embedded_task_on_both_roads(tmp_path) -> None:
    """From the cache and by SeqIO alone, the same examples."""
    task, module = "embedded_larger_rank", "tasks.instruct.embedded"
    cache_job.cache(task, module=module, cache_dir=tmp_path, run_jobs=cache_job.local(1))
    found = []
    for use_cached in ("auto", False):
        source = TaskSource(
            names=task,
            module=module,
            task_feature_lengths={"inputs": 64, "targets": 8},
            cache_dir=str(tmp_path),
            use_cached=use_cached,
        )
        ((examples,),) = source.open().values()
        found.append(list(itertools.islice(examples.read(), 60)))
    assert len(found[0]) == len(found[1]) == 60
    for cached, streamed in zip(*found, strict=True):
        for name in ("inputs", "targets", "record"):
            assert cached[name].tolist() == streamed[name].tolist()
        target = rank.choice_of("", example=cached, is_target=True)
        assert KJV.decode(cached["targets"]) == target["text"]
        numbers = re.findall(r"\d+", KJV.decode(cached["inputs"]))
        assert target["is_right"] == (target["text"] == max(numbers, key=int))
