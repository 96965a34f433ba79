"""Evaluation on generated text and on log-likelihoods: runs Tasks, writes what came out, scores it.

<output_dir>/<task>/metrics.jsonl, events.*   the metrics of each step
<output_dir>/<task>/<step>.jsonl              inputs, targets and predictions
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from t5x_like.data.task_examples import Fields, TaskExamples, TaskFunctions, load_functions
from t5x_like.errors import UserError
from t5x_like.evaluation import metrics, requests
from t5x_like.evaluation.codecs import TaskCodec
from t5x_like.evaluation.predictor import Decoding, Generation, Predictor, Prompt, Score
from t5x_like.evaluation.requests import Request, TaskSource
from t5x_like.parallel import multihost
from t5x_like.training.metrics import MetricWriter

logger = logging.getLogger(__name__)
Scalars = dict[str, float]
_SHOWN_IN_TENSORBOARD = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class InferenceEval:
    """What is evaluated by generation, or by the log-likelihood of the targets.

    Attributes:
      source: the Tasks.
      decoding: how text is generated.
      batch_size: prompts that are run together.
      metrics: names of functions of `evaluation.metrics`; None for each Task's own metric_fns,
        after its postprocess function.
      seed: of sampling.
    """

    source: TaskSource
    decoding: Decoding
    batch_size: int = 32
    metrics: Sequence[str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.metrics or ():
            metrics.named(name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """A list of requests with the functions that score what the model gives.

    Attributes:
      name: of the Task or file; a directory's name.
      read: () -> (fields for the postprocess function, request) of each example.
    """

    name: str
    read: Callable[[], list[tuple[Fields, Request]]]
    functions: TaskFunctions
    decode: Callable[[Sequence[int]], str]
    eos_ids: tuple[int, ...]


class Evaluator:
    """Evaluates subjects at given parameters, again and again; reads their examples once."""

    def __init__(
        self,
        subjects: Sequence[Subject],
        *,
        predictor: Predictor,
        config: InferenceEval,
        output_dir: Path,
        first_step: int | None = 0,
        groups: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """`groups`: Mixtures with their Tasks, of whose metrics the mean is written as well.

        `first_step`: lines of later steps in metrics.jsonl are dropped; None keeps them.
        """
        self.subjects = list(subjects)
        self._predictor, self._config = predictor, config
        self._output_dir, self._first_step = output_dir, first_step
        self._groups = {name: tasks for name, tasks in (groups or {}).items() if len(tasks) > 1}
        self._examples: dict[str, list[tuple[Fields, Request]]] = {}
        self._writers: dict[str, MetricWriter] = {}
        self._leader = jax.process_index() == 0
        self.tally = requests.Tally()

    def run(self, params: Any, *, step: int) -> dict[str, Scalars]:
        """Evaluates all of them and writes the files; every process must call it.

        Returns:
          The metrics by name of the subject, and of groups; the same on every process.
        """
        results = {subject.name: self._run_one(subject, params, step) for subject in self.subjects}
        for group, names in self._groups.items():
            mean = _mean([results[name] for name in names if name in results])
            if mean:
                results[group] = mean
                self._write(group, step, mean)
        return results

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()

    def _read(self, subject: Subject) -> list[tuple[Fields, Request]]:
        """Reads and counts the examples.

        Raises:
          UserError: all of them are refused.
        """
        examples, tally = subject.read(), requests.Tally()
        tally.see(request for _, request in examples)
        if tally.refused == tally.entries:
            first = f" The first: {tally.first_error}" if examples else ""
            raise UserError(f"'{subject.name}' has nothing that can be evaluated.{first}")
        if tally.refused:
            logger.warning(
                "%d of the %d examples of %s are refused. The first: %s",
                *(tally.refused, tally.entries, subject.name, tally.first_error),
            )
        self.tally.add(tally)
        return examples

    def _run_one(self, subject: Subject, params: Any, step: int) -> Scalars:
        if subject.name not in self._examples:
            self._examples[subject.name] = self._read(subject)
        examples = self._examples[subject.name]
        asked = [(fields, request) for fields, request in examples if not request.error]
        prompts = [
            Prompt(index=i, inputs=request.inputs, targets=request.targets)
            for i, (_, request) in enumerate(asked)
        ]
        kinds = kinds_of(subject.functions)
        generated: list[Generation] = []
        scores: list[Score] = []
        if "predictions" in kinds:
            generated = self._predictor.generate(
                params,
                prompts,
                decoding=self._config.decoding,
                eos_ids=subject.eos_ids,
                seed=self._config.seed,
            )
        if "scores" in kinds:
            scores = self._predictor.score(params, prompts)
        scalars: Scalars = {}
        if self._leader:
            lines = [_line(subject, *pair) for pair in asked]
            _add(lines, subject, asked, generated, scores)
            scalars = compute(subject.functions.metric_fns, lines, generated, scores)
            if len(asked) < len(examples):
                scalars["refused"] = float(len(examples) - len(asked))
            self._write_lines(subject.name, step, lines, scalars)
        # As the leader has them: the others need not agree in the last bit.
        return multihost.process_allgather_json(scalars)[0]

    def _write_lines(
        self, name: str, step: int, lines: Sequence[Mapping[str, Any]], scalars: Scalars
    ) -> None:
        directory = self._output_dir / name
        directory.mkdir(parents=True, exist_ok=True)
        part = directory / f"{step}.jsonl.tmp"
        with part.open("w", encoding="utf-8") as file:
            for line in lines:
                file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
        part.replace(directory / f"{step}.jsonl")
        self._write(name, step, scalars)
        samples = lines[:_SHOWN_IN_TENSORBOARD]
        self._writers[name].text(step, "samples", "\n\n".join(map(_as_text, samples)))

    def _write(self, name: str, step: int, scalars: Scalars) -> None:
        if not self._leader:
            return
        if name not in self._writers:
            self._writers[name] = MetricWriter(self._output_dir / name, first_step=self._first_step)
        self._writers[name].scalars(step, scalars)


def task_subjects(
    config: InferenceEval, *, predictor: Predictor
) -> tuple[list[Subject], dict[str, list[str]]]:
    """The Tasks of a config that have metrics, and which Mixture has which of them.

    Raises:
      UserError: see `TaskSource.open`; the examples are too long for the model; no metric at all.
    """
    subjects: dict[str, Subject] = {}
    groups: dict[str, list[str]] = {}
    for name, tasks in config.source.open().items():
        for task in tasks:
            subject = subjects.get(task.name) or _task_subject(task, config, predictor)
            if not subject.functions.metric_fns:
                logger.warning("%s has no metrics: it is not evaluated by generation.", task.name)
                continue
            for function in subject.functions.metric_fns:
                metrics.parameters(function)
            subjects[task.name] = subject
            groups.setdefault(name, []).append(task.name)
    return list(subjects.values()), groups


def _task_subject(task: TaskExamples, config: InferenceEval, predictor: Predictor) -> Subject:
    first_id = None if predictor.has_encoder else config.source.first_id
    codec = TaskCodec.of(task.features, first_id)
    if config.metrics is None:
        functions = load_functions(task)
    else:
        functions = TaskFunctions(metric_fns=[metrics.named(name) for name in config.metrics])

    def read() -> list[tuple[Fields, Request]]:
        limit = config.source.num_examples
        found = requests.fields_and_requests(task, codec=codec, num_examples=limit)
        fit = functools.partial(
            fitting, kinds=kinds_of(functions), decoding=config.decoding, predictor=predictor
        )
        return [(fields, fit(request, eos_ids=codec.eos_ids)) for fields, request in found]

    return Subject(
        name=task.name,
        read=read,
        functions=functions,
        decode=codec.decode,
        eos_ids=codec.eos_ids,
    )


def kinds_of(functions: TaskFunctions) -> set[str]:
    """What the metrics want of the model: "predictions", "scores" or both."""
    return {metrics.parameters(function)[1] for function in functions.metric_fns}


def fitting(
    request: Request,
    *,
    kinds: set[str],
    decoding: Decoding,
    predictor: Predictor,
    eos_ids: Sequence[int],
) -> Request:
    """The request, refused if the model has too few positions for it."""
    written = decoding.max_new_tokens if "predictions" in kinds else 0
    scored = len(request.targets) if "scores" in kinds else 0
    return requests.fitted(
        request,
        limit=predictor.room(max(written, scored)),
        truncate="refuse",
        eos_ids=eos_ids,
        keep_first=not predictor.has_encoder,
    )


def compute(
    metric_fns: Sequence[metrics.MetricFn],
    lines: Sequence[Mapping[str, Any]],
    generated: Sequence[Generation],
    scores: Sequence[Score],
) -> Scalars:
    """Calls every metric function with what its parameters ask for.

    Raises:
      UserError: two functions give the same name, or something that is no number.
    """
    given: dict[str, Any] = {
        "targets": [line["targets"] for line in lines],
        "predictions": [line.get("prediction") for line in lines],
        "scores": [score.log_likelihood for score in scores],
    }
    of_generation = {"scores": [g.scores[0] for g in generated]}
    of_scores = {"num_tokens": [score.num_tokens for score in scores]}
    scalars: Scalars = {}
    for function in metric_fns:
        names = metrics.parameters(function)
        arguments = {name: given[name] for name in names[:2]}
        if "aux_values" in names:
            arguments["aux_values"] = of_generation if "predictions" in names else of_scores
        for key, value in function(**arguments).items():
            number = _number(value)
            if key in scalars and not math.isclose(scalars[key], number):
                raise UserError(
                    f"Two metrics give '{key}': {scalars[key]} and {number}. Rename one of them."
                )
            scalars[key] = number
    return scalars


def _number(value: Any) -> float:
    """A plain number, or SeqIO's Scalar."""
    try:
        return float(getattr(value, "value", value))
    except (TypeError, ValueError):
        raise UserError(f"A metric gives {type(value).__name__}, which is no number.") from None


