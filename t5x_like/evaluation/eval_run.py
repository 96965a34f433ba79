"""`t5x_like eval`: one, several or all checkpoints of a MODEL_DIR, those still to come included."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from t5x_like.data.task_examples import TaskFunctions
from t5x_like.errors import UserError
from t5x_like.evaluation import metrics, requests
from t5x_like.evaluation.inference_eval import (
    Evaluator,
    InferenceEval,
    Subject,
    fitting,
    kinds_of,
    task_subjects,
)
from t5x_like.evaluation.serving import ModelRun, Served, is_leader, step_of
from t5x_like.parallel import multihost
from t5x_like.training.metrics import read_scalars

logger = logging.getLogger(__name__)
_POLL_SECONDS = 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalRun(ModelRun):
    """What `t5x_like eval` does; see gin/runs/eval.gin.

    Attributes:
      steps: "latest", "all", or the steps themselves. Steps that are in metrics.jsonl are not done
        again.
      follow: go on with checkpoints as a live run saves them, until its last step, or until none
        has come for `follow_timeout` seconds.
      last_step, last_relative_step: total steps of the run that is followed, as its `TrainRun`.
      output_dir: None for MODEL_DIR/inference_eval.
      input_file: JSON Lines with "inputs" and "targets", in place of Tasks; `evaluation.metrics`
        must name what is computed.
    """

    evaluation: InferenceEval
    steps: Literal["latest", "all"] | Sequence[int] = "latest"
    follow: bool = False
    follow_timeout: float = 3600.0
    last_step: int | None = None
    last_relative_step: int | None = None
    output_dir: str | None = None
    input_file: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.steps, str) and self.steps not in ("latest", "all"):
            raise UserError(
                f"EvalRun.steps = {self.steps!r}: give 'latest', 'all' or a list of steps "
                "(CHECKPOINT_STEPS)."
            )
        if self.checkpoint_path and (self.follow or self.steps != "latest"):
            raise UserError(
                "CHECKPOINT_PATH names one checkpoint; FOLLOW and CHECKPOINT_STEPS are of "
                "MODEL_DIR: leave one of them out."
            )
        if self.input_file and self.evaluation.metrics is None:
            raise UserError(
                f"INPUT_FILE '{self.input_file}' has no metrics of its own: give METRICS, such as "
                "\"['exact_match', 'bleu']\"."
            )
        if not self.input_file and not self.evaluation.source.names:
            raise UserError(
                "Nothing to evaluate: give INFERENCE_EVAL_TASKS (Tasks or Mixtures with metrics), "
                "or INPUT_FILE and METRICS."
            )


def execute(run: EvalRun) -> int:
    """Evaluates; returns 0.

    Raises:
      UserError: no checkpoint, no metric, bad data; and, after all that could be done was done,
        lines of INPUT_FILE, or examples, that were refused.
    """
    served = Served(run, source=run.evaluation.source, batch_size=run.evaluation.batch_size)
    groups: dict[str, list[str]] = {}
    if run.input_file:
        subjects = [_file_subject(run, served)]
    else:
        subjects, groups = task_subjects(run.evaluation, predictor=served.predictor)
    if not subjects:
        raise UserError(
            f"None of {', '.join(run.evaluation.source.names or ())} has metrics: give METRICS, as "
            "\"['exact_match']\"."
        )
    output_dir = Path(run.output_dir or Path(run.model_dir) / "inference_eval").expanduser()
    done = _steps_done(output_dir, [subject.name for subject in subjects])
    evaluator = Evaluator(
        subjects,
        predictor=served.predictor,
        config=run.evaluation,
        output_dir=output_dir,
        first_step=None,
        groups=groups,
    )
    steps = 0
    for step, path in _checkpoints(run, done):
        steps += 1
        try:
            params = served.load(path)
        except UserError:
            if Path(path).exists() or run.checkpoint_path:
                raise
            logger.warning("The checkpoint of step %d was deleted before it could be read.", step)
            continue
        for name, scalars in evaluator.run(params, step=step).items():
            if is_leader():
                values = ", ".join(f"{k} {v:.4f}" for k, v in scalars.items())
                print(f"step {step}  {name}: {values}", flush=True)
    evaluator.close()
    if not steps and is_leader():
        print(f"Nothing to do: {output_dir} has these steps already.")
    evaluator.tally.check(f"lines of '{run.input_file}'" if run.input_file else "examples")
    return 0


def _file_subject(run: EvalRun, served: Served) -> Subject:
    """The lines of INPUT_FILE."""
    assert run.input_file is not None
    file, codec = Path(run.input_file).expanduser(), served.codec

    def read() -> list[Any]:
        with file.open("rb") as lines:
            found = list(
                requests.of_lines(
                    lines,
                    codec=codec,
                    is_json=True,
                    name=str(file),
                    wants_inputs=served.predictor.has_encoder,
                    wants_targets=True,
                )
            )
        fit = functools.partial(
            fitting,
            kinds=kinds,
            decoding=run.evaluation.decoding,
            predictor=served.predictor,
            eos_ids=codec.eos_ids,
        )
        return [(request.shown, fit(request)) for request in found]

    if not file.is_file():
        raise UserError(f"There is no file '{file}' (INPUT_FILE).")
    functions = TaskFunctions(
        metric_fns=[metrics.named(name) for name in run.evaluation.metrics or ()]
    )
    kinds = kinds_of(functions)
    if "predictions" in kinds:
        served.predictor.check_room(run.evaluation.decoding)
    return Subject(
        name=file.stem,
        read=read,
        functions=functions,
        decode=codec.decode,
        eos_ids=codec.eos_ids,
    )


def _steps_done(output_dir: Path, names: Sequence[str]) -> set[int]:
    """Steps at which every subject was evaluated by a former run, as the leader sees it."""
    steps = [{int(line["step"]) for line in read_scalars(output_dir / name)} for name in names]
    common = sorted(set.intersection(*steps)) if steps else []
    return set(multihost.process_allgather_json(common)[0])


# ---- Which checkpoints.


def _checkpoints(run: EvalRun, done: set[int]) -> Iterator[tuple[int, str]]:
    """Step and path of what is to be evaluated, in order of steps; waits for more to `follow`."""
    if run.checkpoint_path:
        step = step_of(run.checkpoint_path)
        yield from [] if step in done else [(step, run.checkpoint_path)]
        return
    directory = Path(run.model_dir) / "checkpoints"
    if not run.follow:
        found = _saved(directory)
        if not found:  # A directory of another kind, with one checkpoint to speak of.
            yield step_of(run.model_dir), run.model_dir
            return
        yield from ((s, str(directory / str(s))) for s in _chosen(run, found) if s not in done)
        return
    since = time.monotonic()
    while True:
        found = _saved(directory)
        fresh = [step for step in found if step not in done]
        if run.steps == "latest":
            fresh = fresh[-1:] if fresh[-1:] == found[-1:] else []
        for step in fresh[:1]:
            done.add(step)
            yield step, str(directory / str(step))
            since = time.monotonic()
        last = _last_step(run, directory)
        if not fresh and last is not None and found and found[-1] >= last:
            return
        if not fresh and time.monotonic() - since > run.follow_timeout:
            logger.info("No checkpoint has come for %.0f s: done.", run.follow_timeout)
            return
        if not fresh:
            time.sleep(min(_POLL_SECONDS, run.follow_timeout))


def _saved(directory: Path) -> list[int]:
    """Steps of the complete checkpoints, ascending; as the leader sees them."""
    found = sorted(
        int(path.name)
        for path in (directory.iterdir() if directory.is_dir() else ())
        if path.name.isdigit() and (path / "state").is_dir()
    )
    return multihost.process_allgather_json(found)[0]


def _chosen(run: EvalRun, found: Sequence[int]) -> list[int]:
    if run.steps == "latest":
        return list(found[-1:])
    if run.steps == "all":
        return list(found)
    missing = [step for step in run.steps if step not in found]
    if missing:
        raise UserError(
            f"MODEL_DIR '{run.model_dir}' has no checkpoint of step "
            f"{', '.join(map(str, missing))}; it has {', '.join(map(str, found))}."
        )
    return sorted(int(step) for step in run.steps)


def _last_step(run: EvalRun, directory: Path) -> int | None:
    """The step at which the run that is followed ends, where that is known."""
    if run.last_relative_step is None:
        return run.last_step
    for path in directory.glob("*/metadata/metadata"):
        initial = json.loads(path.read_text()).get("initial_step")
        if initial is not None:
            return int(initial) + run.last_relative_step
    return None
