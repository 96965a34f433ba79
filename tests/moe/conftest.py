"""Small layers, their parameters, and the sharding rules of models with experts."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5x_like.layers.mlp import MlpConfig
from t5x_like.layers.moe.layer import MoeConfig
from t5x_like.models.base import ModelDef
from t5x_like.parallel.logical import Rules

EMBED = 8
TENSOR_AXES = dict.fromkeys(("vocab", "heads", "kv_heads", "mlp"), "tensor")
WHOLE_AXES = dict.fromkeys(
    ("layers", "relpos_buckets", "positions", "length", "head_dim", "latent")
)
RULES = Rules(
    storage={**WHOLE_AXES, **TENSOR_AXES, "experts": "expert", "embed": ("fsdp", "expert")},
    compute={
        **WHOLE_AXES,
        **TENSOR_AXES,
        "experts": "expert",
        "embed": None,
        "batch": ("data", "fsdp", "expert"),
    },
)
MESHES = [
    {"data": 8},
    {"expert": 8},
    {"expert": 4, "tensor": 2},
    {"fsdp": 2, "expert": 4},
    {"data": 2, "expert": 2, "tensor": 2},
]


@dataclasses.dataclass(frozen=True)
class LayerModel:
    """Makes a layer what `ModelDef` takes."""

    moe: MoeConfig
    vocab_size: int = 0
    dtype: str = "float32"

    def build(self) -> Any:
        return self.moe.build(embed_dim=EMBED, dtype=jnp.dtype(self.dtype))


def layer(**settings: Any) -> ModelDef:
    defaults = {"num_experts": 8, "expert": MlpConfig(mlp_dim=16, use_bias=True)}
    return ModelDef(LayerModel(MoeConfig(**{**defaults, **settings})))


def random_params(model: ModelDef, seed: int = 0) -> Any:
    """Parameters of a layer, large enough for experts to differ; the bias too."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda info: (0.3 * rng.normal(size=info.shape)).astype(np.float32), model.param_info
    )


def random_input(rows: int = 2, length: int = 8, seed: int = 0) -> tuple[Any, Any, Any]:
    """Input, which tokens are real (of the last row all), and token ids."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, length, EMBED)).astype(np.float32)
    real = rng.random((rows, length)) < 0.8
    real[-1] = True
    return x, real, rng.integers(1, 100, (rows, length)).astype(np.int32)


def call(model: ModelDef, params: Any, x: Any, real: Any, ids: Any, **settings: Any) -> Any:
    """Runs a layer without dropout, or as `settings` say."""
    plain = {"dropout_rate": 0.0, "dropout_key": None, "broadcast_dims": ()}
    return model.bind(params)(jnp.asarray(x), real=real, token_ids=ids, **{**plain, **settings})
