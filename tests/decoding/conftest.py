"""Models with random parameters, biases and norms too."""

from __future__ import annotations

import zlib
from typing import Any

import jax
import numpy as np

from t5x_like.models.base import ModelDef, ParamInfo


def random_params(model: ModelDef, seed: int = 0) -> dict[str, Any]:
    """Normal draws that make outputs vary; scales of norms around 1."""

    def draw(path: Any, info: ParamInfo) -> np.ndarray:
        name = jax.tree_util.keystr(path)
        noise = np.random.default_rng([seed, zlib.crc32(name.encode())]).normal(size=info.shape)
        if "scale" in name:
            noise = 1.0 + 0.1 * noise
        elif "embedding" not in name:
            noise *= 0.25
        return noise.astype(np.float32)

    return jax.tree_util.tree_map_with_path(
        draw, model.param_info, is_leaf=lambda x: isinstance(x, ParamInfo)
    )
