"""Hooks of the training loop: log, evaluate, checkpoint, profile, non-finite policy, preemption.

Order matters and `training.run` sets it: a non-finite loss is seen before it is saved, and an
evaluation before the checkpoint that is ranked by it.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import resource
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from t5x_like.errors import UserError, did_you_mean
from t5x_like.objectives.auxiliary import LOADS
from t5x_like.training.checkpoints import CheckpointConfig, Checkpointer
from t5x_like.training.loop import Rewind, StepInfo, Stop
from t5x_like.training.metrics import MetricWriter
from t5x_like.training.progress import Progress
from t5x_like.training.state import TrainState

logger = logging.getLogger(__name__)

Scalars = dict[str, float]
PREEMPTED = 75


def to_floats(metrics: Mapping[str, jax.Array]) -> Scalars:
    """Device scalars as Python floats (waits for the device); other arrays are left out."""
    scalars = {name: value for name, value in metrics.items() if not jnp.ndim(value)}
    return {name: float(value) for name, value in jax.device_get(scalars).items()}


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepCost:
    """What the timing scalars divide: positions, targets and FLOPs of one global batch."""

    tokens: int
    target_tokens: int
    flops: float
    peak_flops: float | None


class LogHook:
    """Writes the scalars of every `every`-th step, one step late, and shows progress."""

    def __init__(
        self,
        *,
        every: int,
        cost: StepCost,
        total_steps: int,
        writer: MetricWriter | None,
        progress: Progress | None,
    ) -> None:
        self._every, self._cost, self._total = every, cost, total_steps
        self._writer, self._progress = writer, progress
        self._logged = -1
        self._restart_clock(time.perf_counter(), step=0)

    def _restart_clock(self, now: float, *, step: int) -> None:
        self._start, self._timed_step = now, step
        self._waited = self._paused = 0.0

    def pause(self, seconds: float) -> None:
        """Leaves `seconds` (an evaluation, a save) out of the timing."""
        self._paused += seconds

    def __call__(self, info: StepInfo) -> None:
        if info.metrics is None:
            self._restart_clock(time.perf_counter(), step=info.step)
            return
        self._waited += info.data_seconds
        if info.previous:
            self.flush(*info.previous)
        if info.last:
            self.flush(info.step, info.metrics, last=True)

    def flush(self, step: int, metrics: Mapping[str, jax.Array], *, last: bool = False) -> None:
        """Logs `step` now if it is to be logged and was not yet (waits for its metrics).

        A checkpoint calls this first: a run killed after the save would else lose the line.
        """
        if step == self._logged or not (last or _due(step, self._every)):
            return
        self._logged = step
        scalars = to_floats(metrics) | self._timing(step)
        if self._writer:
            self._writer.scalars(step, scalars)
        if self._progress:
            self._progress.show(step, self._total, scalars)

    def _timing(self, step: int) -> Scalars:
        """Means over the steps since the last call; the device works on while they are written."""
        now = time.perf_counter()
        elapsed = max(now - self._start - self._paused, 1e-9)
        seconds = elapsed / max(step - self._timed_step, 1)
        devices = jax.device_count()
        scalars = {
            "timing/seconds_per_step": seconds,
            "timing/target_tokens_per_second": self._cost.target_tokens / seconds,
            "timing/tokens_per_second_per_device": self._cost.tokens / seconds / devices,
            "timing/tflops_per_second_per_device": self._cost.flops / seconds / devices / 1e12,
            "timing/data_wait_fraction": min(self._waited / elapsed, 1.0),
            "memory/peak_gib": peak_gib(),
        }
        if self._cost.peak_flops:
            scalars["timing/mfu"] = self._cost.flops / seconds / devices / self._cost.peak_flops
        self._restart_clock(now, step=step)
        return scalars


def peak_gib() -> float:
    """Peak memory of the first device, or of this process where the device does not say."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class EvalHook:
    """Every evaluation: at the start of a new run, on period, and at the end.

    `latest` holds their scalars as `<name>/<scalar>`. What evaluates text writes its own files.
    """

    def __init__(
        self,
        *,
        every: int,
        at_start: bool,
        evaluate: Mapping[str, Callable[[TrainState], Scalars]],
        evaluate_text: Callable[[TrainState], Mapping[str, Scalars]] | None = None,
        writers: Mapping[str, MetricWriter],
        pause: Callable[[float], None],
        progress: Progress | None,
    ) -> None:
        self._every, self._at_start = every, at_start
        self._evaluate, self._evaluate_text, self._writers = evaluate, evaluate_text, writers
        self._pause, self._progress = pause, progress
        self.latest: Scalars = {}
        self._evaluated_at = -1

    def of_step(self, step: int) -> Scalars:
        """The scalars of the evaluation at `step`; none if there was none."""
        return self.latest if step == self._evaluated_at else {}

    def __call__(self, info: StepInfo) -> None:
        first = info.metrics is None and self._at_start
        due = info.metrics is not None and (_due(info.step, self._every) or info.last)
        if not (first or due) or self._evaluated_at == info.step:
            return
        jax.block_until_ready(info.state.params)
        start = time.perf_counter()
        self._evaluated_at = info.step
        for name, evaluate in self._evaluate.items():
            scalars = evaluate(info.state)
            if name in self._writers:
                self._writers[name].scalars(info.step, scalars)
            self._note(name, info.step, scalars)
        if self._evaluate_text:
            for name, scalars in self._evaluate_text(info.state).items():
                self._note(f"inference_eval/{name}", info.step, scalars)
        self._pause(time.perf_counter() - start)

    def _note(self, name: str, step: int, scalars: Scalars) -> None:
        self.latest |= {f"{name}/{key}": value for key, value in scalars.items()}
        if self._progress:
            self._progress.note(f"eval {name} at step {step}: {_short(scalars)}")


