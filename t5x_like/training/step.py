"""One training step: a pure function of state, global batch and key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PRNGKeyArray

from t5x_like.errors import UserError
from t5x_like.models.base import ModelDef
from t5x_like.objectives.auxiliary import (
    LOADS,
    auxiliaries_of,
    auxiliary_loss,
    auxiliary_metrics,
    load_metrics,
)
from t5x_like.parallel.logical import Rules, batch_sharding, constrain, use_rules
from t5x_like.training.balance import bias_rates, rebalance
from t5x_like.training.optimizers.base import Optimizer
from t5x_like.training.schedules import Schedule
from t5x_like.training.state import TrainState

PyTree = Any
Batch = Mapping[str, Array]
Metrics = dict[str, Float[Array, "..."]]
# A metric as (weighted sum, sum of weights): what microbatches and batches can add.
SummedMetrics = dict[str, tuple[Float[Array, ""], Float[Array, ""]]]
TrainStep = Callable[[TrainState, Batch, PRNGKeyArray], tuple[TrainState, Metrics]]
EvalStep = Callable[[PyTree, Batch], SummedMetrics]


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """How a step is carried out.

    Attributes:
      microbatches: parts that a global batch is computed in, one after another; 1 for all at once.
      skip_nonfinite: a step whose gradients are not all finite changes nothing but `step`.

    Raises:
      UserError: microbatches is not positive.
    """

    microbatches: int = 1
    skip_nonfinite: bool = False

    def __post_init__(self) -> None:
        if self.microbatches < 1:
            raise UserError(f"MICROBATCHES is {self.microbatches}: it must be at least 1.")


def make_train_step(
    model_def: ModelDef,
    objective: Any,
    optimizer: Optimizer,
    schedule: Schedule,
    step_config: StepConfig,
) -> TrainStep:
    """Returns (state, batch, key) -> (state, metrics); pure, to be compiled by `jit_train_step`.

    Loss and gradients are sums over all tokens of the global batch, divided once by the
    objective's normalizer of the whole batch, so microbatches and devices do not change them.
    Auxiliary losses of experts are added as `objectives.auxiliary` says, and balance biases moved.
    `key` is the run's; the step folds its number and that of the microbatch into it.

    Args:
      model_def: the model.
      objective: `loss(module, batch, *, dropout_key)` -> (summed loss, metrics as (sum, weight))
        and `normalizer(batch)`, all of them additive over rows.
      optimizer: a built optimizer.
      schedule: step -> learning rate.
      step_config: see there.

    Returns:
      A function whose metrics are float32 scalars (but `moe_loads/PATH`: tokens of every expert
      [layers, experts]): the objective's, each divided by its weight;
      `learning_rate`, the rate that was applied; `grad_norm`, the L2 norm of the gradients of all
      trained parameters before clipping; `param_norm`, that of all parameters after the step; and
      `nonfinite`, 1 if a gradient or the loss is not finite, else 0. (Every gradient element is
      in `grad_norm`, so one scalar tells.)
    """

    balance_rates = bias_rates(model_def)

    def train_step(
        state: TrainState, batch: Batch, key: PRNGKeyArray
    ) -> tuple[TrainState, Metrics]:
        trained, frozen = optimizer.split(state.params)
        normalizer = objective.normalizer(batch).astype(jnp.float32)
        divisor = jnp.where(normalizer == 0, 1.0, normalizer)  # a batch of padding changes nothing
        grad_info = optimizer.split(model_def.param_info)[0]

        def summed_grads(rows: Batch, dropout_key: PRNGKeyArray) -> tuple[PyTree, Any, Any]:
            def loss(trained: PyTree) -> tuple[Array, tuple[SummedMetrics, Any]]:
                module = model_def.bind(optimizer.merge(trained, frozen))
                value, metrics = objective.loss(module, rows, dropout_key=dropout_key)
                auxiliaries = auxiliaries_of(module)
                loads = {path: a.load for path, a in auxiliaries.items()}
                metrics = {**metrics, **auxiliary_metrics(auxiliaries)}
                return value + auxiliary_loss(auxiliaries, batch, divisor=divisor), (metrics, loads)

            (value, others), grads = jax.value_and_grad(loss, has_aux=True)(trained)
            return _like_stored(grads, grad_info), value, others

        step_key = jax.random.fold_in(key, state.step)
        sums = _accumulate(summed_grads, batch, step_key, step_config.microbatches)
        grads, loss, (summed, loads) = sums
        grads = jax.tree.map(lambda g: g / divisor, grads)

        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(loss)
        learning_rate = schedule(state.step)
        updates, opt_state = optimizer.update(
            grads, state.opt_state, trained, learning_rate=learning_rate
        )
        new_trained = optax.apply_updates(trained, updates)
        if step_config.skip_nonfinite:
            new_trained, opt_state = jax.tree.map(
                lambda new, old: jnp.where(finite, new, old),
                (new_trained, opt_state),
                (trained, state.opt_state),
            )
        params = optimizer.merge(new_trained, frozen)
        skipped = jnp.logical_and(step_config.skip_nonfinite, ~finite)
        params = rebalance(params, loads, balance_rates, keep=skipped)
        metrics = {
            **mean_metrics(summed),
            **load_metrics(loads),
            **{f"{LOADS}{path}": load for path, load in loads.items()},
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "param_norm": optax.tree.norm(params),
            "nonfinite": 1.0 - finite,
        }
        new_state = TrainState(step=state.step + 1, params=params, opt_state=opt_state)
        return new_state, {name: m.astype(jnp.float32) for name, m in metrics.items()}

    return train_step


def make_eval_step(model_def: ModelDef, objective: Any) -> EvalStep:
    """Returns (params, batch) -> metrics as (sum, weight), without dropout; pure."""

    def eval_step(params: PyTree, batch: Batch) -> SummedMetrics:
        module = model_def.bind(params)
        _, metrics = objective.loss(module, batch, dropout_key=None)
        auxiliaries = auxiliaries_of(module)
        loads = load_metrics({path: a.load for path, a in auxiliaries.items()})
        of_batch = {name: (value, jnp.float32(1)) for name, value in loads.items()}
        return {**metrics, **auxiliary_metrics(auxiliaries), **of_batch}

    return eval_step


def mean_metrics(summed: SummedMetrics) -> Metrics:
    """Returns sum / weight of each metric; 0 where the weight is 0."""
    return {
        name: jnp.where(weight == 0, 0.0, total / jnp.where(weight == 0, 1.0, weight))
        for name, (total, weight) in summed.items()
    }


def jit_train_step(
    train_step: TrainStep, *, mesh: Mesh, rules: Rules, shardings: TrainState
) -> Any:
    """Compiles a train step for a mesh. The state's memory is reused: it is gone after the call.

    Args:
      train_step: what `make_train_step` returned.
      mesh: the mesh.
      rules: the rules.
      shardings: what `state_shardings` returned.

    Returns:
      The `jax.jit` function (state, batch, key) -> (state, metrics), which can be lowered too.
    """
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.jit(
        _with_rules(train_step, mesh, rules),
        in_shardings=(shardings, batch_sharding(mesh, rules), whole),
        out_shardings=(shardings, whole),
        donate_argnums=0,
    )


def jit_eval_step(eval_step: EvalStep, *, mesh: Mesh, rules: Rules, shardings: TrainState) -> Any:
    """Compiles an eval step for a mesh; arguments as in `jit_train_step`."""
    return jax.jit(
        _with_rules(eval_step, mesh, rules),
        in_shardings=(shardings.params, batch_sharding(mesh, rules)),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
    )


def _with_rules(function: Callable[..., Any], mesh: Mesh, rules: Rules) -> Callable[..., Any]:
    def traced(*args: Any) -> Any:
        with use_rules(mesh, rules):
            return function(*args)

    return traced


def _accumulate(
    function: Callable[[Batch, PRNGKeyArray], PyTree],
    batch: Batch,
    key: PRNGKeyArray,
    microbatches: int,
) -> PyTree:
    """Sums `function(rows, key)` in float32 over microbatches, each with a key of its own."""

    def one(rows: Batch, index: Any) -> PyTree:
        out = function(rows, jax.random.fold_in(key, index))
        return jax.tree.map(lambda x: x.astype(jnp.float32), out)

    if microbatches == 1:
        return one(batch, 0)
    split = {name: _split_rows(x, microbatches) for name, x in batch.items()}

    def body(total: PyTree, scanned: tuple[Batch, Array]) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, one(*scanned)), None

    scanned = (split, jnp.arange(microbatches))
    shapes = jax.eval_shape(one, *jax.tree.map(lambda x: x[0], scanned))
    zero = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    return jax.lax.scan(body, zero, scanned)[0]


def _split_rows(x: Array, microbatches: int) -> Array:
    """[B, ...] -> [microbatches, B / microbatches, ...]; row r goes to microbatch r % microbatches.

    A device holds consecutive rows, so every microbatch gets its share of them and no row moves.
    """
    batch_size, *rest = x.shape
    if batch_size % microbatches:
        raise UserError(
            f"BATCH_SIZE {batch_size} is not divisible by MICROBATCHES {microbatches}: "
            "change one of them."
        )
    x = x.reshape(batch_size // microbatches, microbatches, *rest).swapaxes(0, 1)
    return constrain(x, (None, "batch", *[None] * len(rest)))


def _like_stored(grads: PyTree, grad_info: PyTree) -> PyTree:
    """Lays gradients out like their parameters, so that no device holds or adds up all of one."""
    return jax.tree.map(
        lambda grad, info: constrain(grad, info.logical_axes, table="storage"), grads, grad_info
    )
