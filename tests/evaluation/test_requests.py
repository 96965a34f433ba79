"""Lines of text and JSON as requests: what is refused, and why; lengths."""

from __future__ import annotations

import json

import numpy as np
import pytest

from t5x_like.data import vocabularies
from t5x_like.data.cache_format import OutputFeature
from t5x_like.data.chat import FORMATS, ChatLM, Message
from t5x_like.data.denoisers import Context
from t5x_like.data.ragged import Ragged
from t5x_like.data.templates import RECORD, write_record
from t5x_like.errors import UserError
from t5x_like.evaluation import requests
from t5x_like.evaluation.codecs import TaskCodec
from t5x_like.evaluation.requests import Request, Tally

SPEC = vocabularies.load("bytes").spec
BOTH = {name: OutputFeature(vocabulary=SPEC) for name in ("inputs", "targets")}
ENCODER = TaskCodec.of(BOTH, None)
DECODER = TaskCodec.of({"targets": BOTH["targets"]}, 0)


def of_lines(*lines: bytes, codec=ENCODER, is_json=True, **wanted) -> list[Request]:
    return list(requests.of_lines([*lines], codec=codec, is_json=is_json, name="file", **wanted))


def test_text() -> None:
    first, second = of_lines(b"hi\r\n", b'{"inputs": 1}\n', is_json=False)
    assert first.shown == {"inputs_pretokenized": "hi"} and second.error is None
    assert ENCODER.decode_inputs(first.inputs) == "hi" and first.inputs[-1] == 1
    (decoder,) = of_lines(b"hi", codec=DECODER, is_json=False)
    assert list(decoder.inputs) == [0, *first.inputs[:-1]]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"[1]", "file:2: a JSON list, not an object."),
        (b"{", "file:2: not JSON: Expecting property name"),
        (b'{"inputs": "\xff"}', "file:2: not UTF-8 at byte 12"),
        (b'{"inputs": "  "}', "file:2: the prompt is empty."),
        (b'{"targets": "x"}', 'file:2: it has no "inputs"'),
        (b'{"inputs": ["x"]}', 'file:2: "inputs" is list, not a string.'),
        (b"", "file:2: not JSON"),
    ],
)
def test_refused_lines_keep_their_place(line, says) -> None:
    good = b'{"inputs": "x", "id": 7}'
    first, second, third = of_lines(good, line, good)
    assert (first.error, third.error) == (None, None) and first.shown == {"inputs": "x", "id": 7}
    assert second.error.startswith(says)
    json.dumps(second.shown)


def test_targets() -> None:
    with_targets, without = of_lines(
        b'{"inputs": "x", "targets": "yz"}', b'{"inputs": "x"}', wants_targets=True
    )
    assert with_targets.targets == ENCODER.target("yz") and with_targets.target_text == "yz"
    assert 'no "targets"' in without.error
    # A language model needs nothing before them.
    (alone,) = of_lines(b'{"targets": "x"}', codec=DECODER, wants_targets=True, wants_inputs=False)
    assert list(alone.inputs) == [0] and alone.targets


def test_tally() -> None:
    tally = Tally()
    tally.see(of_lines(b'{"inputs": "x"}', b"[]", b"3"))
    with pytest.raises(UserError, match=r"2 of 3 prompts were refused.*file:2: a JSON list"):
        tally.check("prompts")
    Tally(entries=3).check("prompts")


@pytest.mark.parametrize(
    ("truncate", "keep_first", "inputs"),
    [
        ("start", False, [13, 14, 1]),
        ("start", True, [11, 14, 1]),
        ("end", True, [11, 12, 1]),
    ],
)
def test_truncation(truncate, keep_first, inputs) -> None:
    long = Request(shown={}, inputs=[11, 12, 13, 14, 1])
    settings = {"truncate": truncate, "eos_ids": (1,), "keep_first": keep_first}
    assert requests.fitted(long, limit=3, **settings).inputs == inputs
    assert requests.fitted(long, limit=5, **settings) is long
    assert requests.fitted(long, limit=None, **settings) is long
    plain = Request(shown={}, inputs=[11, 12, 13, 14])
    cut = requests.fitted(plain, limit=1, truncate="end", eos_ids=(1,), keep_first=True)
    assert cut.inputs == [11]


def test_too_long_is_refused_with_both_numbers() -> None:
    long = Request(shown={}, inputs=[11, 12, 13])
    settings = {"truncate": "refuse", "eos_ids": (1,), "keep_first": True}
    refused = requests.fitted(long, limit=2, **settings)
    assert "3 tokens, and 2 are allowed" in refused.error and "TRUNCATE" in refused.error


@pytest.mark.parametrize("name", ["plain", "chatml", "llama2", "gemma"])
def test_a_conversation_is_asked_as_it_was_trained(name) -> None:
    """What stands before the second answer, as `ChatLM` lays it out in training."""
    messages = [Message("user", "Hi."), Message("assistant", "Yes?"), Message("user", "Why?")]
    answer = "Because."
    whole = [*messages, Message("assistant", answer)]
    record = {"roles": [m.role for m in whole], "contents": [m.content for m in whole]}
    records = Ragged.from_rows([np.frombuffer(write_record(record), np.uint8).astype(np.int32)])
    context = Context(lengths={"targets": 1000}, features=BOTH)
    step = ChatLM(format=FORMATS[name])
    trained = step.apply({RECORD: records}, context, np.random.default_rng(0))
    tokens, weights = trained["targets"][0], trained["targets_weights"][0]
    # The last stretch with loss begins where the answer does.
    begins = np.flatnonzero(np.diff(np.concatenate([[0], weights])) == 1)[-1]
    prompt = DECODER.conversation(messages, FORMATS[name])
    assert prompt == [0, *tokens[:begins].tolist()]
    assert DECODER.decode(tokens[begins:]).strip().startswith(answer)