def _short(scalars: Scalars) -> str:
    """Loss and accuracy of the objective, or all metrics of generated text."""
    names = ("loss", "accuracy") if "loss" in scalars else tuple(scalars)
    return ", ".join(f"{k} {scalars[k]:.4f}" for k in names if k in scalars)


class ExpertLoadHook:
    """Shows the load of every expert over time as an image: time to the right, experts down.

    A column is a logged step since this process started, a band of rows a layer. Black stands
    for no tokens, mid grey for an equal share, white for twice that or more. Metrics are kept on
    the device until an image is due.
    """

    def __init__(self, *, every: int, image_every: int, writer: MetricWriter) -> None:
        self._every, self._image_every, self._writer = every, image_every, writer
        self._kept: list[dict[str, jax.Array]] = []
        self._columns: dict[str, list[np.ndarray]] = {}

    def __call__(self, info: StepInfo) -> None:
        if info.metrics is None:
            return
        if _due(info.step, self._every) or info.last:
            named = info.metrics.items()
            self._kept.append({n: m for n, m in named if n.startswith(LOADS)})
        if not (_due(info.step, self._image_every) or info.last):
            return
        for loads in jax.device_get(self._kept):
            for name, load in loads.items():
                share = load / np.maximum(load.mean(axis=1, keepdims=True), 1e-9)
                self._columns.setdefault(name, []).append(share.reshape(-1))
        self._kept = []
        for name, columns in self._columns.items():
            path = name.removeprefix(LOADS)
            shares = np.stack(columns, axis=1)
            grey = np.clip(shares * 127.5, 0, 255).astype(np.uint8)
            self._writer.image(info.step, f"moe/{path}/expert_load", grey)


