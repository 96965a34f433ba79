"""RMS norm (T5, Llama, Gemma) and layer norm (GPT-2, BERT); statistics in float32."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from t5x_like.layers.checks import check_bools, check_choice, check_number
from t5x_like.layers.parameter import in_use, parameter


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormConfig:
    """Attributes:
    kind: `rms` scales by the root mean square (Zhang and Sennrich 2019, arXiv:1910.07467);
      `layer` also takes the mean away (Ba et al. 2016, arXiv:1607.06450).
    epsilon: added to the variance.
    use_bias: adds a learned bias.
    scale_offset: what the learned scale is added to: 0, or Gemma's 1, whose scale starts at 0.
    """

    kind: Literal["rms", "layer"] = "rms"
    epsilon: float = 1e-6
    use_bias: bool = False
    scale_offset: float = 0.0

    def __post_init__(self) -> None:
        check_choice(self, "kind", ("rms", "layer"))
        check_number(self, "epsilon", low=0.0)
        check_bools(self, "use_bias")
        check_number(self, "scale_offset", low=0.0)


class Norm(nnx.Module):
    """Normalises the last dim of [..., embed].

    Statistics are float32; the normalised value is cast to `dtype` before it is multiplied by
    the scale, as T5X does.
    """

    def __init__(
        self, config: NormConfig, *, embed_dim: int, dtype: jnp.dtype, logical_axis: str = "embed"
    ) -> None:
        self.config, self.dtype = config, dtype
        constant, axes = jax.nn.initializers.constant, (logical_axis,)
        start = constant(1.0 - config.scale_offset)
        self.scale = parameter((embed_dim,), logical_axes=axes, initializer=start)
        if config.use_bias:
            self.bias = parameter((embed_dim,), logical_axes=axes, initializer=constant(0.0))

    def __call__(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
        y = x.astype(jnp.float32)
        if self.config.kind == "layer":
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.config.epsilon)
        scale = in_use(self.scale, self.dtype)
        if self.config.scale_offset:
            scale = scale + self.config.scale_offset
        y = y.astype(self.dtype) * scale
        return y + in_use(self.bias, self.dtype) if self.config.use_bias else y
