"""Rotary position embeddings (RoFormer, Su et al. 2021, arXiv:2104.09864) and their scalings.

A scaling stretches the wavelengths of a model that was trained on short sequences, so that it
can read longer ones. Frequencies are computed on the host in float64 when the step is traced.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from t5x_like.errors import UserError
from t5x_like.layers.checks import check_bools, check_number, check_positive_ints

Length = int | Int[Array, " batch"]
Frequencies = np.ndarray | Float[Array, "batch pairs"]


class Scaling(Protocol):
    """Turns the frequencies of a rotary embedding into those of a longer context."""

    def frequencies(self, theta: float, dim: int, length: Length) -> Frequencies:
        """Radians a position, [dim / 2], for a sequence of `length` tokens, or [B, dim / 2] for
        sequences of lengths [B]."""
        ...

    @property
    def amplitude(self) -> float:
        """What cosine and sine are multiplied by."""
        ...


def base_frequencies(theta: float, dim: int) -> np.ndarray:
    """`theta ** (-2 i / dim)` for i in [0, dim / 2)."""
    return 1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """All frequencies divided by `factor` (position interpolation, arXiv:2306.15595)."""

    factor: float

    amplitude = 1.0

    def __post_init__(self) -> None:
        check_number(self, "factor", low=1.0)

    def frequencies(self, theta: float, dim: int, length: Length) -> Frequencies:
        return base_frequencies(theta, dim) / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicScaling:
    """A larger theta for sequences above `original_length` (dynamic NTK-aware scaling)."""

    factor: float
    original_length: int

    amplitude = 1.0

    def __post_init__(self) -> None:
        check_number(self, "factor", low=1.0)
        check_positive_ints(self, "original_length")

    def frequencies(self, theta: float, dim: int, length: Length) -> Frequencies:
        # theta * stretch ** (dim / (dim - 2)) in place of theta.
        exponents = -np.arange(0, dim, 2) / (dim - 2)
        base = base_frequencies(theta, dim)
        if isinstance(length, int):
            ratio = max(length, self.original_length) / self.original_length
            return base * (self.factor * ratio - (self.factor - 1)) ** exponents
        ratios = jnp.maximum(length, self.original_length)[:, None] / self.original_length
        return base * (self.factor * ratios - (self.factor - 1)) ** exponents


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's: long wavelengths divided by `factor`, short ones kept, a ramp between
    (arXiv:2407.21783)."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_length: int

    amplitude = 1.0

    def __post_init__(self) -> None:
        check_number(self, "factor", low=1.0)
        check_positive_ints(self, "original_length")
        check_number(self, "low_frequency_factor", low=0.0)
        if not self.high_frequency_factor > self.low_frequency_factor:
            raise UserError(
                f"Llama3Scaling.high_frequency_factor {self.high_frequency_factor} must be above "
                f"low_frequency_factor {self.low_frequency_factor}"
            )

    def frequencies(self, theta: float, dim: int, length: Length) -> Frequencies:
        frequencies = base_frequencies(theta, dim)
        turns = self.original_length * frequencies / (2 * math.pi)
        span = self.high_frequency_factor - self.low_frequency_factor
        keep = np.clip((turns - self.low_frequency_factor) / span, 0, 1)
        return frequencies * (keep + (1 - keep) / self.factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): a ramp by the number of turns that a dim makes
    within the original length, and sharper attention.

    Attributes:
      factor: new length over original length.
      original_length: tokens of the sequences that the model was trained on.
      beta_fast, beta_slow: dims with more turns than the first are kept, with fewer than the
        second divided by `factor`.
      attention_factor: amplitude of cosine and sine; None is the paper's 0.1 log(factor) + 1.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        check_number(self, "factor", low=1.0)
        check_positive_ints(self, "original_length")
        check_number(self, "beta_slow", low=0.0)
        if not self.beta_fast > self.beta_slow:
            raise UserError(
                f"YarnScaling.beta_fast {self.beta_fast} must be above beta_slow {self.beta_slow}"
            )

    @property
    def amplitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0

    def frequencies(self, theta: float, dim: int, length: Length) -> Frequencies:
        frequencies = base_frequencies(theta, dim)

        def dim_of(turns: float) -> float:
            return (
                dim * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))
            )

        low = max(math.floor(dim_of(self.beta_fast)), 0)
        high = min(math.ceil(dim_of(self.beta_slow)), dim - 1)
        ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0, 1)
        return frequencies * (1 - ramp + ramp / self.factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRopeScaling:
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753): searched factors a dim (Phi-3).

    Attributes:
      short_factors, long_factors: what each of the dim / 2 frequencies is divided by, for
        sequences up to `original_length` and for longer ones.
      original_length, max_length: tokens of the sequences before and after the extension.
      attention_factor: amplitude of cosine and sine; None is the paper's
        sqrt(1 + log(max_length / original_length) / log(original_length)).
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_length: int
    max_length: int
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        check_positive_ints(self, "original_length", "max_length")
        for name in ("short_factors", "long_factors"):
            object.__setattr__(self, name, tuple(float(x) for x in getattr(self, name)))
        if len(self.short_factors) != len(self.long_factors):
            raise UserError(
                f"LongRopeScaling has {len(self.short_factors)} short_factors and "
                f"{len(self.long_factors)} long_factors; give as many of each"
            )

    @property
    def amplitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        ratio = self.max_length / self.original_length
        if ratio <= 1:
            return 1.0
        return math.sqrt(1 + math.log(ratio) / math.log(self.original_length))

    def frequencies(self, theta: float, dim: int, length: Length) -> Frequencies:
        short, long = np.asarray(self.short_factors), np.asarray(self.long_factors)
        if len(short) != dim // 2:
            raise UserError(
                f"LongRopeScaling has {len(short)} factors for {dim // 2} rotated pairs of dims; "
                "give one a pair"
            )
        base = base_frequencies(theta, dim)
        if isinstance(length, int):
            return base / (long if length > self.original_length else short)
        return jnp.where(length[:, None] > self.original_length, base / long, base / short)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotates pairs of dims of queries and keys by an angle that grows with the position.

    Attributes:
      theta: the longest wavelength is about 2 pi theta positions.
      fraction: of the head's dims that are rotated, the first ones (GPT-NeoX 0.25).
      interleaved: dims (2i, 2i + 1) make a pair (GPT-J) instead of (i, i + half) (Llama).
      scaling: see the classes above, or None.
    """

    theta: float = 10000.0
    fraction: float = 1.0
    interleaved: bool = False
    scaling: (
        LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling | LongRopeScaling | None
    ) = None

    def __post_init__(self) -> None:
        check_number(self, "theta", low=1.0)
        check_bools(self, "interleaved")
        if not 0 < self.fraction <= 1:
            raise UserError(f"RopeConfig.fraction is {self.fraction!r}; give a number in (0, 1]")

    def rotated_dims(self, head_dim: int) -> int:
        """How many dims of a head are rotated.

        Raises:
          UserError: an odd number.
        """
        dims = int(self.fraction * head_dim)
        if dims < 2 or dims % 2:
            raise UserError(
                f"RopeConfig.fraction {self.fraction} of head_dim {head_dim} rotates {dims} dims; "
                "it must be an even number above 0"
            )
        return dims

    def rotation(
        self, positions: Int[Array, "#batch length"], *, head_dim: int, max_length: Length
    ) -> Rotation:
        """Cosines and sines for these positions.

        `max_length` is what scalings go by: the tokens of all sequences, or of each.
        """
        dims = self.rotated_dims(head_dim)
        frequencies: Frequencies
        if self.scaling is None:
            frequencies, amplitude = base_frequencies(self.theta, dims), 1.0
        else:
            frequencies = self.scaling.frequencies(self.theta, dims, max_length)
            amplitude = self.scaling.amplitude
        per_row = frequencies[..., None, :].astype(np.float32)
        angles = positions[..., None].astype(jnp.float32) * per_row
        return Rotation(
            cosine=jnp.cos(angles) * amplitude,
            sine=jnp.sin(angles) * amplitude,
            interleaved=self.interleaved,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotation:
    """Cosines and sines [#batch, length, dims / 2] in float32, ready to apply."""

    cosine: Float[Array, "#batch length pairs"]
    sine: Float[Array, "#batch length pairs"]
    interleaved: bool

    def __call__(
        self, x: Float[Array, "batch length heads head_dim"]
    ) -> Float[Array, "batch length heads head_dim"]:
        """Rotates the first dims of every head, in float32."""
        cosine, sine = self.cosine[:, :, None], self.sine[:, :, None]
        dims = 2 * cosine.shape[-1]
        turned = x[..., :dims].astype(jnp.float32)
        if self.interleaved:
            first, second = turned[..., ::2], turned[..., 1::2]
        else:
            first, second = jnp.split(turned, 2, axis=-1)
        pair = (first * cosine - second * sine, second * cosine + first * sine)
        if self.interleaved:
            turned = jnp.stack(pair, axis=-1).reshape(turned.shape)
        else:
            turned = jnp.concatenate(pair, axis=-1)
        return jnp.concatenate([turned.astype(x.dtype), x[..., dims:]], axis=-1)
