"""The model that T5X's numbers were made with, and the parameters T5X saved."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gin
import jax
import numpy as np
import pytest

from t5x_like.interop.t5x_legacy import load_t5x_checkpoint, to_stacked
from t5x_like.layers.attention import AttentionConfig
from t5x_like.layers.mlp import MlpConfig
from t5x_like.layers.positions import RelativePositionsConfig
from t5x_like.models.base import ModelDef
from t5x_like.models.block import BlockConfig
from t5x_like.models.encoder_decoder import EncoderDecoderConfig
from t5x_like.objectives.seq2seq import Seq2Seq

REPOSITORY = Path(__file__).parents[2]


@gin.configurable
def built_model(config=gin.REQUIRED):
    return config


@pytest.fixture
def resolve(monkeypatch):
    """name -> the model configuration that the gin file of that name defines."""
    monkeypatch.chdir(REPOSITORY)

    def resolve(name: str, *bindings: str):
        with gin.unlock_config():
            gin.clear_config()
            gin.parse_config_files_and_bindings(
                [f"gin/models/{name}.gin"], ["built_model.config = %MODEL", *bindings]
            )
        return built_model()

    yield resolve
    gin.clear_config()


@pytest.fixture(scope="session")
def oracle_config() -> EncoderDecoderConfig:
    return EncoderDecoderConfig(
        vocab_size=256,
        num_encoder_layers=2,
        num_decoder_layers=2,
        block=BlockConfig(
            embed_dim=32,
            attention=AttentionConfig(num_heads=4, head_dim=8),
            mlp=MlpConfig(mlp_dim=64, activations=("gelu", "linear")),
        ),
        positions=RelativePositionsConfig(),
        dtype="float32",
    )


@pytest.fixture(scope="session")
def oracle_model(oracle_config: EncoderDecoderConfig) -> ModelDef:
    return ModelDef(oracle_config)


class Oracle:
    """T5X's inputs, expected numbers and checkpoints of the tiny T5 1.1 model."""

    def __init__(self, directory: Path, model: ModelDef) -> None:
        self.directory, self.model = directory / "t5_1_1_tiny", model
        self.expected: Mapping[str, np.ndarray] = np.load(self.directory / "expected.npz")
        self._inputs = np.load(self.directory / "inputs.npz")

    @functools.cached_property
    def logits(self) -> Any:
        """Compiled (params, batch) -> logits."""
        return jax.jit(lambda params, batch: self.model.bind(params)(batch))

    @functools.cached_property
    def gradient(self) -> Any:
        """Compiled (params, batch) -> gradient of the summed loss with z_loss 1e-4."""
        objective = Seq2Seq(loss_normalizing_factor=None)
        return jax.jit(
            jax.grad(lambda params, batch: objective.loss(self.model.bind(params), batch)[0])
        )

    @functools.cache  # noqa: B019 - one oracle a session
    def params(self, checkpoint: str) -> dict[str, Any]:
        loaded = load_t5x_checkpoint(self.directory / checkpoint)
        return to_stacked(loaded.params, self.model.param_info)

    def batch(self, kind: str) -> dict[str, np.ndarray]:
        prefix = "unpacked" if kind == "unpacked_custom_weights" else kind
        batch = {
            name.split("/")[1]: self._inputs[name]
            for name in self._inputs.files
            if name.startswith(f"{prefix}/")
        }
        if prefix != "long":
            batch = {name: value[0] for name, value in batch.items()}
        if kind == "unpacked_custom_weights":
            batch["decoder_loss_weights"] = self._inputs[f"{kind}/decoder_loss_weights"]
        return batch

    def stacked(self, prefix: str) -> dict[str, Any]:
        """The arrays `prefix<T5X parameter name>` of expected.npz as a tree of ours."""
        tree: dict[str, Any] = {}
        for name in self.expected["param_names"]:
            node = tree
            *parents, leaf = str(name).split("/")
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = self.expected[prefix + str(name)]
        return to_stacked(tree, self.model.param_info)

    def unrolled_norms(self, tree: Mapping[str, Any]) -> np.ndarray:
        """L2 norm of every T5X parameter's part of `tree`, in the order of `param_names`."""
        norms = []
        for name in self.expected["param_names"]:
            value: Any = tree
            index = None
            for part in str(name).split("/"):
                if part.startswith("layers_"):
                    part, index = "layers", int(part.removeprefix("layers_"))
                value = value[part]
            norms.append(np.linalg.norm(value if index is None else value[index]))
        return np.array(norms)


@pytest.fixture(scope="session")
def oracle(oracle_dir: Path, oracle_model: ModelDef) -> Oracle:
    return Oracle(oracle_dir, oracle_model)


def relative_l2(actual: Any, expected: Any, *, floor: float = 0.0) -> float:
    """Largest relative L2 distance of two trees' leaves.

    A leaf with less than `floor` times the norm of the whole tree, such as the gradient of GPT-2's
    key bias, which is zero but for rounding, is measured against that.
    """
    norms = jax.tree.map(lambda e: float(np.linalg.norm(e)), expected)
    lowest = floor * float(np.linalg.norm(jax.tree.leaves(norms)))
    distances = jax.tree.map(
        lambda a, e, norm: float(np.linalg.norm(a - e)) / max(norm, lowest), actual, expected, norms
    )
    return max(jax.tree.leaves(distances))
