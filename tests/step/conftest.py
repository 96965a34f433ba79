"""A tiny T5 1.1, the shipped sharding rules, and T5X's recorded training runs of that T5."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from t5x_like.interop.t5x_legacy import load_t5x_checkpoint, to_stacked
from t5x_like.layers.attention import AttentionConfig
from t5x_like.layers.mlp import MlpConfig
from t5x_like.layers.positions import RelativePositionsConfig
from t5x_like.models.base import ModelDef
from t5x_like.models.block import BlockConfig
from t5x_like.models.encoder_decoder import EncoderDecoderConfig
from t5x_like.parallel.logical import Rules
from t5x_like.parallel.mesh import MeshConfig
from t5x_like.training.state import TrainState, state_shapes, state_shardings
from t5x_like.training.step import StepConfig, jit_train_step, make_train_step

TENSOR_AXES = dict.fromkeys(("vocab", "heads", "kv_heads", "mlp"), "tensor")
WHOLE_AXES = dict.fromkeys(("layers", "relpos_buckets", "positions", "length", "head_dim"))
RULES = Rules(
    storage={**WHOLE_AXES, **TENSOR_AXES, "embed": "fsdp"},
    compute={**WHOLE_AXES, **TENSOR_AXES, "embed": None, "batch": ("data", "fsdp", "expert")},
)
VOCAB_SIZE = 256
KEY = np.array([0, 7], np.uint32)


def tiny_model(*, num_heads: int = 4, dropout_rate: float = 0.0) -> ModelDef:
    return ModelDef(
        EncoderDecoderConfig(
            vocab_size=VOCAB_SIZE,
            num_encoder_layers=2,
            num_decoder_layers=2,
            block=BlockConfig(
                embed_dim=32,
                attention=AttentionConfig(num_heads=num_heads, head_dim=32 // num_heads),
                mlp=MlpConfig(mlp_dim=64),
                dropout_rate=dropout_rate,
            ),
            positions=RelativePositionsConfig(),
            dtype="float32",
        )
    )


def random_batch(seed: int, *, rows: int = 8, lengths: tuple[int, int] = (12, 8)) -> dict[str, Any]:
    """A batch whose rows have very different numbers of target tokens (row 0 has one)."""
    rng = np.random.default_rng(seed)
    batch = {}
    for name, length in zip(("encoder_input", "decoder_target"), lengths, strict=True):
        real = np.arange(length) < np.maximum(1, np.linspace(0, length, rows))[:, None]
        batch[f"{name}_tokens"] = np.where(real, rng.integers(1, VOCAB_SIZE, real.shape), 0)
    targets = batch["decoder_target_tokens"]
    batch["decoder_input_tokens"] = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    batch = {name: array.astype(np.int32) for name, array in batch.items()}
    return batch | {"decoder_loss_weights": (targets > 0).astype(np.float32)}


def build_step(
    model_def: Any,
    mesh: Mesh,
    *,
    batch: Mapping[str, Any],
    objective: Any,
    optimizer: Any,
    learning_rate: Any = 1e-3,
    step_config: StepConfig | None = None,
) -> tuple[Any, Callable[..., TrainState]]:
    """Returns (compiled step of (state, batch, key), parameters -> state on the mesh)."""
    built = optimizer.build(model_def.param_info)
    schedule = learning_rate if callable(learning_rate) else lambda _: jnp.float32(learning_rate)
    step = make_train_step(model_def, objective, built, schedule, step_config or StepConfig())
    shardings = state_shardings(model_def, built, mesh, RULES)
    jitted = jit_train_step(step, mesh=mesh, rules=RULES, shardings=shardings)
    lowered = jitted.lower(state_shapes(model_def, built), batch, KEY)
    compiled = lowered.compile()

    def place(params: Mapping[str, Any], *, step: int = 0) -> TrainState:
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state_shapes(model_def, built))
        state = dataclasses.replace(zeros, step=np.int32(step), params=dict(params))
        # The step donates its state, so the caller's arrays must not become part of it.
        return jax.device_put(state, shardings, may_alias=False)

    def run(state: TrainState, batch: Mapping[str, Any], key: jax.Array = KEY) -> Any:
        return compiled(state, *jax.device_put((dict(batch), key), compiled.input_shardings[0][1:]))

    run.compiled = compiled
    return run, place


def one_device_mesh() -> Mesh:
    return MeshConfig().build(jax.devices()[:1])


def relative_l2(actual: Any, expected: Any) -> float:
    """The largest relative L2 distance of two trees' leaves."""
    distances = jax.tree.map(
        lambda a, e: float(np.linalg.norm(np.asarray(a) - e) / (np.linalg.norm(e) + 1e-30)),
        actual,
        jax.tree.map(np.asarray, expected),
    )
    return max(jax.tree.leaves(distances))


class Traces:
    """T5X's recorded runs: inputs, expected numbers, and initial parameters."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.inputs: Mapping[str, np.ndarray] = np.load(directory / "inputs.npz")
        self.expected: Mapping[str, np.ndarray] = np.load(directory / "expected.npz")
        self.model = tiny_model()

    def params(self) -> dict[str, Any]:
        loaded = load_t5x_checkpoint(self.directory / "legacy" / "checkpoint_0")
        return to_stacked(loaded.params, self.model.param_info)

    def batches(self, kind: str) -> Iterator[dict[str, np.ndarray]]:
        features = {
            n.split("/")[1]: self.inputs[n] for n in self.inputs if n.startswith(kind + "/")
        }
        for step in range(20):
            yield {name: array[step] for name, array in features.items()}

    def arrays(self, prefix: str, *, of: Any = None) -> dict[str, np.ndarray]:
        """{T5X's parameter name: array}, recorded under `prefix` or cut from our tree `of`."""
        names = [str(name) for name in self.expected["param_names"]]
        if of is None:
            return {n: self.expected[prefix + n] for n in names if prefix + n in self.expected}
        return {name: unrolled(of, name) for name in names}


def unrolled(tree: Mapping[str, Any], name: str) -> np.ndarray:
    """The array that T5X calls `name` (".../layers_1/...") in our stacked tree."""
    value: Any = tree
    layer: int | None = None
    for part in name.split("/"):
        if part.startswith("layers_"):
            part, layer = "layers", int(part.removeprefix("layers_"))
        value = value[part]
    return np.asarray(value if layer is None else value[layer])


@pytest.fixture(scope="session")
def traces(oracle_dir: Path) -> Traces:
    return Traces(oracle_dir / "t5_1_1_tiny")
