"""Text to a model's prompt and back, by a Task's vocabulary or a Hugging Face tokenizer."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from t5x_like.data import vocabularies
from t5x_like.data.cache_format import OutputFeature, VocabularySpec
from t5x_like.data.chat import ChatFormat, Message, encode_piece
from t5x_like.data.templates import load_vocabulary
from t5x_like.errors import UserError

TOKENIZER_FILES = ("spiece.model", "tokenizer.model")
# What `data.chat` has in place of "{bos}" in pieces.
BOS_MARK = "\0"


class Codec(Protocol):
    """What turns text into ids and back."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens that end a sequence."""
        ...

    def prompt(self, text: str) -> list[int]:
        """Ids that the model reads: inputs of an encoder, or all that a decoder starts with."""
        ...

    def target(self, text: str) -> list[int]:
        """Ids of what is scored."""
        ...

    def continuation(self, text: str) -> list[int]:
        """Ids of text that goes on after it, so without an end of sequence."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids up to the end of sequence."""
        ...

    def conversation(self, messages: Sequence[Message], format: ChatFormat) -> list[int]:
        """The prompt that asks for the assistant's next turn."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskCodec:
    """A Task's way: what training on it gave the model.

    Attributes:
      inputs, targets: vocabularies of these features, and whether they end in EOS.
      first_id: what a decoder alone reads first (BOS); None for a model with an encoder.
    """

    inputs: OutputFeature
    targets: OutputFeature
    first_id: int | None = None

    @classmethod
    def of(cls, features: Mapping[str, OutputFeature], first_id: int | None) -> TaskCodec:
        """Of a Task's features; language modelling has no inputs, which then look like targets.

        Raises:
          UserError: there are no targets.
        """
        if "targets" not in features:
            raise UserError(f"A Task needs the feature 'targets'; it has {sorted(features)}.")
        without_eos = dataclasses.replace(features["targets"], add_eos=False)
        inputs = features.get("inputs", without_eos)
        return cls(inputs=inputs, targets=features["targets"], first_id=first_id)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return (self.targets.vocabulary.eos_id,)

    def prompt(self, text: str) -> list[int]:
        return self.prompt_of(_encode(text, self.inputs))

    def prompt_of(self, inputs: Iterable[int]) -> list[int]:
        """The prompt of a Task's tokens."""
        ids = [int(i) for i in inputs]
        return ids if self.first_id is None else [self.first_id, *ids]

    def target(self, text: str) -> list[int]:
        return _encode(text, self.targets)

    def continuation(self, text: str) -> list[int]:
        return load_vocabulary(self.targets.vocabulary).encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        return load_vocabulary(self.targets.vocabulary).decode(ids)

    def decode_inputs(self, ids: Iterable[int]) -> str:
        """Text of a Task's inputs."""
        return load_vocabulary(self.inputs.vocabulary).decode(ids)

    def conversation(self, messages: Sequence[Message], format: ChatFormat) -> list[int]:
        spec = self.inputs.vocabulary
        pieces = format.pieces([*messages, Message("assistant", "")])
        answer = max(i for i, piece in enumerate(pieces) if piece.turn == len(messages))
        while not pieces[answer].has_loss:
            answer -= 1
        texts = [piece.text for piece in pieces[:answer]]
        # As in training, BOS at the start is `first_id`.
        texts[0] = texts[0].removeprefix(BOS_MARK)
        ids = [i for text in texts for i in encode_piece(text, format=format, spec=spec)]
        return self.prompt_of(ids)


def _encode(text: str, feature: OutputFeature) -> list[int]:
    spec = feature.vocabulary
    ids = load_vocabulary(spec).encode(text)
    return [*ids, spec.eos_id] if feature.add_eos else ids


