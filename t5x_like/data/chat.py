"""Conversations as token sequences: chat templates, and the loss on assistant turns only.

A format says what stands before, after and between turns. The pieces of a conversation are encoded
one by one, as they are when a model answers: the prompt first, then token by token the answer. What
the assistant must write, its end-of-turn token included, has loss; all else is context.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from t5x_like.data.cache_format import VocabularySpec
from t5x_like.data.denoisers import Context, Preprocessor
from t5x_like.data.ragged import Examples, Ragged
from t5x_like.data.templates import RECORD, load_vocabulary, read_records
from t5x_like.errors import UserError, did_you_mean

WEIGHTS = "targets_weights"
"""Feature: 1 for a token of "targets" that has loss, 0 for the others."""
# Stand for "{bos}" and "{eos}" in pieces: characters that no message keeps.
_BOS, _EOS = "\0", "\1"
_MARKS = re.compile(f"({_BOS}|{_EOS})")


class Message(NamedTuple):
    """One turn. `role` is "system", "user" or "assistant"."""

    role: str
    content: str


class Piece(NamedTuple):
    """A stretch of a rendered conversation; `turn` is the index of the message it belongs to."""

    text: str
    has_loss: bool
    turn: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
    """What stands around a message: `before` and `after` are context; the assistant writes
    `begin`, the message and `end`.

    "{bos}" and "{eos}" stand for the tokens of these names.
    """

    before: str = ""
    begin: str = ""
    end: str = ""
    after: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """A chat template.

    Attributes:
      user, assistant: around messages of these roles.
      system: around a system message that is a turn; None where there is no such turn.
      system_in_user: around a system message that is put before the first user message; None where
        there is no such place. Neither: a system message is refused.
      start: what every conversation starts with.
      stop: what follows the last message, if no answer is to come.
      strip: whether whitespace around messages is removed.
      alternates: whether user and assistant must take turns, the user first.
      bos, eos: text of "{bos}" and "{eos}".
    """

    user: Turn
    assistant: Turn
    system: Turn | None = None
    system_in_user: Turn | None = None
    start: str = ""
    stop: str = ""
    strip: bool = False
    alternates: bool = False
    bos: str = ""
    eos: str = "</s>"

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> ChatFormat:
        """Inverse of `dataclasses.asdict`."""
        built: dict[str, Any] = dict(fields)
        for name in ("user", "assistant", "system", "system_in_user"):
            if built.get(name):
                built[name] = Turn(**built[name])
        return cls(**built)

    def pieces(self, messages: Sequence[Message]) -> list[Piece]:
        """The conversation in pieces, with marks for "{bos}" and "{eos}".

        Raises:
          UserError: a role is unknown, or not where the format allows it.
        """
        self._check(messages)
        pieces = [Piece(_marked(self.start), False, 0)]
        for i, message in enumerate(messages):
            pieces += self._message(messages, i, message)
        pieces.append(Piece(_marked(self.stop), False, len(messages) - 1))
        return [piece for piece in pieces if piece.text]

    def text(self, messages: Sequence[Message], *, answer: bool = False) -> str:
        """The conversation as a string; with `answer`, up to where the assistant is to begin."""
        text = "".join(piece.text for piece in self.pieces(messages))
        if answer:
            text = text.removesuffix(_marked(self.stop)) + _marked(self.assistant.before)
        return text.replace(_BOS, self.bos).replace(_EOS, self.eos)

    def _message(self, messages: Sequence[Message], i: int, message: Message) -> Iterator[Piece]:
        if message.role == "system" and self.system is None:
            return  # it comes with the first user message
        turn = getattr(self, message.role)
        content = _MARKS.sub("", message.content)
        if self.system_in_user and i == 1 and messages[0].role == "system":
            around = self.system_in_user
            system = _MARKS.sub("", messages[0].content)
            content = f"{around.before}{system}{around.after}{content}"
        if self.strip:
            content = content.strip()
        writes = message.role == "assistant"
        yield Piece(_marked(turn.before), False, i)
        yield Piece(_marked(turn.begin) + content + _marked(turn.end), writes, i)
        yield Piece(_marked(turn.after), False, i)

    def _check(self, messages: Sequence[Message]) -> None:
        rest = messages
        if messages and messages[0].role == "system":
            rest = messages[1:]
            if self.system is None and self.system_in_user is None:
                raise UserError(
                    "A conversation has a system message, which its chat format does not know. "
                    "Put it into the first user message."
                )
        roles = [message.role for message in rest]
        for role in roles:
            if role not in ("user", "assistant") and not (role == "system" and self.system):
                known = ("system", "user", "assistant")
                hint = did_you_mean(role, known)
                raise UserError(f"A message has the role {role!r} where it cannot stand.{hint}")
        wanted = [("user", "assistant")[i % 2] for i in range(len(roles))]
        if not roles or (self.alternates and roles != wanted):
            raise UserError(
                f"The roles of a conversation are {roles[:6]}; they must alternate: user, "
                "assistant, user, ..."
            )


def _marked(text: str) -> str:
    return text.replace("{bos}", _BOS).replace("{eos}", _EOS)


FORMATS = {
    # meta-llama/Llama-2-7b-chat-hf
    "llama2": ChatFormat(
        user=Turn(before="{bos}[INST] ", end=" [/INST]"),
        assistant=Turn(begin=" ", end=" {eos}"),
        system_in_user=Turn(before="<<SYS>>\n", after="\n<</SYS>>\n\n"),
        strip=True,
        alternates=True,
        bos="<s>",
    ),
    # meta-llama/Meta-Llama-3-8B-Instruct
    "llama3": ChatFormat(
        system=Turn(before="<|start_header_id|>system<|end_header_id|>\n\n", end="<|eot_id|>"),
        user=Turn(before="<|start_header_id|>user<|end_header_id|>\n\n", end="<|eot_id|>"),
        assistant=Turn(
            before="<|start_header_id|>assistant<|end_header_id|>\n\n", end="<|eot_id|>"
        ),
        start="{bos}",
        strip=True,
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
    ),
    # google/gemma-2-2b-it
    "gemma": ChatFormat(
        user=Turn(before="<start_of_turn>user\n", end="<end_of_turn>", after="\n"),
        assistant=Turn(before="<start_of_turn>model\n", end="<end_of_turn>", after="\n"),
        start="{bos}",
        strip=True,
        alternates=True,
        bos="<bos>",
        eos="<eos>",
    ),
    # microsoft/Phi-3-mini-4k-instruct
    "phi3": ChatFormat(
        system=Turn(before="<|system|>\n", end="<|end|>", after="\n"),
        user=Turn(before="<|user|>\n", end="<|end|>", after="\n"),
        assistant=Turn(before="<|assistant|>\n", end="<|end|>", after="\n"),
        stop="{eos}",
        bos="<s>",
        eos="<|endoftext|>",
    ),
    # OpenAI's, as most models that name it have it
    "chatml": ChatFormat(
        system=Turn(before="<|im_start|>system\n", end="<|im_end|>", after="\n"),
        user=Turn(before="<|im_start|>user\n", end="<|im_end|>", after="\n"),
        assistant=Turn(before="<|im_start|>assistant\n", end="<|im_end|>", after="\n"),
        eos="<|im_end|>",
    ),
    # Ours, for vocabularies without special tokens for turns.
    "plain": ChatFormat(
        system=Turn(before="", after="\n"),
        user=Turn(before="User: ", after="\n"),
        assistant=Turn(before="Assistant: ", end="{eos}", after="\n"),
        strip=True,
    ),
}


def find_format(format: str | ChatFormat) -> ChatFormat:
    """The format itself, or one of `FORMATS` by its name."""
    if isinstance(format, ChatFormat):
        return format
    if format not in FORMATS:
        raise UserError(
            f"There is no chat format {format!r}.{did_you_mean(format, FORMATS)} Known: "
            f"{', '.join(FORMATS)}."
        )
    return FORMATS[format]


# Tokens


@functools.lru_cache(maxsize=8)
def _bos_ids(bos: str, spec: VocabularySpec) -> tuple[int, ...]:
    """The token of that name; none if the vocabulary lacks it."""
    pieces = load_vocabulary(spec).pieces()
    return (pieces.index(bos),) if bos in pieces else ()


def encode_piece(text: str, *, format: ChatFormat, spec: VocabularySpec) -> list[int]:
    """Ids of the text of a `Piece`. "{eos}" is the vocabulary's end of sequence."""
    ids: list[int] = []
    for part in filter(None, _MARKS.split(text)):
        if part == _EOS:
            ids.append(spec.eos_id)
        elif part == _BOS:
            ids += _bos_ids(format.bos, spec)
        else:
            ids += load_vocabulary(spec).encode(part)
    return ids


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Chat(Preprocessor):
    """What both steps share: they read records {"roles": [...], "contents": [...]}.

    Attributes:
      format: of the conversations.
    """

    format: ChatFormat = FORMATS["plain"]

    def __post_init__(self) -> None:
        if not isinstance(self.format, ChatFormat):
            object.__setattr__(self, "format", ChatFormat.of(self.format))

    def to_dict(self) -> dict[str, Any]:
        step = super().to_dict()
        step["args"]["format"] = dataclasses.asdict(self.format)
        return step

    def _conversations(
        self, examples: Examples, context: Context
    ) -> Iterator[list[tuple[list[int], Piece]]]:
        spec = context.features["targets"].vocabulary
        for record in read_records(examples[RECORD]):
            messages = [
                Message(*pair) for pair in zip(record["roles"], record["contents"], strict=True)
            ]
            first, *rest = self.format.pieces(messages)
            # The one that opens a conversation is the converter's `bos_id`.
            first = first._replace(text=first.text.removeprefix(_BOS))
            yield [
                (encode_piece(piece.text, format=self.format, spec=spec), piece)
                for piece in (first, *rest)
            ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatLM(_Chat):
    """For decoders: a conversation is one sequence "targets", with "targets_weights".

    A conversation longer than the length of "targets" is cut at its end; one in which no answer is
    left then is left out.
    """

    def apply(self, examples: Examples, context: Context, rng: np.random.Generator) -> Examples:
        limit = context.length("targets")
        tokens, weights = [], []
        for conversation in self._conversations(examples, context):
            ids = np.array([i for part, _ in conversation for i in part], np.int32)
            loss = np.array([p.has_loss for part, p in conversation for _ in part], np.int32)
            context.trimmed["targets"] += max(0, len(ids) - limit)
            if loss[:limit].any():
                tokens.append(ids[:limit])
                weights.append(loss[:limit])
        return {"targets": Ragged.from_rows(tokens), WEIGHTS: Ragged.from_rows(weights)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatTurns(_Chat):
    """For encoder-decoders: each assistant turn is an example, what came before it its inputs.

    Inputs that are too long lose their beginning: the last turns matter most.
    """

    def apply(self, examples: Examples, context: Context, rng: np.random.Generator) -> Examples:
        limits = {name: context.length(name) for name in ("inputs", "targets")}
        eos = context.features["targets"].vocabulary.eos_id
        inputs, targets = [], []
        for conversation in self._conversations(examples, context):
            before: list[int] = []
            for ids, piece in conversation:
                if piece.has_loss:
                    inputs.append(np.array(before[-limits["inputs"] :], np.int32))
                    answer = ids if ids[-1:] == [eos] else [*ids, eos]
                    context.trimmed["targets"] += max(0, len(answer) - limits["targets"])
                    targets.append(np.array(answer[: limits["targets"]], np.int32))
                before += ids
        return {"inputs": Ragged.from_rows(inputs), "targets": Ragged.from_rows(targets)}


STEPS = (ChatLM, ChatTurns)
