"""The lm-evaluation-harness runs a task of its three kinds of requests on local data."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="the harness is an extra")
# What the harness reads lies here; nothing is to be looked for in the network.
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from t5x_like.evaluation.lm_eval_adapter import HarnessModel, cut_at
from t5x_like.evaluation.predictor import Prompt

DOCUMENTS = [
    {"question": "say ox", "choices": ["ox", "ram"], "label": 0},
    {"question": "say a dove", "choices": ["hen", "a dove", "fish"], "label": 1},
    {"question": "say bee", "choices": ["bee", "owl"], "label": 0},
]
LOCAL = """\
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}} "
"""
TASKS = {
    "local_choice": """\
output_type: multiple_choice
doc_to_target: label
doc_to_choice: choices
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "local_text": """\
output_type: loglikelihood_rolling
doc_to_target: "{{question}}, and then {{choices[0]}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "local_answer": """\
output_type: generate_until
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["o"], max_gen_toks: 6}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> TaskManager:
    directory = tmp_path_factory.mktemp("harness")
    data = directory / "data.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    for name, text in TASKS.items():
        (directory / f"{name}.yaml").write_text(f"task: {name}\n{LOCAL.format(data=data)}{text}")
    os.environ["HF_HOME"] = str(directory / "cache")
    return TaskManager(include_path=str(directory), include_defaults=False)


@pytest.fixture(params=["pretrained", "decoder"])
def model(request) -> HarnessModel:
    model_dir: Path = request.getfixturevalue(request.param)
    return HarnessModel.load(str(model_dir), "BATCH_SIZE=4")


def ask(kind: str, *arguments: tuple) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=each, idx=i)
        for i, each in enumerate(arguments)
    ]


def test_tasks_of_the_harness(model, tasks) -> None:
    found = simple_evaluate(model=model, tasks=list(TASKS), task_manager=tasks, log_samples=True)
    results, samples = found["results"], found["samples"]
    right = []
    for sample in samples["local_choice"]:
        document = sample["doc"]
        pairs = [(f"{document['question']} ", f" {choice}") for choice in document["choices"]]
        # One at a time, out of the batches that the harness made.
        alone = [model.loglikelihood(ask("loglikelihood", pair))[0][0] for pair in pairs]
        assert [pair[0][0] for pair in sample["resps"]] == pytest.approx(alone, abs=1e-4)
        right.append(alone.index(max(alone)) == document["label"])
    assert results["local_choice"]["acc,none"] == pytest.approx(sum(right) / 3)
    texts = [f"{d['question']}, and then {d['choices'][0]}" for d in DOCUMENTS]
    nats = sum(model.loglikelihood_rolling(ask("loglikelihood_rolling", *[(t,) for t in texts])))
    bits = -nats / math.log(2) / sum(len(text.encode()) for text in texts)
    assert results["local_text"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)
    answers = [sample["resps"][0][0] for sample in samples["local_answer"]]
    assert len(answers) == 3 and all("o" not in answer for answer in answers)


def test_rolling_scores_every_token_once(decoder) -> None:
    model = HarnessModel.load(str(decoder), "BATCH_SIZE=4")
    predictor, params, codec = model._predictor, model._params, model._codec
    text = "say ox, and a dove"
    (rolling,) = model.loglikelihood_rolling(ask("loglikelihood_rolling", (text,)))
    whole = Prompt(index=0, inputs=[0], targets=codec.continuation(text))
    (expected,) = predictor.score(params, [whole])
    assert rolling == pytest.approx(expected.log_likelihood, abs=1e-4)
    windows = HarnessModel(predictor, params, codec, window=8)._windows(text)
    assert [token for w in windows for token in w.targets] == codec.continuation(text)
    # Each with all the context that there is room for.
    assert [len(w.inputs) + len(w.targets) for w in windows] == [8, 8, 8]


def test_stop_strings() -> None:
    assert cut_at("one two three", ["three", " two"]) == "one"
    assert cut_at("one two", ["four", ""]) == "one two"
