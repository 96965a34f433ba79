"""The public collections: their true schemas, T5's own prompts, and every source of records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from t5x_like.errors import UserError
from tasks.instruct import metrics
from tasks.instruct.schemas import choose
from tasks.instruct.schemas.all import COLLECTIONS
from tasks.instruct.sources import RecordSource, code_digest, read_examples, records_of
from tests.tasks.instruct_examples import HUGGING_FACE, NATURAL_INSTRUCTIONS, TFDS, all_examples

ORACLE = json.loads(Path(__file__).with_name("t5_oracle.json").read_text())


def records(name: str, example: Any) -> list[dict[str, Any]]:
    return [dict(record) for record in records_of(COLLECTIONS[name].prepare, example)]


def test_every_collection_has_a_fixture():
    assert TFDS.keys() == {name for name, c in COLLECTIONS.items() if c.tfds}
    assert TFDS.keys() | HUGGING_FACE.keys() == COLLECTIONS.keys()


@pytest.mark.parametrize("name", TFDS)
def test_fixtures_have_the_schema_of_tfds(name, tmp_path):
    """TFDS itself encodes them: names, types and shapes are those of its builders."""
    tfds = pytest.importorskip("tensorflow_datasets")
    builder = tfds.builder(COLLECTIONS[name].tfds, data_dir=tmp_path, try_gcs=False)
    features = builder.info.features
    for example in all_examples(TFDS)[name]:
        assert example.keys() == features.keys()
        features.encode_example(example)


@pytest.mark.parametrize("form", ["TFDS", "HUGGING_FACE"])
def test_every_template_applies_to_some_example(form):
    fixtures = all_examples({"TFDS": TFDS, "HUGGING_FACE": HUGGING_FACE}[form])
    for name, examples in fixtures.items():
        made = [record for example in examples for record in records(name, example)]
        assert made, name
        for template in COLLECTIONS[name].all_templates():
            optional = {"reason", "solved", "explanation", "explained"} & template.fields
            if not optional:
                inputs, targets = template.render(next(r for r in made if template.applies(r)))
                assert inputs.strip() and targets.strip(), (name, template)


@pytest.mark.parametrize("name", ORACLE)
def test_prompts_are_those_of_t5(name):
    """What the package t5 made of the same examples; spaces are as SentencePiece sees them."""
    (template,) = [t for t in COLLECTIONS[name].templates if t.kind == "t5"]
    made = [r for example in all_examples(TFDS)[name] for r in records(name, example)]
    rendered = [[" ".join(text.split()) for text in template.render(r)] for r in made]
    assert rendered == [[" ".join(text.split()) for text in pair] for pair in ORACLE[name]]


def test_oracle_covers_the_prompts_of_t5():
    """All but the closed-book ones, which came after that package."""
    own = {n for n, c in COLLECTIONS.items() if any(t.kind == "t5" for t in c.templates)}
    assert own - ORACLE.keys() == {"trivia_qa", "natural_questions"}


def test_records_say_what_the_example_says():
    (gsm8k,) = records("gsm8k", TFDS["gsm8k"])
    assert gsm8k["reasoning"] == "Tom has 3*4=12 pens. He has 12-2=10 left."
    assert gsm8k["answer"] == "10"
    (hellaswag,) = records("hellaswag", TFDS["hellaswag"])
    assert hellaswag["context"] == "How to tie a knot. Take a rope. Then you"
    assert records("hellaswag", HUGGING_FACE["hellaswag"] | {"label": ""}) == []
    (trivia,) = records("trivia_qa", TFDS["trivia_qa"])
    assert trivia["answers"] == ["The Elbe", "Elbe", "Labe", "elbe", "labe"]
    (unlabelled,) = records("glue_mnli", all_examples(TFDS)["glue_mnli"][2])
    assert unlabelled["answer"] == "<unk>"


def test_truthful_answers_are_not_always_first():
    """As published, the right answer of mc1 is always the first."""
    labels = set()
    for i in range(20):
        question = HUGGING_FACE["truthful_qa"]
        choices = [f"{text} {i}" for text in question["mc1_targets"]["choices"]]
        changed = question | {"mc1_targets": {"choices": choices, "labels": [1, 0, 0]}}
        record = choose.prepare_truthful_qa(changed)
        assert record["choices"][record["label"]] == record["answer"] == choices[0]
        assert sorted(record["choices"]) == sorted(choices)
        labels.add(record["label"])
    assert labels == {0, 1, 2}
    assert record["true_answers"] == ["Yes, without oxygen", "Fish need oxygen"]


# Local files


def test_json_lines_and_parquet_give_the_same_examples(tmp_path):
    for name, examples in all_examples(HUGGING_FACE).items():
        lines = tmp_path / f"{name}.jsonl"
        lines.write_text("".join(json.dumps(example) + "\n" for example in examples))
        table = pyarrow.Table.from_pylist(examples)
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
        for suffix in ("jsonl", "parquet"):
            source = RecordSource({"train": [str(tmp_path / f"{name}.{suffix}")]})
            assert list(read_examples(source, "train")) == examples, (name, suffix)
            assert source.num_input_examples("train") == len(examples)


@pytest.mark.parametrize("indent", [None, 4])
def test_tasks_of_super_natural_instructions(tmp_path, indent):
    path = tmp_path / "task3_opposite.json"
    path.write_text(json.dumps(NATURAL_INSTRUCTIONS, indent=indent))
    examples = list(read_examples(RecordSource({"train": [str(path)]}), "train"))
    made = [record for example in examples for record in records("natural_instructions", example)]
    assert [(r["input"], r["answer"]) for r in made] == [("wet", "dry"), ("fast", "slow")]
    assert made[1]["answers"] == ["slow", "sluggish"]
    solved = next(t for t in COLLECTIONS["natural_instructions"].templates if "solved" in t.fields)
    assert solved.render(made[0]) == (
        "Give the opposite of the word.\n\nInput: hot\nOutput: cold\n\nInput: up\nOutput: down\n\n"
        "Input: wet\nOutput:",
        "dry",
    )


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("a.jsonl", '{"a": 1}\n[1, 2]\n', r"a\.jsonl:2 is not a JSON object"),
        ("a.jsonl", '{"a": 1}\n\n{"a": \n', r"a\.jsonl:3 is not JSON"),
        ("a.json", '{\n"Definition": ["x"]\n}', r"a\.json is neither JSON Lines nor a task"),
        ("a.parquet", "no", r"a\.parquet is not a Parquet file"),
    ],
)
def test_bad_files_are_named(tmp_path, name, contents, message):
    (tmp_path / name).write_text(contents)
    source = RecordSource({"train": [str(tmp_path / name)]})
    with pytest.raises(UserError, match=message):
        list(read_examples(source, "train"))


def test_held_out_examples():
    here = Path(__file__).with_name("t5_oracle.json")
    source = RecordSource({"train": [str(here)]}, validation_fraction=0.2)
    assert set(source.splits) == {"train", "validation"}


def test_code_digest_sees_the_whole_module():
    digests = {code_digest(COLLECTIONS[n].prepare) for n in ("glue_cola", "glue_rte", "squad")}
    assert len(digests) == 2  # partial functions of one module, and a function of another


# Metrics


def test_metrics():
    targets, predictions = ["a", "b ", "c", "d"], ["a", "b", "x", ""]
    assert metrics.exact_match(targets, predictions) == {"exact_match": 50.0}
    assert metrics.accuracy(targets, predictions) == {"accuracy": 50.0}
    assert metrics.exact_match([], []) == {"exact_match": 0.0}
    raw = list(json.dumps({"answer": "a", "answers": ["a", "b"]}).encode())
    assert metrics.all_answers("a", example={"record": raw}, is_target=True) == ["a", "b"]
    assert metrics.all_answers("x", example={}, is_target=False) == "x"


def test_metrics_of_the_library_are_looked_up_when_called(monkeypatch):
    rouge = metrics.named("rouge")
    assert rouge.__name__ == "rouge"
    library = type("Library", (), {"rouge": staticmethod(lambda t, p: {"rouge1": len(t)})})
    monkeypatch.setattr(metrics.importlib, "import_module", lambda name: library)
    assert rouge(["a"], ["b"]) == {"rouge1": 1}
    with pytest.raises(UserError, match="no metric 'blue'"):
        metrics.named("blue")([], [])
