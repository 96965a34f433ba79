"""Chat formats against the published templates, and the loss on assistant turns only."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jinja2
import numpy as np
import pytest
import tokenizers

from t5x_like.data import chat, denoisers, vocabularies
from t5x_like.data.cache_format import OutputFeature
from t5x_like.data.chat import FORMATS, WEIGHTS, ChatFormat, ChatLM, ChatTurns, Message, Turn
from t5x_like.data.denoisers import Context
from t5x_like.data.instruct_converters import TargetsLMConverter, WeightedLMConverter
from t5x_like.data.mixtures import generator
from t5x_like.data.packing import Piece, collect
from t5x_like.data.ragged import Ragged
from t5x_like.data.templates import RECORD, write_record
from t5x_like.errors import UserError

_ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}"
)
# "chat_template" of the tokenizer_config.json of the repositories named in `chat.FORMATS`; ChatML
# is that of the documentation of transformers.
PUBLISHED = {
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system_message = messages[0]['content'] %}{% else %}"
        "{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
        "{% for message in loop_messages %}"
        + _ALTERNATE
        + "{% if loop.index0 == 0 and system_message != false %}"
        "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' "
        "+ message['content'] %}"
        "{% else %}{% set content = message['content'] %}{% endif %}"
        "{% if message['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}"
        "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "llama3": (
        "{% set loop_messages = messages %}{% for message in loop_messages %}"
        "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
        "+ message['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
        "{{ content }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for message in messages %}"
        + _ALTERNATE
        + "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
        "{% set role = message['role'] %}{% endif %}"
        "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
    ),
    "phi3": (
        "{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
        "{% elif message['role'] == 'user' %}"
        "{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
        "{% elif message['role'] == 'assistant' %}"
        "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}
SYSTEM = [Message("system", " Be brief. ")]
TURNS = [
    Message("user", " Hello,\nwho are you? "),
    Message("assistant", "A model. "),
    Message("user", "Thanks {bos}"),
    Message("assistant", " You're welcome."),
]
CONVERSATIONS = [TURNS[:1], TURNS[:2], TURNS, SYSTEM + TURNS[:1], SYSTEM + TURNS[:3]]
VOCABULARY = vocabularies.load("bytes")


def render(template: str, messages: list[Message], **variables: Any) -> str:
    """As transformers does."""

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    as_dicts = [message._asdict() for message in messages]
    return environment.from_string(template).render(messages=as_dicts, **variables)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("answer", [False, True])
def test_formats_are_the_published_templates(name, answer):
    format = FORMATS[name]
    refused = 0
    for messages in CONVERSATIONS:
        variables = {"bos_token": format.bos, "eos_token": format.eos}
        try:
            wanted = render(PUBLISHED[name], messages, add_generation_prompt=answer, **variables)
        except jinja2.exceptions.TemplateError:
            refused += 1
            with pytest.raises(UserError):
                format.text(messages, answer=answer)
            continue
        assert format.text(messages, answer=answer) == wanted
    assert refused == (2 if name == "gemma" else 0)


@pytest.mark.parametrize(
    ("name", "messages", "message"),
    [
        ("gemma", SYSTEM + TURNS[:2], "system message"),
        ("llama2", TURNS[1:], "must alternate"),
        ("llama3", [Message("tool", "x")], "role 'tool'"),
        ("chatml", [], "must alternate"),
    ],
)
def test_refused_conversations(name, messages, message):
    with pytest.raises(UserError, match=message):
        FORMATS[name].text(messages)


def test_unknown_format():
    with pytest.raises(UserError, match=r"no chat format 'llama'.*llama2"):
        chat.find_format("llama")


def apply(step: Any, messages: list[Message], vocabulary: Any = VOCABULARY, **lengths: int) -> Any:
    features = {
        n: OutputFeature(vocabulary=vocabulary.spec) for n in ("inputs", "targets", WEIGHTS)
    }
    record = {"roles": [m.role for m in messages], "contents": [m.content for m in messages]}
    rows = Ragged.from_rows([np.frombuffer(write_record(record), np.uint8)])
    context = Context(lengths={"inputs": 400, "targets": 400} | lengths, features=features)
    return step.apply({RECORD: rows}, context, generator(0, position=0))


@pytest.mark.parametrize("name", [*PUBLISHED, "plain"])
def test_loss_is_on_what_the_assistant_writes(name):
    """The text with loss is each answer and its end of turn, nothing else."""
    format = FORMATS[name]
    done = apply(ChatLM(format=format), TURNS)
    tokens, weights = done["targets"][0], done[WEIGHTS][0]
    end = format.assistant.end.replace("{eos}", "")
    strip = (lambda text: text.strip()) if format.strip else (lambda text: text)
    runs = np.flatnonzero(np.diff(np.concatenate([[0], weights, [0]])))
    found = [tokens[a:b] for a, b in zip(runs[::2], runs[1::2], strict=True)]
    written = [strip(m.content) for m in TURNS if m.role == "assistant"]
    answers = [format.assistant.begin + text + end for text in written]
    eos = [1] if "{eos}" in format.assistant.end else []
    assert [row.tolist() for row in found] == [VOCABULARY.encode(a) + eos for a in answers]


def test_special_tokens_are_single_ids(tmp_path):
    """With a tokenizer that has them, the sequence is that of the tokenizer over the whole text."""
    special = [
        "<pad>",
        "<|begin_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["Hello, who are you? A model."] * 3, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|eot_id|>"}))
    vocabulary = vocabularies.load(str(tmp_path / "tokenizer.json"), extra_ids=0)
    format = FORMATS["llama3"]
    done = apply(ChatLM(format=format), SYSTEM + TURNS, vocabulary)
    wanted = tokenizer.encode(format.text(SYSTEM + TURNS), add_special_tokens=False).ids
    # The first token is the converter's bos_id.
    assert [1, *done["targets"][0].tolist()] == wanted
    assert not vocabulary.spec.zero_is_token and wanted[0] == 1


def test_long_conversations_are_cut_and_those_without_an_answer_left_out():
    whole = apply(ChatLM(), TURNS)["targets"][0]
    cut = apply(ChatLM(), TURNS, targets=60)
    assert cut["targets"][0].tolist() == whole[:60].tolist() and cut[WEIGHTS][0].any()
    assert len(apply(ChatLM(), TURNS, targets=20)["targets"]) == 0


def test_turns_are_examples_for_encoder_decoders():
    done = apply(ChatTurns(), TURNS)
    decode = VOCABULARY.decode
    pairs = [
        (decode(i), decode(t))
        for i, t in zip(
            *(map(done[n].__getitem__, range(2)) for n in ("inputs", "targets")), strict=True
        )
    ]
    first = "User: Hello,\nwho are you?\nAssistant: "
    assert pairs[0] == (first, "A model.")
    assert pairs[1][1] == "You're welcome."
    assert all(done["targets"][i][-1] == 1 for i in range(2))
    short = apply(ChatTurns(), TURNS, inputs=11)
    assert decode(short["inputs"][0]) == "Assistant: "  # the end of what came before


def test_manifest_and_own_format():
    own = ChatFormat(user=Turn(before="<u>"), assistant=Turn(before="<a>", end="{eos}"))
    step = ChatTurns(format=own)
    assert denoisers.from_dict(json.loads(json.dumps(step.to_dict()))) == step
    assert own.text(TURNS[:2]) == "<u> Hello,\nwho are you? <a>A model. </s>"
    assert dataclasses.replace(own, eos="<e>").text(TURNS[:2]).endswith("<e>")


def packed(converter: Any, **features: list[list[int]]) -> dict[str, np.ndarray]:
    examples = {
        name: Ragged.from_rows([np.array(r) for r in rows]) for name, rows in features.items()
    }
    block = converter.block(examples)
    rows = collect([[Piece(block, 0, len(block))]], converter.task_features)
    return converter.convert(rows, {"inputs": 6, "targets": 6}, pack=True)


def test_weighted_converter():
    features = {"targets": [[7, 8, 9], [5, 6]], WEIGHTS: [[0, 1, 1], [0, 1]]}
    batch = packed(WeightedLMConverter(bos_id=3), **features)
    assert {name: array[0].tolist() for name, array in batch.items()} == {
        "decoder_target_tokens": [7, 8, 9, 5, 6, 0],
        "decoder_input_tokens": [3, 7, 8, 3, 5, 0],
        "decoder_loss_weights": [0, 1, 1, 0, 1, 0],
        "decoder_segment_ids": [1, 1, 1, 2, 2, 0],
        "decoder_positions": [0, 1, 2, 0, 1, 0],
    }
    assert WeightedLMConverter().limits({"targets": 6}) == (6,)


def test_targets_converter():
    features = {"inputs": [[7, 8], [5]], "targets": [[9, 1], [6, 1]]}
    batch = packed(TargetsLMConverter(), **features)
    assert {name: array[0, :8].tolist() for name, array in batch.items()} == {
        "decoder_target_tokens": [7, 8, 9, 1, 5, 6, 1, 0],
        "decoder_input_tokens": [0, 7, 8, 9, 0, 5, 6, 0],
        "decoder_loss_weights": [0, 0, 1, 1, 0, 1, 1, 0],
        "decoder_segment_ids": [1, 1, 1, 1, 2, 2, 2, 0],
        "decoder_positions": [0, 1, 2, 3, 0, 1, 2, 0],
    }
