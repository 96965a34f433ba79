"""Position information other than rotary: T5's relative bias, embeddings, ALiBi, Transformer-XL."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from t5x_like.errors import UserError
from t5x_like.kernels.position_bias import RelativeBias
from t5x_like.layers.checks import check_bools, check_number, check_positive_ints
from t5x_like.layers.linear import Linear
from t5x_like.layers.parameter import Initializer, in_use, parameter, relative_bias_init


@dataclasses.dataclass(frozen=True, kw_only=True)
class RelativePositionsConfig:
    """T5's bucketed relative bias, one table for all layers or (umT5) one a layer."""

    num_buckets: int = 32
    max_distance: int = 128
    per_layer: bool = False

    def __post_init__(self) -> None:
        check_positive_ints(self, "num_buckets", "max_distance")
        check_bools(self, "per_layer")
        if self.num_buckets % 4 or self.max_distance <= self.num_buckets // 2:
            raise UserError(
                f"RelativePositionsConfig: num_buckets {self.num_buckets} must be a multiple of 4 "
                f"and max_distance {self.max_distance} above half of it"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnedPositionsConfig:
    """One learned vector a position, added to the token embedding.

    Attributes:
      max_length: positions that a sequence can have.
      offset: rows of the table before that of position 0, which nothing uses (RoBERTa has 2).
    """

    max_length: int
    offset: int = 0

    def __post_init__(self) -> None:
        check_positive_ints(self, "max_length")
        check_number(self, "offset", low=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SinusoidalPositionsConfig:
    """Fixed sines and cosines, added to the token embedding (Vaswani et al. 2017,
    arXiv:1706.03762): the first half of the dims holds the sines, as in Tensor2Tensor."""

    max_wavelength: float = 10000.0

    def __post_init__(self) -> None:
        check_number(self, "max_wavelength", low=1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlibiConfig:
    """A bias on the logits that falls linearly with the distance (arXiv:2108.12409).

    Attributes:
      scale: multiplies the slopes; Falcon's is 1 / sqrt(head_dim).
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_number(self, "scale", low=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerXlPositionsConfig:
    """Relative positions that the query looks at (Dai et al. 2019, arXiv:1901.02860): logits
    `(q + content_bias) . k + (q + position_bias) . relative(sinusoid(distance))`."""

    max_wavelength: float = 10000.0

    def __post_init__(self) -> None:
        check_number(self, "max_wavelength", low=1.0)


def sinusoid(
    positions: Float[Array, "*shape"] | np.ndarray, *, dim: int, max_wavelength: float
) -> Float[Array, "*shape dim"]:
    """[sines | cosines] of the positions at dim / 2 wavelengths, from 2 pi upwards."""
    inverse = 1.0 / max_wavelength ** (np.arange(0, dim, 2) / dim)
    angles = jnp.asarray(positions, jnp.float32)[..., None] * inverse.astype(np.float32)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class RelativePositions(nnx.Module):
    """Holds a table [heads, buckets]; calling it gives the `RelativeBias` for the kernel."""

    def __init__(
        self,
        config: RelativePositionsConfig,
        *,
        num_heads: int,
        bidirectional: bool,
        dtype: jnp.dtype,
    ) -> None:
        self.config, self.bidirectional, self.dtype = config, bidirectional, dtype
        self.rel_embedding = parameter(
            (num_heads, config.num_buckets),
            logical_axes=("heads", "relpos_buckets"),
            initializer=relative_bias_init,
        )

    def __call__(self) -> RelativeBias:
        return RelativeBias(
            table=in_use(self.rel_embedding, self.dtype),
            bidirectional=self.bidirectional,
            max_distance=self.config.max_distance,
        )


class LearnedPositions(nnx.Module):
    """A table [offset + max_length, embed] of absolute position embeddings."""

    def __init__(
        self,
        config: LearnedPositionsConfig,
        *,
        embed_dim: int,
        init_stddev: float,
        dtype: jnp.dtype,
    ) -> None:
        self.config, self.dtype = config, dtype
        self.embedding = parameter(
            (config.offset + config.max_length, embed_dim),
            logical_axes=("positions", "embed"),
            initializer=jax.nn.initializers.normal(init_stddev),
        )

    def __call__(
        self, length: int, positions: Int[Array, "batch length"] | None
    ) -> Float[Array, "#batch length embed"]:
        """Embeddings of `positions`, or of 0, 1, ..., length - 1 for every row.

        Raises:
          UserError: `length` is above `max_length`.
        """
        if length > self.config.max_length:
            raise UserError(
                f"a sequence of {length} tokens is longer than the {self.config.max_length} "
                "learned positions; shorten TASK_FEATURE_LENGTHS or raise max_length"
            )
        table = in_use(self.embedding, self.dtype)[self.config.offset :]
        return table[None, :length] if positions is None else table[positions]


class SinusoidalPositions(nnx.Module):
    """Position embeddings without parameters."""

    def __init__(
        self, config: SinusoidalPositionsConfig, *, embed_dim: int, dtype: jnp.dtype
    ) -> None:
        self.config, self.embed_dim, self.dtype = config, embed_dim, dtype

    def __call__(
        self, length: int, positions: Int[Array, "batch length"] | None
    ) -> Float[Array, "#batch length embed"]:
        """Embeddings of `positions`, or of 0, 1, ..., length - 1 for every row."""
        at = jnp.arange(length)[None] if positions is None else positions
        wavelength = self.config.max_wavelength
        return sinusoid(at, dim=self.embed_dim, max_wavelength=wavelength).astype(self.dtype)


class TransformerXlPositions(nnx.Module):
    """The parameters of Transformer-XL's relative attention, and its part of the logits."""

    def __init__(
        self,
        config: TransformerXlPositionsConfig,
        *,
        embed_dim: int,
        num_heads: int,
        head_dim: int,
        kernel_init: Initializer,
        dtype: jnp.dtype,
    ) -> None:
        self.config, self.embed_dim, self.dtype = config, embed_dim, dtype
        self.num_heads, self.head_dim = num_heads, head_dim
        joined = num_heads * head_dim
        self.relative = Linear(
            (embed_dim, joined),
            logical_axes=("embed", "heads"),
            initializer=kernel_init,
            use_bias=False,
            dtype=dtype,
        )
        zeros = jax.nn.initializers.zeros
        self.content_bias = parameter((joined,), logical_axes=("heads",), initializer=zeros)
        self.position_bias = parameter((joined,), logical_axes=("heads",), initializer=zeros)

    def _bias(self, param: nnx.Param) -> jax.Array:
        return in_use(param, self.dtype).reshape(self.num_heads, self.head_dim)

    def __call__(
        self, query: Float[Array, "batch length heads head_dim"], *, scale: float, key_length: int
    ) -> tuple[Float[Array, "batch length heads head_dim"], Float[Array, "batch heads length key"]]:
        """The query for the content product, and the logits of positions, already scaled."""
        # The distance query - key of column c of the unshifted table, from the farthest past on.
        distances = np.arange(query.shape[1] - 1, -key_length - 1, -1)
        content, logits = self.behind(query, self.keys(distances), scale=scale)
        return content, _shift_rows(logits)

    def keys(self, distances: Int[np.ndarray, " keys"]) -> Float[Array, "keys heads head_dim"]:
        """What a query looks at for keys that stand this far before it."""
        table = sinusoid(distances, dim=self.embed_dim, max_wavelength=self.config.max_wavelength)
        keys = self.relative(table[None].astype(self.dtype))[0]
        return keys.reshape(len(distances), self.num_heads, self.head_dim)

    def behind(
        self,
        query: Float[Array, "batch length heads head_dim"],
        keys: Float[Array, "key heads head_dim"],
        *,
        scale: float,
    ) -> tuple[Float[Array, "batch length heads head_dim"], Float[Array, "batch heads length key"]]:
        """The query for the content product, and its scaled logits with the keys of distances."""
        by_position = (query + self._bias(self.position_bias)) * scale
        logits = jnp.einsum("bthd,chd->bhtc", by_position, keys)
        return query + self._bias(self.content_bias), logits


def _shift_rows(x: Float[Array, "batch heads rows period"]) -> Float[Array, "batch heads rows ..."]:
    """Column j of row i becomes column `j + rows - 1 - i` of `x`; see `kernels.toeplitz`."""
    *lead, rows, period = x.shape
    flat = x.reshape(*lead, rows * period)[..., : rows * (period - 1)]
    return flat.reshape(*lead, rows, period - 1)[..., rows - 1 :]
