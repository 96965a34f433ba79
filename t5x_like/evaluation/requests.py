"""What is asked of a model, from a Task or from text: every entry in order, refused ones too."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from t5x_like.data.converters import EncDecConverter, FeatureConverter
from t5x_like.data.dataset import DatasetConfig
from t5x_like.data.task_examples import Fields, TaskExamples, open_tasks
from t5x_like.errors import UserError
from t5x_like.evaluation.codecs import Codec, TaskCodec

Truncate = Literal["refuse", "start", "end"]
TRUNCATE = ("refuse", "start", "end")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSource:
    """Tasks and Mixtures to read, every Task of a Mixture by itself.

    Attributes:
      names: of Tasks and Mixtures of `module`; None or () for none.
      task_feature_lengths: most tokens of each feature; what is longer is cut.
      cache_dir: see `DatasetConfig`, as for `split`, `seed`, `use_cached` and `feature_converter`.
      shuffle: whether the order is random, by `seed`; with `num_examples`, a random sample.
      num_examples: how many of each Task; None for all.
    """

    names: str | Sequence[str] | None = ()
    module: str | None = None
    task_feature_lengths: Mapping[str, int] = dataclasses.field(default_factory=dict)
    split: str = "validation"
    cache_dir: str = "~/.cache/t5x_like/data"
    feature_converter: FeatureConverter | None = None
    use_cached: bool | Literal["auto"] = "auto"
    shuffle: bool = False
    seed: int = 42
    num_examples: int | None = None

    def __post_init__(self) -> None:
        names = (self.names,) if isinstance(self.names, str) else tuple(self.names or ())
        object.__setattr__(self, "names", names)
        if self.num_examples is not None and self.num_examples < 1:
            raise UserError(
                f"TaskSource.num_examples = {self.num_examples}: give at least 1, or None for all."
            )

    def dataset(self, name: str) -> DatasetConfig:
        """The Task or Mixture `name` as a dataset of one row a batch."""
        return DatasetConfig(
            mixture_or_task_name=name,
            task_feature_lengths=self.task_feature_lengths,
            batch_size=1,
            cache_dir=self.cache_dir,
            split=self.split,
            shuffle=self.shuffle,
            seed=self.seed,
            module=self.module,
            num_epochs=1,
            feature_converter=self.feature_converter or EncDecConverter(),
            use_cached=self.use_cached,
        )

    @property
    def first_id(self) -> int:
        """What a decoder alone reads first: the converter's BOS."""
        return getattr(self.feature_converter, "bos_id", 0)

    def open(self) -> dict[str, list[TaskExamples]]:
        """Name of each Task or Mixture -> its Tasks.

        Raises:
          UserError: see `DatasetConfig.build`.
        """
        return {name: open_tasks(self.dataset(name)) for name in self.names or ()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One entry of the input.

    Attributes:
      shown: what the output says of it, as JSON.
      inputs: the prompt; see `predictor.Prompt`.
      targets: ids to score, if there are any.
      target_text: the targets as text, if there are any.
      error: why it is refused, with its place; None if it is not.
      place: file and line, or Task and number.
    """

    shown: Any
    inputs: Sequence[int] = ()
    targets: Sequence[int] = ()
    target_text: str | None = None
    error: str | None = None
    place: str = ""


@dataclasses.dataclass(kw_only=True)
class Tally:
    """How many entries there were, how many were refused, and why the first was."""

    entries: int = 0
    refused: int = 0
    first_error: str = ""

    def see(self, entries: Iterable[Request]) -> None:
        for entry in entries:
            self.entries += 1
            if entry.error:
                self.first_error = self.first_error or entry.error
                self.refused += 1

    def add(self, other: Tally) -> None:
        self.entries += other.entries
        self.refused += other.refused
        self.first_error = self.first_error or other.first_error

    def check(self, what: str) -> None:
        """Raises a UserError, with the counts, if an entry was refused."""
        if self.refused:
            raise UserError(
                f"{self.refused} of {self.entries} {what} were refused, the others are done. The "
                f"first: {self.first_error}"
            )


# ---- Tasks.


def of_task(task: TaskExamples, *, codec: TaskCodec, num_examples: int | None) -> Iterator[Request]:
    """The requests of a Task, in its order; `shown` has T5X's names of fields."""
    for _, request in fields_and_requests(task, codec=codec, num_examples=num_examples):
        yield request


def fields_and_requests(
    task: TaskExamples, *, codec: TaskCodec, num_examples: int | None
) -> Iterator[tuple[Fields, Request]]:
    """Each example's own fields, which postprocess functions want, and what is asked."""
    for i, fields in enumerate(task.read()):
        if num_examples is not None and i >= num_examples:
            return
        request = task_request(fields, codec=codec)
        yield fields, dataclasses.replace(request, place=f"{task.name}, example {i}")


def task_request(fields: Fields, *, codec: TaskCodec) -> Request:
    """What is asked with an example of a Task."""
    target_text = text_of(fields, "targets", codec.decode)
    shown = {
        name: _json(value)
        for name, value in fields.items()
        if not (isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.ndim == 1)
    }
    shown.setdefault("inputs_pretokenized", input_text(fields, codec))
    shown.setdefault("targets_pretokenized", target_text)
    return Request(
        shown=shown,
        inputs=codec.prompt_of(fields.get("inputs", ())),
        targets=[int(i) for i in fields["targets"]],
        target_text=target_text,
    )


def input_text(fields: Fields, codec: TaskCodec) -> str:
    """The inputs of an example as text; "" if it has none."""
    return text_of(fields, "inputs", codec.decode_inputs) if "inputs" in fields else ""


def text_of(fields: Fields, name: str, decode: Callable[[Iterable[int]], str]) -> str:
    """A feature as text: as it was before tokenization, if the Task kept that; as in SeqIO."""
    kept = fields.get(f"{name}_pretokenized")
    if kept is None:
        return decode(fields[name])
    return kept.decode("utf-8", "replace") if isinstance(kept, bytes) else str(kept)


def _json(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, np.ndarray | np.generic):
        return _json(value.tolist())
    return [_json(item) for item in value] if isinstance(value, list) else value


# ---- Text.


def of_lines(
    lines: Iterable[bytes],
    *,
    codec: Codec,
    is_json: bool,
    name: str,
    wants_inputs: bool = True,
    wants_targets: bool = False,
) -> Iterator[Request]:
    """A request for each line; of JSON objects, "inputs" is the prompt and "targets" the answer.

    Args:
      is_json: JSON Lines; else a line is a prompt.
      name: of the file, for messages.
      wants_inputs, wants_targets: refuse objects without "inputs", without "targets".
    """
    for number, raw in enumerate(lines, 1):
        line, place = raw.rstrip(b"\r\n"), f"{name}:{number}"
        try:
            shown = _parse(line, is_json=is_json)
            wanted = {"inputs": wants_inputs, "targets": wants_targets}
            request = _of_object(shown, codec=codec, wanted=wanted)
            yield dataclasses.replace(request, place=place)
        except UserError as error:
            shown = {"inputs_pretokenized": line.decode("utf-8", "replace")}
            yield Request(shown=shown, error=f"{place}: {error}")


def _parse(line: bytes, *, is_json: bool) -> dict[str, Any]:
    """The object of a line; a line of text is its "inputs", under T5X's name."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 at byte {error.start} of the line.") from None
    if not is_json:
        return {"inputs_pretokenized": text}
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON: {error.msg} at column {error.colno}.") from None
    if not isinstance(value, dict):
        raise UserError(f"a JSON {type(value).__name__}, not an object.")
    return value


def _of_object(shown: dict[str, Any], *, codec: Codec, wanted: Mapping[str, bool]) -> Request:
    texts = {name: shown.get(name, shown.get(f"{name}_pretokenized")) for name in wanted}
    for name, text in texts.items():
        if text is None and wanted[name]:
            raise UserError(f'it has no "{name}", which are needed here.')
        if not isinstance(text, str | None):
            raise UserError(f'"{name}" is {type(text).__name__}, not a string.')
    inputs, targets = texts["inputs"], texts["targets"]
    if inputs is not None and not inputs.strip():
        raise UserError("the prompt is empty.")
    prompt = codec.prompt(inputs or "")
    if not prompt:
        raise UserError('it has no "inputs", and the vocabulary has no token to start with.')
    return Request(
        shown=shown,
        inputs=prompt,
        targets=codec.target(targets) if targets is not None else (),
        target_text=targets,
    )


# ---- Length.


def fitted(
    request: Request,
    *,
    limit: int | None,
    truncate: Truncate,
    eos_ids: Sequence[int],
    keep_first: bool,
) -> Request:
    """The request with its prompt cut to `limit` tokens, or refused, if it is longer.

    Args:
      truncate: "refuse", or the side that is cut off: "start" or "end".
      eos_ids: one of these at the end stays there.
      keep_first: whether the first token stays (a decoder's BOS).
    """
    size = len(request.inputs)
    if request.error or limit is None or size <= limit:
        return request
    if limit < 1 or truncate == "refuse":
        place = f"{request.place}: " if request.place else ""
        reason = (
            "what is to follow the prompt is more than the model has positions for."
            if limit < 1
            else f"the prompt has {size} tokens, and {limit} are allowed: shorten it, or, for "
            "`infer`, set TRUNCATE = 'start' or 'end'."
        )
        return dataclasses.replace(request, error=f"{place}{reason}")
    ids = list(request.inputs)
    if truncate == "end":
        last = ids[-1:] if ids[-1] in eos_ids else []
        return dataclasses.replace(request, inputs=ids[: limit - len(last)] + last)
    first = ids[:1] if keep_first else []
    return dataclasses.replace(request, inputs=first + ids[size - limit + len(first) :])
