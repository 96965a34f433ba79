"""Carries a training run out: restore or initialise, compile, loop, leave everything closed."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from t5x_like.data.batch_iterator import BatchIterator
from t5x_like.data.dataset import DatasetConfig
from t5x_like.errors import UserError
from t5x_like.evaluation.inference_eval import Evaluator, task_subjects
from t5x_like.evaluation.predictor import Predictor, is_prefix_lm
from t5x_like.evaluation.teacher_forced import evaluate
from t5x_like.interop.assigned import load_assigned
from t5x_like.interop.initial import (
    find_own_checkpoint,
    initial_step,
    load_initial_params,
)
from t5x_like.layers.moe.layer import Moe
from t5x_like.parallel import multihost
from t5x_like.training import hooks, model_info
from t5x_like.training.checkpoints import Checkpointer, flatten, run_metadata
from t5x_like.training.loop import Hook, Stop, train_loop
from t5x_like.training.metrics import MetricWriter, read_scalars
from t5x_like.training.progress import Progress
from t5x_like.training.run import Built, TrainRun, build
from t5x_like.training.state import TrainState, init_state
from t5x_like.training.upcycle import upcycled

# Ids of the embedding that a vocabulary may leave unused (sizes are rounded up for the hardware).
_SPARE_IDS = 1024


def execute(run: TrainRun, *, gin: str) -> int:
    """Trains; returns the exit code: 0 done, 75 preempted after a clean save.

    Args:
      run: the configuration.
      gin: its operative gin text, written to MODEL_DIR and into every checkpoint.

    Raises:
      UserError: bad input. Nothing is written before configuration and data are known to be sound.
    """
    built = build(run)
    data = run.train_dataset.build(rows=built.local_rows())
    check_vocabulary(run.train_dataset, data.vocab_size, run.model.vocab_size)
    check_readable(data)
    for dataset in run.eval_datasets.values():
        with contextlib.closing(dataset.build(rows=built.local_rows())) as eval_data:
            check_readable(eval_data)
    generative = _open_inference_eval(built)
    resumes = find_own_checkpoint(Path(run.model_dir).expanduser()) is not None
    initial = None if resumes else load_initial(built)
    model_dir = writable_directory(run.model_dir)
    checkpointer = Checkpointer(model_dir, run.checkpoints)
    with contextlib.ExitStack() as stack:
        stack.callback(checkpointer.close)
        session = _Session(built, data, checkpointer, model_dir, gin, stack, generative)
        return session.train(initial)


def plan_text(built: Built) -> str:
    """What a dry run prints: mesh, parameters with their shardings, batch, FLOPs, bytes of state.

    Every line is a gin comment, so that the operative config can follow.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, built.abstract_state.params)
    mesh = {axis: size for axis, size in built.mesh.shape.items() if size > 1} or "one device"
    state_bytes = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(built.abstract_state)
    )
    batch = {name: leaf.shape for name, leaf in built.abstract_batch.items()}
    lines = [
        *model_info.describe(built.model_def.param_info, shardings).splitlines(),
        f"Mesh: {mesh}",
        f"Bytes of parameters and optimizer state per device: {state_bytes}",
        f"Global batch: {batch}",
        f"FLOPs per step: {built.cost().flops:.4g}",
    ]
    return "".join(f"# {line}\n" for line in lines)


def check_vocabulary(dataset: DatasetConfig, vocabulary_size: int, model_size: int) -> None:
    """Raises a UserError unless the model has a row, and few to spare, for every token id."""
    if vocabulary_size <= model_size < vocabulary_size + _SPARE_IDS:
        return
    raise UserError(
        f"The vocabulary of '{dataset.mixture_or_task_name}' has {vocabulary_size} ids, and the "
        f"model's table {model_size} rows: they do not match. "
        f"Set VOCAB_SIZE = {-(-vocabulary_size // 128) * 128}, or choose the task's own model."
    )


def check_readable(data: BatchIterator) -> None:
    """Reads the first batch, and goes back: whatever is wrong with the data is said now.

    Raises:
      UserError: a record that cannot be read, an example that does not fit.
    """
    start = data.get_state()
    next(data, None)
    data.set_state(start)


def load_initial(built: Built) -> tuple[int, dict[str, Any]] | None:
    """Step of INITIAL_CHECKPOINT_PATH, and what the state takes from there, by name, if any.

    Its parameters as `interop.initial` reads them; with an assignment map, those that it takes;
    with `upcycle`, what the dense model has to give.
    """
    run, param_info = built.run, built.model_def.param_info
    path, assignments = run.initial_checkpoint_path, run.assignment_map
    if not path:
        return None
    if run.upcycle:
        return initial_step(path), upcycled(built)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, built.abstract_state.params)
    if assignments is None:
        params = load_initial_params(path, param_info, shardings=shardings, config=run.model)
    else:
        params = load_assigned(path, param_info, assignment_map=assignments, shardings=shardings)
    return initial_step(path), {f"params/{name}": x for name, x in flatten(params).items()}


