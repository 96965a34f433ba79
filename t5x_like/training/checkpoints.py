"""Orbax checkpoints of train state, data iterator and metadata under MODEL_DIR/checkpoints."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import logging
import math
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from t5x_like.errors import UserError
from t5x_like.interop.matching import check_match
from t5x_like.parallel import multihost
from t5x_like.training.state import TrainState

logger = logging.getLogger(__name__)

_VERSIONED = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "t5x_like")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are saved, which ones stay, and when more training does not pay.

    Attributes:
      period: steps between saves.
      keep: how many of the latest stay; None keeps all.
      keep_period: a checkpoint whose step is a multiple of it stays for ever.
      keep_best: how many of the best by `best_metric` stay besides the latest; an evaluation that
        is the best so far is saved, whatever `period` is.
      best_metric: name of an eval scalar, `<eval set>/<scalar>` such as `validation/loss` or
        `inference_eval/<task>/accuracy`, smaller being better unless `best_mode` is 'max'.
      patience: the run ends, saved, after so many evaluations in a row that are no better than the
        best before them (early stopping); None for never.
      allow_data_reset: start the data afresh, with a warning, where its state cannot be restored.

    A checkpoint directory that holds a file named PINNED is never deleted (T5X's habit).
    """

    period: int = 1000
    keep: int | None = 3
    keep_period: int | None = None
    keep_best: int = 0
    best_metric: str = "validation/loss"
    best_mode: str = "min"
    patience: int | None = None
    allow_data_reset: bool = False

    def __post_init__(self) -> None:
        for name in ("period", "keep", "keep_period", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"CheckpointConfig.{name} = {value}: it must be at least 1.")
        if self.best_mode not in ("min", "max"):
            raise UserError(f"CheckpointConfig.best_mode = {self.best_mode!r}: use 'min' or 'max'.")


@dataclasses.dataclass
class _Pinned(managers.PreservationPolicy):
    directory: Path

    def should_preserve(
        self,
        checkpoints: Sequence[managers.PolicyCheckpointInfo],
        *,
        context: managers.PreservationContext,
    ) -> Sequence[bool]:
        del context
        return [(self.directory / str(c.step) / "PINNED").exists() for c in checkpoints]


def _preservation(config: CheckpointConfig, directory: Path) -> managers.PreservationPolicy:
    policies: list[Any] = [managers.LatestN(config.keep), _Pinned(directory)]
    if config.keep_period:
        policies.append(managers.EveryNSteps(config.keep_period))
    if config.keep_best:
        policies.append(
            managers.BestN(
                get_metric_fn=functools.partial(_rank, config=config),
                reverse=config.best_mode == "min",
                n=config.keep_best,
                keep_checkpoints_without_metrics=False,
            )
        )
    return managers.AnyPreservationPolicy(policies)


def _rank(metrics: Mapping[str, float], *, config: CheckpointConfig) -> float:
    """A checkpoint's `best_metric`; the worst there can be if it has none, or it is NaN."""
    worst = math.inf if config.best_mode == "min" else -math.inf
    value = metrics.get(config.best_metric, worst)
    return worst if math.isnan(value) else value


class Checkpointer:
    """Saves and restores {state, data, metadata} asynchronously and atomically."""

    def __init__(self, model_dir: Path, config: CheckpointConfig) -> None:
        self.config = config
        self.directory = model_dir.absolute() / "checkpoints"
        self._manager = ocp.CheckpointManager(
            self.directory,
            # Named here so that a new process can read what a checkpoint says of its arrays.
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(),
                "data": ocp.JsonCheckpointHandler(),
                "metadata": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_preservation(config, self.directory),
                # Without it, metrics would not be written, and a restarted run would not know them.
                best_fn=functools.partial(_rank, config=config) if config.keep_best else None,
                best_mode=config.best_mode,
                cleanup_tmp_directories=True,
            ),
        )

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(
        self,
        state: TrainState,
        *,
        step: int,
        data_state: Mapping[str, Any],
        metadata: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts a save; the arrays are copied before this returns, the files follow.

        `data_state` is this process's own; the union over processes is written.
        """
        if step in self._manager.all_steps():
            return
        merged = merge_data_states(multihost.process_allgather_json(data_state))
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(state),
                data=ocp.args.JsonSave(merged),
                metadata=ocp.args.JsonSave(dict(metadata)),
            ),
            metrics=dict(metrics or {}) if self.config.keep_best else None,
        )

    def restore(
        self, abstract_state: TrainState, *, step: int
    ) -> tuple[TrainState, dict[str, Any]]:
        """Reads the state of `step`, onto the shardings of `abstract_state`, and its metadata.

        Raises:
          UserError: if the checkpoint holds other parameters than `abstract_state`.
        """
        stored = self._manager.item_metadata(step)["state"]
        shapes = {name: tuple(leaf.shape) for name, leaf in flatten(stored.tree).items()}
        wanted = flatten(abstract_state)
        with_state = [
            any(name.startswith("opt_state/") for name in names) for names in (shapes, wanted)
        ]
        if with_state == [False, True]:
            raise UserError(
                f"The checkpoint {self.directory / str(step)} holds parameters only, as `t5x_like "
                "convert` writes them: give its directory as INITIAL_CHECKPOINT_PATH and another "
                "MODEL_DIR."
            )
        check_match(shapes, wanted, what=str(self.directory / str(step)))
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract_state)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(abstract_state, restore_args=restore_args),
                metadata=ocp.args.JsonRestore(),
            ),
        )
        return restored["state"], restored["metadata"]

    def restore_data(self, iterator: Any, *, step: int) -> None:
        """Gives the data iterator the position it had at `step`.

        Raises:
          UserError: if that cannot be done and `allow_data_reset` is not set.
        """
        restored = self._manager.restore(step, args=ocp.args.Composite(data=ocp.args.JsonRestore()))
        try:
            iterator.set_state(restored["data"])
        except UserError as error:
            if not self.config.allow_data_reset:
                raise UserError(
                    f"The data position of checkpoint {self.directory / str(step)} cannot be "
                    f"restored: {error} Set CheckpointConfig.allow_data_reset = True to start the "
                    "data from its beginning."
                ) from error
            logger.warning("Data starts from its beginning: %s", error)

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()


def merge_data_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Union of the hosts' data states: `shards` merge, everything else is the same on all."""
    merged = dict(states[0])
    merged["shards"] = {}
    for state in states:
        merged["shards"].update(state.get("shards", {}))
    return merged


def run_metadata(*, gin: str, vocabularies: Mapping[str, Any], initial_step: int) -> dict[str, Any]:
    """What a checkpoint says of its making: operative gin, revision, vocabularies, versions.

    `initial_step` is the step that the run started from, which relative steps count from.
    """
    versions = {}
    for name in _VERSIONED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "gin": gin,
        "git_revision": _git_revision(),
        "vocabularies": dict(vocabularies),
        "versions": versions,
        "initial_step": initial_step,
    }


def _git_revision() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return result.stdout.strip() or "unknown"


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves by path, the same for a state and for Orbax's account of it in dicts and lists."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(_key_name(k) for k in path): leaf for path, leaf in flat}


def _key_name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
