"""`t5x_like infer`: a Task's or a file's prompts in, JSON Lines out, in the order of the input.

The lines are T5X's: {"inputs": {...}, "prediction": ...} or {"inputs": {...}, "score": ...}. What
is refused has its line too, with "error". Results are written chunk by chunk into
`<output>.partial`; `<output>.progress` says how far it is. A run that is started again after a kill
goes on there and ends with the same file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal

from t5x_like.errors import UserError, did_you_mean
from t5x_like.evaluation import requests
from t5x_like.evaluation.codecs import Codec, TaskCodec
from t5x_like.evaluation.predictor import Decoding, Prompt
from t5x_like.evaluation.requests import Request, Tally, TaskSource
from t5x_like.evaluation.serving import ModelRun, Served, is_leader, step_of
from t5x_like.parallel import multihost

logger = logging.getLogger(__name__)
MODES = ("predict", "predict_with_aux", "score")
STANDARD = "-"


@dataclasses.dataclass(frozen=True, kw_only=True)
class InferRun(ModelRun):
    """What `t5x_like infer` and `chat` do; see gin/runs/infer.gin.

    Attributes:
      source: the Task to read; its names are () for text.
      mode: "predict" writes the text, "predict_with_aux" its log-probability too, "score" the
        log-likelihood of the targets.
      input_file: JSON Lines (.jsonl, .json) with "inputs" and, to score, "targets", else a prompt
        a line; "-" is standard input.
      output_dir: None for MODEL_DIR/inference.
      output_file: a path in place of one made of the input's name; "-" is standard output.
      truncate, max_input_length: what happens to prompts of more tokens (of text; a Task's are cut
        to its feature lengths): refuse them, or cut off their start or end. Without a length, the
        limit is the model's own.
      chunk_batches: batches that are written at once.
      shard_id, num_shards: this job's part of the input: every num_shards-th entry from shard_id
        on.
      chat_format: a key of `data.chat.FORMATS`, for `chat`; None gives the model the bare prompt.
    """

    decoding: Decoding
    source: TaskSource = dataclasses.field(default_factory=TaskSource)
    batch_size: int = 32
    mode: Literal["predict", "predict_with_aux", "score"] = "predict"
    input_file: str | None = None
    output_dir: str | None = None
    output_file: str | None = None
    truncate: requests.Truncate = "refuse"
    max_input_length: int | None = None
    chunk_batches: int = 10
    shard_id: int = 0
    num_shards: int = 1
    chat_format: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("mode", MODES), ("truncate", requests.TRUNCATE)):
            value = getattr(self, name)
            if value not in known:
                raise UserError(
                    f"InferRun.{name} = {value!r}: use one of {', '.join(known)}."
                    f"{did_you_mean(value, known)}"
                )
        for name in ("batch_size", "max_input_length", "chunk_batches", "num_shards"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"InferRun.{name} = {value}: it must be at least 1.")
        if not 0 <= self.shard_id < self.num_shards:
            raise UserError(
                f"SHARD_ID {self.shard_id} is not in 0..{self.num_shards - 1} (NUM_SHARDS "
                f"{self.num_shards})."
            )

    @property
    def sharded_name(self) -> str:
        """T5X's suffix of output files."""
        return f"{self.shard_id:05d}-of-{self.num_shards:05d}"


def execute(run: InferRun) -> int:
    """Runs inference; returns 0.

    Raises:
      UserError: no input, no checkpoint, results of something else in the way; and, after all that
        could be done was done, prompts that were refused.
    """
    if bool(run.source.names) == bool(run.input_file):
        raise UserError("Give either INFER_TASK (a Task or Mixture) or INPUT_FILE, and not both.")
    if run.input_file and run.input_file != STANDARD and not _path(run.input_file).is_file():
        raise UserError(f"There is no file '{run.input_file}' (INPUT_FILE).")
    served = Served(run, source=run.source, batch_size=run.batch_size)
    if run.mode != "score":
        served.predictor.check_room(run.decoding)
    inputs = list(_inputs(run, served))
    params = served.load(run.checkpoint)
    tally = Tally()
    for name, codec, read in inputs:
        worker = _Worker(run, served, codec, params)
        target = _output(run, name)
        if target is None:
            tally.add(worker.to_stream(read(), sys.stdout))
        else:
            tally.add(worker.to_file(read(), target))
    tally.check("prompts")
    return 0


def _path(text: str) -> Path:
    return Path(text).expanduser()