class NonFiniteHook:
    """What a loss or gradient norm that is not finite leads to.

    halt: stop with an error, the state not saved. skip: the step itself leaves parameters and
    optimizer state alone (`StepConfig.skip_nonfinite`); counted here. rewind: go back to the
    latest checkpoint and go on with the data that follows, at most `max_rewinds` times.
    """

    def __init__(
        self,
        policy: str,
        *,
        restore: Callable[[], tuple[TrainState, int] | None],
        max_rewinds: int = 3,
    ) -> None:
        self._policy, self._restore, self._left = policy, restore, max_rewinds
        self.count = 0

    def __call__(self, info: StepInfo) -> None:
        if info.previous:
            self.check(*info.previous)
        if info.last and info.metrics:
            self.check(info.step, info.metrics)

    def check(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Applies the policy to the metrics of one step (waits for them)."""
        loss, grad_norm = float(metrics["loss"]), float(metrics["grad_norm"])
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return
        self.count += 1
        text = f"step {step}: loss {loss}, grad_norm {grad_norm} (not finite)"
        if self._policy == "skip":
            logger.warning("%s; its update was skipped (%d so far)", text, self.count)
            return
        restored = self._restore() if self._policy == "rewind" and self._left else None
        if restored is None:
            raise UserError(
                f"{text}. Lower the learning rate, or set TrainRun.nan_policy to 'skip' or "
                "'rewind'; the latest checkpoint is from before it."
            )
        self._left -= 1
        logger.warning("%s; back to the checkpoint of step %d", text, restored[1])
        raise Rewind(*restored)


class Preemption:
    """Tells, at the same step on every process, that the job was told to stop by SIGTERM."""

    def __init__(self) -> None:
        self._received = False
        # With several processes JAX's own notifier listens, and agrees on a step among them.
        self._alone = jax.process_count() == 1
        if self._alone:
            signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, *_: Any) -> None:
        self._received = True

    def __call__(self, step: int) -> bool:
        if self._alone:
            return self._received
        return multihost_utils.reached_preemption_sync_point(step)


class CheckpointHook:
    """Saves every `period` steps, at the first and last step, and when told to stop by SIGTERM."""

    def __init__(
        self,
        checkpointer: Checkpointer,
        *,
        metadata: Mapping[str, Any],
        before_save: Sequence[Callable[[int, Mapping[str, jax.Array]], None]],
        latest_eval: Callable[[int], Scalars],
        pause: Callable[[float], None],
    ) -> None:
        self._checkpointer, self._metadata = checkpointer, metadata
        self._before_save, self._latest_eval, self._pause = before_save, latest_eval, pause
        self._preempted = Preemption()

    def __call__(self, info: StepInfo) -> None:
        preempted = self._preempted(info.step)
        if (
            preempted
            or info.last
            or _due(info.step, self._checkpointer.config.period)
            or (info.metrics is None and self._checkpointer.latest_step() is None)
        ):
            self.save(info)
        if preempted:
            self._checkpointer.wait()
            raise Stop(f"preempted: saved at step {info.step}", exit_code=PREEMPTED)

    def save(self, info: StepInfo) -> None:
        """Saves the state of this step, unless that is done."""
        if info.metrics is not None:
            for act in self._before_save:
                act(info.step, info.metrics)
        start = time.perf_counter()
        self._checkpointer.save(
            info.state,
            step=info.step,
            data_state=info.data.get_state(),
            metadata=self._metadata,
            metrics=self._latest_eval(info.step),
        )
        self._pause(time.perf_counter() - start)


class BestHook:
    """Sees to what depends on the best evaluation so far: that it is saved, and early stopping.

    It runs before the hook that saves: a metric that is not there must not get into a checkpoint.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        *,
        latest: Callable[[int], Scalars],
        save: Callable[[StepInfo], None],
        history: Sequence[float],
    ) -> None:
        """`latest`: step -> scalars of its evaluation, none if there was none at that step.

        `history`: values of `best_metric` that a former run of the same directory had.
        """
        self._config, self._latest, self._save = config, latest, save
        self._best: float | None = None
        self._since = 0
        for value in history:
            self._is_best(value)

    def __call__(self, info: StepInfo) -> None:
        scalars = self._latest(info.step)
        metric, patience = self._config.best_metric, self._config.patience
        if scalars:
            if metric not in scalars:
                raise UserError(
                    f"CheckpointConfig.best_metric '{metric}' is no metric of this run's "
                    f"evaluations.{did_you_mean(metric, scalars)} There are: "
                    f"{', '.join(sorted(scalars))}."
                )
            is_best = self._is_best(scalars[metric])
            if is_best and self._config.keep_best and info.metrics is not None:
                self._save(info)
        if patience is not None and self._since >= patience:
            self._save(info)
            raise Stop(
                f"early stopping at step {info.step}: {metric} was no better than "
                f"{self._best:.6g} in {self._since} evaluations"
            )

    def _is_best(self, value: float) -> bool:
        better = self._best is None or math.isnan(self._best)
        if self._best is not None and not better:
            gain = value - self._best
            better = gain > 0 if self._config.best_mode == "max" else gain < 0
        self._best = value if better else self._best
        self._since = 0 if better else self._since + 1
        return better


class ProfileHook:
    """Writes a profiler trace of steps [start, start + steps) for TensorBoard's profile tab."""

    def __init__(self, directory: Path, *, start: int, steps: int) -> None:
        self._directory, self._start, self._stop = directory, start, start + steps
        self._running = False

    def __call__(self, info: StepInfo) -> None:
        if info.step == self._start and not self._running and not info.last:
            jax.profiler.start_trace(str(self._directory))
            self._running = True
        elif self._running and (info.step >= self._stop or info.last):
            jax.block_until_ready(info.metrics)
            jax.profiler.stop_trace()
            self._running = False
