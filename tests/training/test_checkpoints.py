"""Checkpoints: exact round trip, what stays, what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from t5x_like.errors import UserError
from t5x_like.training.checkpoints import CheckpointConfig, Checkpointer, merge_data_states
from t5x_like.training.state import TrainState


def state_of(value: float, width: int = 3) -> TrainState:
    return TrainState(
        step=jnp.int32(value),
        params={"a": {"kernel": jnp.full((2, width), value)}},
        opt_state={"m": {"a": {"kernel": jnp.full((2, 1), value)}}, "count": jnp.int32(value)},
    )


def abstract(state: TrainState) -> TrainState:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def save(checkpointer: Checkpointer, step: int, **metrics: float) -> None:
    checkpointer.save(
        state_of(step),
        step=step,
        data_state={"shards": {"0": step}},
        metadata={"gin": "x"},
        metrics={f"validation/{k}": v for k, v in metrics.items()},
    )
    checkpointer.wait()


class Position:
    def __init__(self, refuse=False):
        self.refuse, self.state = refuse, None

    def set_state(self, state):
        if self.refuse:
            raise UserError("it is of another task.")
        self.state = state


def test_round_trip_is_exact(tmp_path):
    checkpointer = Checkpointer(tmp_path, CheckpointConfig())
    save(checkpointer, 7)
    checkpointer.close()
    checkpointer = Checkpointer(tmp_path, CheckpointConfig())  # As a restarted process has it.
    restored, metadata = checkpointer.restore(abstract(state_of(0)), step=7)
    for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(state_of(7)), strict=True):
        np.testing.assert_array_equal(got, want)
        assert got.dtype == want.dtype
    assert metadata == {"gin": "x"}
    position = Position()
    checkpointer.restore_data(position, step=7)
    assert position.state["shards"] == {"0": 7}
    checkpointer.close()


def test_keep_latest_period_best_and_pinned(tmp_path):
    config = CheckpointConfig(keep=1, keep_period=4, keep_best=1)
    checkpointer = Checkpointer(tmp_path, config)
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 5.0), (5, 4.0), (6, 9.0)):
        save(checkpointer, step, loss=loss)
        if step == 2:  # A restarted process knows which is the best, too.
            checkpointer.close()
            checkpointer = Checkpointer(tmp_path, config)
        if step == 3:
            (tmp_path / "checkpoints" / "3" / "PINNED").touch()
    checkpointer.close()
    left = {int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()}
    assert left == {2, 3, 4, 6}  # Best, pinned, period, latest.


def test_another_model_is_refused_by_name_and_both_shapes(tmp_path):
    checkpointer = Checkpointer(tmp_path, CheckpointConfig())
    save(checkpointer, 1)
    with pytest.raises(UserError, match=r"params/a/kernel is \(2, 3\) there, \(2, 5\)"):
        checkpointer.restore(abstract(state_of(0, width=5)), step=1)
    checkpointer.close()


def test_a_converted_checkpoint_is_no_run_to_go_on_with(tmp_path):
    state = state_of(1)
    tree = {"params": {"w": np.zeros((2, 3), np.float32)}, "step": np.int32(0)}
    handlers = {"state": ocp.PyTreeCheckpointHandler()}
    with ocp.CheckpointManager(tmp_path / "checkpoints", item_handlers=handlers) as manager:
        manager.save(0, args=ocp.args.Composite(state=ocp.args.PyTreeSave(tree)))
    checkpointer = Checkpointer(tmp_path, CheckpointConfig())
    with pytest.raises(UserError, match=r"holds parameters only.*as INITIAL_CHECKPOINT_PATH"):
        checkpointer.restore(abstract(state), step=0)
    checkpointer.close()


def test_data_position_is_never_reset_silently(tmp_path, caplog):
    checkpointer = Checkpointer(tmp_path, CheckpointConfig())
    save(checkpointer, 1)
    with pytest.raises(UserError, match=r"another task.*allow_data_reset = True"):
        checkpointer.restore_data(Position(refuse=True), step=1)
    checkpointer.close()
    lenient = Checkpointer(tmp_path, CheckpointConfig(allow_data_reset=True))
    lenient.restore_data(Position(refuse=True), step=1)
    assert "Data starts from its beginning" in caplog.text
    lenient.close()


def test_states_of_hosts_merge_by_shard():
    merged = merge_data_states([{"t": 3, "shards": {"0": 1}}, {"t": 3, "shards": {"1": 2}}])
    assert merged == {"t": 3, "shards": {"0": 1, "1": 2}}


def test_checkpoints_without_the_metric_are_not_the_best(tmp_path):
    config = CheckpointConfig(keep=1, keep_best=1, best_mode="max")
    checkpointer = Checkpointer(tmp_path, config)
    save(checkpointer, 1, loss=1.0)
    save(checkpointer, 2, loss=float("nan"))
    save(checkpointer, 3)
    save(checkpointer, 4, loss=0.5)
    checkpointer.close()
    left = {int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()}
    assert left == {1, 4}


@pytest.mark.parametrize("field", ["period", "keep", "keep_period", "patience"])
def test_zero_is_refused(field):
    with pytest.raises(UserError, match=field):
        CheckpointConfig(**{field: 0})