def _inputs(run: InferRun, served: Served) -> Iterator[tuple[str, Codec, Any]]:
    """Name, codec and () -> requests of every Task, or of the file."""
    if run.input_file:
        stdin = run.input_file == STANDARD
        name = "stdin" if stdin else _path(run.input_file).stem
        codec = served.codec
        has_encoder = served.predictor.has_encoder
        yield name, codec, lambda: _of_file(run, codec, has_encoder=has_encoder)
        return
    first_id = None if served.predictor.has_encoder else run.source.first_id
    for tasks in run.source.open().values():
        for task in tasks:
            of_task = TaskCodec.of(task.features, first_id)
            limit = run.source.num_examples
            read = functools.partial(requests.of_task, task, codec=of_task, num_examples=limit)
            yield task.name, of_task, read


def _of_file(run: InferRun, codec: Codec, *, has_encoder: bool) -> Iterator[Request]:
    assert run.input_file is not None
    path = _path(run.input_file)
    with contextlib.ExitStack() as stack:
        stdin = run.input_file == STANDARD
        lines: Iterable[bytes] = sys.stdin.buffer if stdin else stack.enter_context(path.open("rb"))
        # Of standard input only its first line tells: an object of JSON, or text.
        lines, first = _peek(lines)
        is_json = first.lstrip().startswith(b"{") if stdin else path.suffix in (".jsonl", ".json")
        yield from requests.of_lines(
            lines,
            codec=codec,
            is_json=is_json,
            name="line" if stdin else str(path),
            wants_inputs=run.mode != "score" or has_encoder,
            wants_targets=run.mode == "score",
        )


def _peek(lines: Iterable[bytes]) -> tuple[Iterator[bytes], bytes]:
    iterator = iter(lines)
    first = list(itertools.islice(iterator, 1))
    return itertools.chain(first, iterator), first[0] if first else b""


def _output(run: InferRun, name: str) -> Path | None:
    """Where results go; None for standard output."""
    if run.output_file == STANDARD or (run.output_file is None and run.input_file == STANDARD):
        return None
    if run.output_file is not None:
        return _path(run.output_file)
    directory = _path(run.output_dir) if run.output_dir else Path(run.model_dir) / "inference"
    mode = "score" if run.mode == "score" else "predict"
    return directory / f"{name}-{mode}.jsonl-{run.sharded_name}"


class _Worker:
    """Answers requests chunk by chunk."""

    def __init__(self, run: InferRun, served: Served, codec: Codec, params: Any) -> None:
        self._run, self._served, self._codec, self._params = run, served, codec, params
        self._chunk = run.chunk_batches * run.batch_size

    def to_stream(self, entries: Iterable[Request], stream: IO[str]) -> Tally:
        """Writes the lines to `stream`."""
        tally = Tally()
        for chunk in _chunks(self._mine(entries), self._chunk):
            lines = self._answer(chunk)
            tally.see(request for _, request in chunk)
            if is_leader():
                stream.writelines(lines)
                stream.flush()
        return tally

    def to_file(self, entries: Iterable[Request], target: Path) -> Tally:
        """Writes the lines to a file, going on where a killed run was.

        Raises:
          UserError: the file, or its beginning, is of another request.
        """
        progress = _Progress(target, _fingerprint(self._run, target))
        done = multihost.process_allgather_json(progress.start())[0]
        tally = Tally(**done["tally"])
        if done["complete"]:
            logger.info("%s is complete already.", target)
            return tally
        rest = itertools.islice(self._mine(entries), tally.entries, None)
        for chunk in _chunks(rest, self._chunk):
            lines = self._answer(chunk)
            tally.see(request for _, request in chunk)
            progress.add(lines, tally)
        progress.finish(tally)
        if is_leader():
            print(f"{target}: {tally.entries} lines", file=sys.stderr)
        return tally

    def _mine(self, entries: Iterable[Request]) -> Iterator[tuple[int, Request]]:
        """This shard's entries, numbered as in the whole input, cut to the allowed length."""
        run, has_encoder = self._run, self._served.predictor.has_encoder
        for index, request in enumerate(entries):
            if index % run.num_shards == run.shard_id:
                fitted = requests.fitted(
                    request,
                    limit=self._limit(request),
                    truncate=run.truncate,
                    eos_ids=self._codec.eos_ids,
                    keep_first=not has_encoder,
                )
                yield index, fitted

    def _limit(self, request: Request) -> int | None:
        """Most tokens that the prompt may have; None for no limit."""
        run = self._run
        new = len(request.targets) if run.mode == "score" else run.decoding.max_new_tokens
        limits = (run.max_input_length, self._served.predictor.room(new))
        return min((limit for limit in limits if limit is not None), default=None)

    def _answer(self, chunk: Sequence[tuple[int, Request]]) -> list[str]:
        """The line of every entry of a chunk."""
        asked = [(i, request) for i, request in chunk if not request.error]
        prompts = [Prompt(index=i, inputs=r.inputs, targets=r.targets) for i, r in asked]
        predictor = self._served.predictor
        answers: dict[int, dict[str, Any]] = {}
        if self._run.mode == "score":
            scored = predictor.score(self._params, prompts) if prompts else []
            for prompt, score in zip(prompts, scored, strict=True):
                answers[prompt.index] = {"score": score.log_likelihood}
        elif prompts:
            generated = predictor.generate(
                self._params,
                prompts,
                decoding=self._run.decoding,
                eos_ids=self._codec.eos_ids,
                seed=self._run.seed,
            )
            for prompt, generation in zip(prompts, generated, strict=True):
                texts = [self._codec.decode(tokens) for tokens in generation.tokens]
                single = len(texts) == 1
                answer: dict[str, Any] = {"prediction": texts[0] if single else texts}
                if self._run.mode == "predict_with_aux":
                    scores = generation.scores
                    answer["aux"] = {"scores": scores[0] if single else scores}
                answers[prompt.index] = answer
        return [
            json.dumps(
                {"inputs": r.shown, **({"error": r.error} if r.error else answers[i])},
                ensure_ascii=False,
            )
            + "\n"
            for i, r in chunk
        ]