def _line(subject: Subject, fields: Fields, request: Request) -> dict[str, Any]:
    shown = request.shown if isinstance(request.shown, Mapping) else {}
    target = subject.functions.postprocess(request.target_text, example=fields, is_target=True)
    inputs = shown.get("inputs_pretokenized", shown.get("inputs", ""))
    return {"inputs": inputs, "targets": target}


def _add(
    lines: Sequence[dict[str, Any]],
    subject: Subject,
    asked: Sequence[tuple[Fields, Request]],
    generated: Sequence[Generation],
    scores: Sequence[Score],
) -> None:
    """Adds what the model gave to the lines; as in SeqIO, several samples as a list."""
    for line, (fields, _), generation in zip(lines, asked, generated, strict=False):
        texts = [subject.decode(tokens) for tokens in generation.tokens]
        output = texts[0] if len(texts) == 1 else texts
        line["prediction"] = subject.functions.postprocess(output, example=fields, is_target=False)
        if line["prediction"] != output:
            line["output"] = output
        line["log_prob"] = generation.scores[0]
    for line, score in zip(lines, scores, strict=False):
        line["score"] = score.log_likelihood


def _as_text(line: Mapping[str, Any]) -> str:
    return "\n".join(f"{name}: {value}" for name, value in line.items())


def _mean(results: Sequence[Scalars]) -> Scalars:
    """The mean of every metric over those that have it."""
    values = collections.defaultdict(list)
    for scalars in results:
        for name, value in scalars.items():
            values[name].append(value)
    return {name: sum(found) / len(found) for name, found in values.items()}
