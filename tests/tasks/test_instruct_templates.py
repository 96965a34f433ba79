"""Templates and the step that draws them, without TensorFlow."""

from __future__ import annotations

import collections
import json

import numpy as np
import pytest

from t5x_like.data import denoisers, vocabularies
from t5x_like.data.cache_format import OutputFeature
from t5x_like.data.denoisers import Context
from t5x_like.data.mixtures import generator
from t5x_like.data.ragged import Examples, Ragged
from t5x_like.data.templates import RECORD, Instruct, Template, few_shot, write_record
from t5x_like.errors import UserError

VOCABULARY = vocabularies.load("bytes")
FEATURES = {name: OutputFeature(vocabulary=VOCABULARY.spec) for name in ("inputs", "targets")}
ASK = Template("Q: {q}", "{a}", separator=" ", answer_prefix=" A: ")


def run(step: Instruct, records: list[dict], *, seed: int = 0, inputs: int = 200) -> list[tuple]:
    context = Context(lengths={"inputs": inputs, "targets": 50}, features=FEATURES)
    examples = {
        RECORD: Ragged.from_rows([np.frombuffer(write_record(r), np.uint8) for r in records])
    }
    done = step.apply(examples, context, generator(seed, position=0))
    return texts(done)


def texts(examples: Examples) -> list[tuple]:
    columns = [examples[name] for name in ("inputs", "targets")]
    return [tuple(VOCABULARY.decode(c[i]) for c in columns) for i in range(len(columns[0]))]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{a} is {n:letter}, {n:number}.", "Yes it is is B, 2."),
        ("{a:lower}|{items:commas}|{items:or}", "yes it is|x, y, z|x, y or z"),
        ("{items:lines}", "- x\n- y\n- z"),
        ("{items:letters_inline}{items:letters}", "(A) x (B) y (C) z(A) x\n(B) y\n(C) z"),
        ("{items:numbers} {items:words}", "(1) x (2) y (3) z x y z"),
        ("{p:padded}", "It ' s 3 . 5 , ok !"),
        ("{{literal}} {p}", "{literal} It's 3.5, ok!"),
    ],
)
def test_forms(text, expected):
    record = {"a": "Yes it is", "n": 1, "items": ["x", "y", "z"], "p": "It's 3.5, ok!"}
    assert Template(text, "{a}").render(record) == (expected, "Yes it is")


def test_braces_in_the_data_are_left_alone():
    assert Template("{a}", "{b}").render({"a": "{b} {0}", "b": "{a}"}) == ("{b} {0}", "{a}")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Template("{q:leter}", "{a}").fields, "'leter'.*'letter'"),
        (lambda: Template("no field", "x"), "no field such as"),
        (lambda: Template("{q}", "{a}", kind="zero"), "kind is 'zero'"),
        (lambda: Template("{q}", "{a}", weight=0), "weight"),
        (lambda: Instruct(templates=()), "no template"),
        (lambda: write_record({"a": {"b": 1}}), "'a'.*Flatten"),
    ],
)
def test_bad_templates(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_draws_follow_the_weights_and_the_seed():
    step = Instruct(
        templates=(
            Template("a {q}", "{a}", weight=3),
            Template("b {q}", "{a}"),
            Template("c {q} {reason}", "{a}", weight=100),  # applies to none
        )
    )
    records = [{"q": str(i), "a": "x", "reason": ""} for i in range(2000)]
    first, again, other = (run(step, records, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    counts = collections.Counter(inputs[0] for inputs, _ in first)
    assert counts.keys() == {"a", "b"}
    # 3 sigma of a binomial of 2000 draws at 0.75 is 58.
    assert abs(counts["a"] - 1500) < 58
    # The draw of an example does not depend on which templates the others have.
    mixed = [r | ({"reason": "r"} if i % 2 else {}) for i, r in enumerate(records)]
    assert run(step, mixed, seed=1)[::2] == first[::2]


def test_records_without_a_template_are_left_out():
    step = Instruct(templates=(Template("{q} {reason}", "{a}"),))
    records = [{"q": "1", "a": "x", "reason": "r"}, {"q": "2", "a": "y"}, {"q": "3", "a": ""}]
    assert run(step, records) == [("1 r", "x")]


def test_few_shot():
    pool = tuple({"q": str(i), "a": f"a{i}"} for i in range(6))
    step = Instruct(templates=(few_shot(ASK, shots=2),), exemplars=pool)
    made = run(step, [dict(pool[0])] * 300)
    seen = set()
    for inputs, targets in made:
        *shown, question = inputs.split("Q: ")[1:]
        assert (question, targets) == ("0", "a0") and len(shown) == 2
        numbers = [text.split(" A: ") for text in shown]
        assert all(answer.strip() == f"a{n}" and n != "0" for n, answer in numbers)
        assert numbers[0] != numbers[1]
        seen |= {n for n, _ in numbers}
    assert seen == set("12345")


def test_exemplars_are_of_the_same_group():
    pool = tuple({"q": f"{g}{i}", "a": "x", "group": g} for g in "uv" for i in range(3))
    step = Instruct(templates=(few_shot(ASK, shots=3),), exemplars=pool)
    ((inputs, _),) = run(step, [{"q": "new", "a": "x", "group": "v"}])
    assert {part.split(" ")[0] for part in inputs.split("Q: ")[1:-1]} == {"v0", "v1", "v2"}


@pytest.mark.parametrize(("room", "shown"), [(200, 3), (50, 2), (30, 1), (12, 0), (7, 0)])
def test_exemplars_that_do_not_fit_are_dropped_and_the_question_stays(room, shown):
    pool = tuple({"q": "solved", "a": str(i)} for i in range(3))  # 17 bytes each
    step = Instruct(templates=(few_shot(ASK, shots=3),), exemplars=pool)
    ((inputs, _),) = run(step, [{"q": "open", "a": "x"}], inputs=room)
    assert inputs.count("solved") == shown and inputs.endswith("Q: open")


def test_the_manifest_has_all_of_a_step():
    step = Instruct(templates=(ASK, few_shot(ASK, shots=2)), exemplars=({"q": "ü", "a": "y"},))
    stored = json.loads(json.dumps(step.to_dict()))
    assert stored["op"] == "Instruct"
    assert denoisers.from_dict(stored) == step