class HuggingFaceCodec:
    """The tokenizer.json of a converted model, with its own ids and special tokens."""

    def __init__(self, directory: Path, *, has_encoder: bool) -> None:
        """`directory` holds tokenizer.json, and a config that names the end of sequence.

        Raises:
          UserError: a file is damaged or says no `eos_token_id`.
        """
        from tokenizers import Tokenizer

        file = directory / "tokenizer.json"
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # The Rust side of `tokenizers` raises no other type.
            raise UserError(f"{file} is not a Hugging Face tokenizer.json ({error}).") from None
        self._has_encoder = has_encoder
        self.eos_ids = _eos_ids(directory)

    def prompt(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    def target(self, text: str) -> list[int]:
        """With an end of sequence for a model with an encoder, as these are trained."""
        ids = self.continuation(text)
        return [*ids, self.eos_ids[0]] if self._has_encoder else ids

    def continuation(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        kept = list(itertools.takewhile(lambda i: i not in self.eos_ids, ids))
        return self._tokenizer.decode(kept)

    def conversation(self, messages: Sequence[Message], format: ChatFormat) -> list[int]:
        return self.continuation(format.text(messages, answer=True))


# Where a directory may say which tokens end a sequence; the first that does counts.
_CONFIGS = ("generation_config.json", "hugging_face_config.json", "config.json")


def _eos_ids(directory: Path) -> tuple[int, ...]:
    for name in _CONFIGS:
        file = directory / name
        found = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
        if found is not None:
            return tuple(found) if isinstance(found, list) else (int(found),)
    raise UserError(
        f"None of {', '.join(_CONFIGS)} in '{directory}' says an eos_token_id: add one, such as "
        '{"eos_token_id": 1} in generation_config.json.'
    )


def find_codec(
    model_dir: Path,
    *,
    features: Mapping[str, OutputFeature] | None,
    vocabulary: str | None,
    has_encoder: bool,
    first_id: int,
) -> Codec:
    """How text becomes prompts of the model in a directory.

    Args:
      model_dir: of training or of `convert`; its checkpoints may name their vocabularies.
      features: of the Task that it was trained on, where that is known.
      vocabulary: "bytes" or a file, in place of all of these.
      has_encoder: text for an encoder ends in EOS where no Task says anything else.
      first_id: what a decoder alone reads first; a tokenizer.json has its own way.

    Raises:
      UserError: nothing says which vocabulary it is.
    """
    first = None if has_encoder else first_id
    if vocabulary is not None:
        return _plain_codec(vocabularies.load(vocabulary).spec, first)
    if features is not None:
        return TaskCodec.of(features, first)
    if (model_dir / "tokenizer.json").is_file():
        return HuggingFaceCodec(model_dir, has_encoder=has_encoder)
    for name in TOKENIZER_FILES:
        if (model_dir / name).is_file():
            return _plain_codec(vocabularies.load(str(model_dir / name)).spec, first)
    spec = _vocabulary_of_checkpoint(model_dir)
    if spec is None:
        raise UserError(
            f"Nothing says which vocabulary the model of '{model_dir}' has: give VOCABULARY = "
            "'bytes', a .model or a tokenizer.json, or MIXTURE_OR_TASK_NAME and CACHE_DIR."
        )
    return _plain_codec(spec, first)


def _plain_codec(spec: VocabularySpec, first_id: int | None) -> TaskCodec:
    inputs = OutputFeature(vocabulary=spec, add_eos=first_id is None)
    return TaskCodec(inputs=inputs, targets=OutputFeature(vocabulary=spec), first_id=first_id)


def _vocabulary_of_checkpoint(model_dir: Path) -> VocabularySpec | None:
    """What training wrote into the metadata of its checkpoints; of the latest that there is."""
    files = sorted(model_dir.glob("checkpoints/*/metadata/metadata"), key=os.path.getmtime)
    for file in reversed(files):
        known: Mapping[str, Any] = json.loads(file.read_text()).get("vocabularies", {})
        found = known.get("targets", next(iter(known.values()), None))
        if found and "eos_id" in found:
            return VocabularySpec(**found)
    return None
