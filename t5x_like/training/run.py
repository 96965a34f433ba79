"""A training run: its configuration, and how it is built.

`TrainRun` is what gin binds. `build` turns it into a mesh, a jitted step and abstract state; it
spends no memory on arrays and touches no file, so that a dry run can stop there.
`training.session` carries a run out.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from t5x_like.data.dataset import DatasetConfig
from t5x_like.errors import UserError
from t5x_like.evaluation.inference_eval import InferenceEval
from t5x_like.layers.parameter import activation_dtype
from t5x_like.models.base import ModelConfig, ModelDef
from t5x_like.objectives.token_loss import TokenLoss
from t5x_like.parallel import logical
from t5x_like.parallel.mesh import MeshConfig
from t5x_like.training import flops, hooks
from t5x_like.training.checkpoints import CheckpointConfig
from t5x_like.training.optimizers.base import Optimizer, OptimizerConfig, ParameterGroup
from t5x_like.training.schedules import ScheduleConfig
from t5x_like.training.state import TrainState, state_shapes, state_shardings
from t5x_like.training.step import (
    StepConfig,
    jit_eval_step,
    jit_train_step,
    make_eval_step,
    make_train_step,
)

NAN_POLICIES = ("halt", "skip", "rewind")


# What the targets of a batch are called, by kind of model.
_TARGETS = ("decoder_target_tokens", "encoder_target_tokens", "class_labels")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Profiles steps [start, start + steps); `steps` = 0 profiles nothing."""

    start: int = 10
    steps: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainRun:
    """Everything that a training run is made of. See gin/runs/pretrain.gin.

    Attributes:
      model_dir: where everything is written; see DESIGN for its files.
      eval_datasets: name -> dataset of the teacher-forced evaluations.
      total_steps: step at which the run ends, counted from scratch.
      relative_steps: instead, steps beyond the initial checkpoint's.
      initial_checkpoint_path: parameters to start from: ours, T5X's or Hugging Face's.
      assignment_map: which of these to take, as (pattern, replacement): a parameter whose whole
        path matches the regular expression comes from the path that the replacement makes, or
        keeps its fresh values where that is None; the first match counts. What matches nothing
        comes from its own path, and the rest of the checkpoint is left (T5X's map of that name).
        None: the checkpoint must be of this model, neither more nor less.
      upcycle: the checkpoint is of the dense twin of a model with experts: "params" takes its
        parameters, "state" its optimizer's state too; see `training.upcycle`.
      frozen: regular expressions; parameters whose whole path matches one are not trained and
        have no optimizer state.
      inference_eval: the evaluations of generated text, on the same steps as the others.
      eval_steps: batches of each evaluation; None for the whole split.
      nan_policy: what a loss that is not finite leads to: halt, skip or rewind.
    """

    model_dir: str
    model: ModelConfig
    objective: TokenLoss
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    train_dataset: DatasetConfig
    mesh: MeshConfig
    rules: logical.Rules
    total_steps: int | None = None
    eval_datasets: Mapping[str, DatasetConfig] = dataclasses.field(default_factory=dict)
    step: StepConfig = dataclasses.field(default_factory=StepConfig)
    checkpoints: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    relative_steps: int | None = None
    initial_checkpoint_path: str | None = None
    assignment_map: Sequence[tuple[str, str | None]] | None = None
    upcycle: Literal["params", "state"] | None = None
    frozen: Sequence[str] = ()
    inference_eval: InferenceEval | None = None
    random_seed: int = 0
    log_period: int = 100
    eval_period: int = 1000
    eval_steps: int | None = 20
    nan_policy: str = "halt"
    profile: ProfileConfig = dataclasses.field(default_factory=ProfileConfig)

    def __post_init__(self) -> None:
        for name in ("total_steps", "relative_steps", "log_period", "eval_period"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"TrainRun.{name} = {value}: it must be at least 1.")
        if self.total_steps is None and self.relative_steps is None:
            raise UserError(
                "TrainRun.total_steps and relative_steps are both None: set TRAIN_STEPS, or "
                "TRAIN_STEPS_RELATIVE to count from INITIAL_CHECKPOINT_PATH's step."
            )
        if self.nan_policy not in NAN_POLICIES:
            raise UserError(
                f"TrainRun.nan_policy = {self.nan_policy!r}: use one of {', '.join(NAN_POLICIES)}."
            )
        if self.upcycle and (self.assignment_map is not None or not self.initial_checkpoint_path):
            raise UserError(
                f"UPCYCLE is {self.upcycle!r}: it goes with INITIAL_CHECKPOINT_PATH, which is "
                f"{self.initial_checkpoint_path!r}, and without ASSIGNMENT_MAP."
            )
        if self.initial_checkpoint_path:
            path = os.path.expanduser(self.initial_checkpoint_path)
            object.__setattr__(self, "initial_checkpoint_path", path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Built:
    """A run's parts before any memory is spent on its state.

    Attributes:
      abstract_state: shapes, dtypes and shardings of the train state.
      abstract_batch: the same of a global batch.
      train_step: jitted (state, batch, key) -> (state, metrics); donates the state.
      eval_step: jitted (params, batch) -> name -> (sum, weight).
    """

    run: TrainRun
    mesh: jax.sharding.Mesh
    model_def: ModelDef
    optimizer: Optimizer
    abstract_state: TrainState
    abstract_batch: Mapping[str, jax.ShapeDtypeStruct]
    train_step: Any
    eval_step: Any

    @property
    def compute_dtype(self) -> np.dtype:
        return activation_dtype(self.run.model.dtype)

    def place(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's rows -> the global batch on the mesh."""
        size = self.run.train_dataset.batch_size
        return logical.to_global(self.mesh, self.run.rules, batch, size)

    def local_rows(self) -> list[int]:
        """Rows of the global batch that this process delivers."""
        size = self.run.train_dataset.batch_size
        return logical.local_rows(self.mesh, self.run.rules, size).tolist()

    def cost(self) -> hooks.StepCost:
        """Positions, targets and FLOPs of a global batch, by the rule of `training.flops`."""
        shapes = {name: leaf.shape for name, leaf in self.abstract_batch.items()}
        sizes = {n: int(np.prod(s)) for n, s in shapes.items() if n.endswith("_input_tokens")}
        return hooks.StepCost(
            tokens=sum(sizes.values()),
            target_tokens=next(int(np.prod(shapes[n])) for n in _TARGETS if n in shapes),
            flops=flops.training_flops(self.model_def, shapes),
            peak_flops=flops.peak_flops(self.mesh.devices.flat[0], self.compute_dtype),
        )


def optimizer_of(run: TrainRun, model_def: ModelDef) -> Optimizer:
    """The optimizer of a run, for a model."""
    frozen = [ParameterGroup(pattern=pattern, frozen=True) for pattern in run.frozen]
    groups = (*frozen, *run.optimizer.groups)
    return dataclasses.replace(run.optimizer, groups=groups).build(model_def.param_info)


def build(run: TrainRun, *, devices: Sequence[jax.Device] | None = None) -> Built:
    """Builds mesh, model, steps and abstract state of a run; touches no file.

    Raises:
      UserError: a mesh, batch or rule that does not fit the model or the devices.
    """
    mesh = run.mesh.build(devices)
    model_def = ModelDef(run.model)
    optimizer = optimizer_of(run, model_def)
    shardings = state_shardings(model_def, optimizer, mesh, run.rules)
    logical.local_rows(mesh, run.rules, run.train_dataset.batch_size)
    step_config = dataclasses.replace(
        run.step, skip_nonfinite=run.step.skip_nonfinite or run.nan_policy == "skip"
    )
    train_step = make_train_step(
        model_def, run.objective, optimizer, run.schedule.build(), step_config
    )
    layout: dict[str, Any] = {"mesh": mesh, "rules": run.rules, "shardings": shardings}
    batch = logical.batch_sharding(mesh, run.rules)
    built = Built(
        run=run,
        mesh=mesh,
        model_def=model_def,
        optimizer=optimizer,
        abstract_state=jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            state_shapes(model_def, optimizer),
            shardings,
        ),
        abstract_batch={
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=batch)
            for name, (shape, dtype) in run.train_dataset.element_spec.items()
        },
        train_step=jit_train_step(train_step, **layout),
        eval_step=jit_eval_step(make_eval_step(model_def, run.objective), **layout),
    )
    # Traced here, which compiling uses again: microbatches or activations may not fit the mesh.
    key = jax.eval_shape(lambda: jax.random.key(0))
    built.train_step.eval_shape(built.abstract_state, built.abstract_batch, key)
    return built
