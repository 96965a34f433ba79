"""INITIAL_CHECKPOINT_PATH: our own checkpoints, T5X's, and what is neither."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from t5x_like.errors import UserError
from t5x_like.interop.initial import initial_step, load_initial_params
from t5x_like.interop.matching import check_match
from t5x_like.interop.t5x_legacy import load_t5x_checkpoint, to_stacked
from tests.interop.tree_info import Info, stacked_info


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    step: Any
    params: Any
    opt_state: Any


INFO = {
    "a": {"kernel": Info((8, 4), np.float32, ("embed", "mlp"))},
    "b": Info((3,), np.float32, (None,)),
}


def make_params(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return {"a": {"kernel": rng.normal(size=(8, 4)).astype(np.float32)}, "b": np.ones(3, "f4")}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model_dir")
    with ocp.CheckpointManager(directory / "checkpoints") as manager:
        for step in (5, 10):
            params = jax.tree.map(jnp.asarray, make_params(step))
            opt_state = (params, {"count": jnp.zeros((), jnp.int32)})
            state = State(step=jnp.int32(step), params=params, opt_state=opt_state)
            args = ocp.args.Composite(
                state=ocp.args.PyTreeSave(state), data=ocp.args.JsonSave({"shards": {}})
            )
            manager.save(step, args=args)
    return directory


@pytest.mark.parametrize(
    ("below", "step"), [("", 10), ("checkpoints", 10), ("checkpoints/5", 5), ("checkpoints/10", 10)]
)
def test_own_checkpoint(model_dir: Path, below: str, step: int) -> None:
    loaded = load_initial_params(model_dir / below, INFO)
    jax.tree.map(np.testing.assert_array_equal, loaded, make_params(step))
    assert isinstance(loaded["b"], np.ndarray)
    assert initial_step(str(model_dir / below)) == step


def test_own_checkpoint_cast_to_the_models_dtype(model_dir: Path) -> None:
    info = jax.tree.map(lambda i: dataclasses.replace(i, dtype=ml_dtypes.bfloat16), INFO)
    loaded = load_initial_params(model_dir, info)
    expected = make_params(10)["a"]["kernel"].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(loaded["a"]["kernel"], expected)


def test_onto_devices(model_dir: Path, oracle_dir: Path) -> None:
    mesh = jax.make_mesh((4,), ("fsdp",), devices=jax.devices()[:4])
    sharded = jax.NamedSharding(mesh, jax.P("fsdp"))
    replicated = jax.NamedSharding(mesh, jax.P())
    shardings = {"a": {"kernel": sharded}, "b": replicated}
    loaded = load_initial_params(model_dir, INFO, shardings=shardings)
    assert jax.tree.map(lambda x: x.sharding, loaded) == shardings
    jax.tree.map(np.testing.assert_array_equal, loaded, make_params(10))

    legacy = oracle_dir / "t5_1_1_tiny/legacy_bf16"
    tree = load_t5x_checkpoint(legacy).params
    info = stacked_info(tree)
    shardings = jax.tree.map(lambda i: sharded if i.shape[0] % 4 == 0 else replicated, info)
    loaded = load_initial_params(legacy, info, shardings=shardings)
    assert loaded["token_embedder"]["embedding"].sharding == sharded
    jax.tree.map(np.testing.assert_array_equal, loaded, to_stacked(tree, info))


@pytest.mark.parametrize("layout", ["legacy", "legacy_multichunk", "orbax"])
def test_t5x(oracle_dir: Path, layout: str) -> None:
    tree = load_t5x_checkpoint(oracle_dir / "t5_1_1_tiny/legacy/checkpoint_20").params
    info = stacked_info(tree)
    loaded = load_initial_params(oracle_dir / "t5_1_1_tiny" / layout, info)
    jax.tree.map(np.testing.assert_array_equal, loaded, to_stacked(tree, info))


def test_another_model(model_dir: Path) -> None:
    info = {"a": {"kernel": Info((8, 5), np.float32, ("embed", "mlp"))}, "c": INFO["b"]}
    with pytest.raises(UserError) as error:
        load_initial_params(model_dir, info)
    assert str(error.value) == (
        f"The checkpoint '{model_dir}/checkpoints/10' is of another model: missing c (3,); not in "
        "the model b (3,); a/kernel is (8, 4) there, (8, 5) in the model."
    )


def test_a_long_list_of_differences_is_cut() -> None:
    """Another optimizer differs in hundreds of names: an error of 12 kB is no help."""
    wanted = {f"opt_state/mu/{i:03}": Info((1,), np.float32, (None,)) for i in range(200)}
    with pytest.raises(UserError, match="and 192 more like that") as error:
        check_match({}, wanted)
    assert "opt_state/mu/000" in str(error.value) and len(str(error.value)) < 500


# Orbax's other reads fail a moment after the first, when their event loop is gone.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("part", ["_METADATA", "manifest.ocdbt", "d/*"])
def test_own_checkpoint_damaged(model_dir: Path, tmp_path: Path, part: str) -> None:
    copy = tmp_path / "10"
    shutil.copytree(model_dir / "checkpoints/10", copy)
    for victim in (copy / "state").glob(part):
        victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    with pytest.raises(UserError, match="cannot be read") as error:
        load_initial_params(copy, INFO)
    assert "\n" not in str(error.value)


def test_unknown_kinds(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")  # Without its config.json.
    with pytest.raises(UserError, match=r"has no checkpoint.*known kinds: t5x_like .*T5X legacy"):
        load_initial_params(tmp_path, INFO)
    with pytest.raises(UserError, match=r"INITIAL_CHECKPOINT_PATH '.*' is no directory"):
        initial_step(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="is no directory"):
        load_initial_params(tmp_path / "absent", INFO)