def _open_inference_eval(built: Built) -> tuple[Predictor, Any] | None:
    """The predictor, and the subjects with their groups, of the evaluations of generated text."""
    config = built.run.inference_eval
    if config is None:
        return None
    predictor = Predictor(
        built.model_def,
        mesh=built.mesh,
        rules=built.run.rules,
        batch_size=config.batch_size,
        bidirectional_prompt=is_prefix_lm(built.run.train_dataset.feature_converter),
    )
    return predictor, task_subjects(config, predictor=predictor)


def writable_directory(path: str) -> Path:
    """Creates a directory if need be, and makes sure that files can be made in it.

    Raises:
      UserError: naming the path and the system's reason.
    """
    if "://" in path:
        raise UserError(
            f"MODEL_DIR '{path}' is in an object store; metrics and config.gin need a file "
            "system. Mount the bucket (gcsfuse, mountpoint-s3) and give the mounted path."
        )
    directory = Path(path).expanduser().absolute()
    probe = directory / f".write-test-{uuid.uuid4().hex}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"MODEL_DIR '{path}' cannot be written: {error.strerror}. "
            "Choose a directory that you may write to."
        ) from error
    return directory


class _Session:
    """One process's part of a run, from the state it starts with to its last checkpoint."""

    def __init__(
        self,
        built: Built,
        data: BatchIterator,
        checkpointer: Checkpointer,
        model_dir: Path,
        gin: str,
        stack: contextlib.ExitStack,
        generative: tuple[Predictor, Any] | None,
    ) -> None:
        self.built, self.run, self.data = built, built.run, data
        self.checkpointer, self.model_dir = checkpointer, model_dir
        self.gin, self.stack, self.generative = gin, stack, generative
        self.metadata: dict[str, Any] = {}
        self.leader = jax.process_index() == 0
        self.progress = Progress() if self.leader else None

    def train(self, initial: tuple[int, dict[str, Any]] | None) -> int:
        """Trains from the latest checkpoint, else from the `initial` step and arrays."""
        start = time.perf_counter()
        state, first_step = self._first_state(initial)
        total_steps = self._total_steps()
        self._write_descriptions()
        key = jax.random.fold_in(jax.random.key(self.run.random_seed), 1)
        compiled = self.built.train_step.lower(
            self.built.abstract_state, self.built.abstract_batch, key
        ).compile()
        self._note(f"ready after {time.perf_counter() - start:.1f} s, at step {first_step}")
        if self.progress:
            self.stack.callback(self.progress.close)
        try:
            train_loop(
                lambda state, batch: compiled(state, batch, key),
                state=state,
                data=self.data,
                place=self.built.place,
                hooks=self._hooks(first_step, total_steps),
                first_step=first_step,
                total_steps=total_steps,
            )
        except Stop as stop:
            self._note(str(stop))
            return stop.exit_code
        return 0

    def _note(self, text: str) -> None:
        if self.progress:
            self.progress.note(text)

    def _first_state(self, initial: tuple[int, dict[str, Any]] | None) -> tuple[TrainState, int]:
        """The state to start from and its step: the latest checkpoint, else from scratch."""
        latest = self.checkpointer.latest_step()
        if latest is not None:
            state, self.metadata = self.checkpointer.restore(self.built.abstract_state, step=latest)
            self.checkpointer.restore_data(self.data, step=latest)
            return state, latest
        key = jax.random.key(self.run.random_seed)
        built, run = self.built, self.run
        state, step = init_state(built.model_def, built.optimizer, built.mesh, run.rules, key), 0
        if initial is not None:
            step, given = initial
            # Not by device_put, whose result in a job of several processes cannot be saved.
            number, sharding = np.int32(step), built.abstract_state.step.sharding
            given |= {"step": jax.make_array_from_callback((), sharding, lambda _: number)}
            leaves, structure = jax.tree.flatten(state)
            taken = [given.get(name, x) for name, x in zip(flatten(state), leaves, strict=True)]
            state = jax.tree.unflatten(structure, taken)
        self.metadata = run_metadata(
            gin=self.gin,
            vocabularies={
                name: dataclasses.asdict(spec) for name, spec in self.data.vocabularies.items()
            },
            initial_step=step,
        )
        return state, step

    def _total_steps(self) -> int:
        if self.run.relative_steps is not None:
            return self.metadata["initial_step"] + self.run.relative_steps
        assert self.run.total_steps is not None
        return self.run.total_steps

    def _write_descriptions(self) -> None:
        """config.gin and model-info.txt."""
        if not self.leader:
            return
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.built.abstract_state.params)
        text = model_info.describe(self.built.model_def.param_info, shardings)
        (self.model_dir / "config.gin").write_text(self.gin)
        (self.model_dir / "model-info.txt").write_text(text)

    def _writer(self, name: str, first_step: int) -> MetricWriter:
        writer = MetricWriter(self.model_dir / name, first_step=first_step)
        self.stack.callback(writer.close)
        return writer

    def _hooks(self, first_step: int, total_steps: int) -> list[Hook]:
        """In the order that they must run; see `training.hooks`."""
        run, writer, eval_writers = self.run, None, {}
        if self.leader:
            writer = self._writer("train", first_step)
            writer.text(first_step, "gin_config", self.gin)
            eval_writers = {
                name: self._writer(f"training_eval/{eval_name(dataset)}", first_step)
                for name, dataset in run.eval_datasets.items()
            }
        log = hooks.LogHook(
            every=run.log_period,
            cost=self.built.cost(),
            total_steps=total_steps,
            writer=writer,
            progress=self.progress,
        )
        nonfinite = hooks.NonFiniteHook(run.nan_policy, restore=self._latest_state)
        evaluation = hooks.EvalHook(
            every=run.eval_period,
            at_start=self.checkpointer.latest_step() is None,
            evaluate={name: self._evaluator(ds) for name, ds in run.eval_datasets.items()},
            evaluate_text=self._text_evaluator(first_step),
            writers=eval_writers,
            pause=log.pause,
            progress=self.progress,
        )
        checkpoint = hooks.CheckpointHook(
            self.checkpointer,
            metadata=self.metadata,
            before_save=(nonfinite.check, log.flush),
            latest_eval=evaluation.of_step,
            pause=log.pause,
        )
        all_hooks: list[Hook] = [log, nonfinite, evaluation, checkpoint]
        if run.checkpoints.keep_best or run.checkpoints.patience:
            best = hooks.BestHook(
                run.checkpoints,
                latest=evaluation.of_step,
                save=checkpoint.save,
                history=self._history(run.checkpoints.best_metric, first_step),
            )
            all_hooks.insert(-1, best)
        modules = (module for _, module in self.built.model_def.modules())
        if writer is not None and any(isinstance(module, Moe) for module in modules):
            all_hooks.append(
                hooks.ExpertLoadHook(
                    every=run.log_period, image_every=run.eval_period, writer=writer
                )
            )
        if run.profile.steps:
            profile = run.profile
            directory = self.model_dir / "train"
            all_hooks.append(hooks.ProfileHook(directory, start=profile.start, steps=profile.steps))
        return all_hooks

    def _evaluator(self, dataset: DatasetConfig) -> Callable[[TrainState], dict[str, float]]:
        rows = self.built.local_rows()

        def run_evaluation(state: TrainState) -> dict[str, float]:
            with contextlib.closing(dataset.build(rows=rows)) as batches:
                return evaluate(
                    self.built.eval_step,
                    state.params,
                    batches=batches,
                    place=self.built.place,
                    max_batches=self.run.eval_steps,
                )

        return run_evaluation

    def _text_evaluator(self, first_step: int) -> Callable[[TrainState], dict[str, Any]] | None:
        """state -> metrics of generated text, by task."""
        if self.generative is None:
            return None
        predictor, (subjects, groups) = self.generative
        assert self.run.inference_eval is not None
        evaluator = Evaluator(
            subjects,
            predictor=predictor,
            config=self.run.inference_eval,
            output_dir=self.model_dir / "inference_eval",
            first_step=first_step,
            groups=groups,
        )
        self.stack.callback(evaluator.close)
        return lambda state: evaluator.run(state.params, step=int(state.step))

    def _history(self, metric: str, first_step: int) -> list[float]:
        """Values of an eval metric that this directory had up to `first_step`, on all processes."""
        directory, _, scalar = metric.rpartition("/")
        for name, dataset in self.run.eval_datasets.items():
            if metric.startswith(f"{name}/"):
                directory = f"training_eval/{eval_name(dataset)}"
                scalar = metric.removeprefix(f"{name}/")
        lines = read_scalars(self.model_dir / directory)
        values = [line[scalar] for line in lines if scalar in line and line["step"] <= first_step]
        return multihost.process_allgather_json(values)[0]

    def _latest_state(self) -> tuple[TrainState, int] | None:
        """For the rewind policy: the latest saved state and its step."""
        self.checkpointer.wait()
        latest = self.checkpointer.latest_step()
        if latest is None:
            return None
        return self.checkpointer.restore(self.built.abstract_state, step=latest)[0], latest


def eval_name(dataset: DatasetConfig) -> str:
    """Directory of an eval set: the task's name, and the split where it is not validation."""
    name, split = dataset.mixture_or_task_name, dataset.split
    return name if split == "validation" else f"{name}-{split}"