def _chunks(entries: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(entries)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


class _Progress:
    """The files of one output: `.partial` and `.progress` beside it until it is complete.

    Only the leader touches them.
    """

    def __init__(self, target: Path, fingerprint: str) -> None:
        self._target, self._fingerprint = target, fingerprint
        self._partial = target.with_name(target.name + ".partial")
        self._record = target.with_name(target.name + ".progress")

    def start(self) -> dict[str, Any]:
        """What is done already: {"tally", "complete"}."""
        nothing: dict[str, Any] = {"tally": {}, "complete": False}
        if not is_leader():
            return nothing
        self._target.parent.mkdir(parents=True, exist_ok=True)
        if not self._record.exists():
            if self._target.exists():
                raise UserError(
                    f"The output '{self._target}' is there already, and not of this command: move "
                    "it away, or give another OUTPUT_FILE or INFER_OUTPUT_DIR."
                )
            self._partial.write_bytes(b"")
            return nothing
        record = json.loads(self._record.read_text())
        if record["request"] != self._fingerprint:
            raise UserError(
                f"The output '{self._target}' is of another model, input or setting: remove "
                f"{self._record.name} and the output, or give another OUTPUT_FILE or "
                "INFER_OUTPUT_DIR."
            )
        # It gets its name last, so a kill after that left nothing but this to be said.
        record["complete"] |= self._target.exists() and not self._partial.exists()
        if not record["complete"]:
            with self._partial.open("r+b") as file:  # What came after the last full chunk.
                file.truncate(record["bytes"])
        return {name: record[name] for name in nothing}

    def add(self, lines: Sequence[str], tally: Tally) -> None:
        """Appends the lines of a chunk, then says so."""
        if not is_leader():
            return
        with self._partial.open("ab") as file:
            file.write("".join(lines).encode())
            file.flush()
            os.fsync(file.fileno())
        self._say(tally, complete=False)

    def finish(self, tally: Tally) -> None:
        """Gives the output its name."""
        if is_leader():
            self._partial.replace(self._target)
            self._say(tally, complete=True)

    def _say(self, tally: Tally, *, complete: bool) -> None:
        record = {
            "request": self._fingerprint,
            "tally": dataclasses.asdict(tally),
            "complete": complete,
            "bytes": (self._target if complete else self._partial).stat().st_size,
        }
        part = self._record.with_name(self._record.name + ".tmp")
        part.write_text(json.dumps(record))
        part.replace(self._record)


def _fingerprint(run: InferRun, target: Path) -> str:
    """Of all that decides the lines of an output."""
    given = {
        field.name: repr(getattr(run, field.name))
        for field in dataclasses.fields(run)
        if field.name not in ("mesh", "rules", "output_dir", "output_file", "chat_format")
    }
    given |= {"name": target.name, "step": str(step_of(run.checkpoint))}
    if run.input_file:
        state = _path(run.input_file).stat()
        given["input"] = f"{state.st_size} {state.st_mtime_ns}"
    return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()
