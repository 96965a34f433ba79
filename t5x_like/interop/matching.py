"""Matches the arrays of a checkpoint, by name and shape, with the parameters of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np

from t5x_like.errors import UserError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Source:
    """An array that is read when it is needed: its shape and dtype are known before.

    Attributes:
      chunk: shape of what is read from the file at least.
      read: () -> the whole array.
      take: (index, axis) -> the part at `index` of `axis`, without that axis.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...] = ()
    read: Callable[[], np.ndarray]
    take: Callable[[int, int], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, array: Any) -> Source:
        """Wraps an array, a scalar, or a `Source` (which is returned as it is)."""
        if isinstance(array, Source):
            return array
        value = np.asarray(array)
        return cls(
            shape=value.shape,
            dtype=value.dtype,
            read=lambda: value,
            take=lambda i, axis: value[(slice(None),) * axis + (i,)],
        )

    def map(
        self,
        function: Callable[[np.ndarray], np.ndarray],
        *,
        shape: tuple[int, ...] | None = None,
        dtype: Any = None,
    ) -> Source:
        """Applies an elementwise or reshaping function of a leading axis to what is read."""
        read, take = self.read, self.take
        return Source(
            shape=self.shape if shape is None else shape,
            dtype=self.dtype if dtype is None else np.dtype(dtype),
            read=lambda: function(read()),
            take=lambda i, axis: function(take(i, axis)),
        )

    def view(self, dtype: Any) -> Source:
        """Takes the bits of a uint16 array for `dtype`; an array of another dtype is unchanged."""
        if self.dtype != np.uint16:
            return self
        return self.map(lambda x: x.view(np.dtype(dtype)), dtype=dtype)


def place(array: np.ndarray, sharding: jax.sharding.Sharding | None) -> np.ndarray | jax.Array:
    """Puts this process's parts of `array` on its devices; without a sharding it stays here."""
    if sharding is None:
        return array
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


_LISTED = 8  # differences of a kind


class HasShape(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


def check_match(
    found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, HasShape], *, what: str = ""
) -> None:
    """Raises a UserError that lists names and shapes in which checkpoint and model differ."""
    problems = _differences(found, wanted)
    if problems:
        where = f" '{what}'" if what else ""
        raise UserError(f"The checkpoint{where} is of another model: {'; '.join(problems)}.")


def _differences(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, HasShape]) -> list[str]:
    missing, extra = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    both = wanted.keys() & found.keys()
    reshaped = {name for name in both if tuple(found[name]) != tuple(wanted[name].shape)}

    def near(name: str, others: Set[str], where: str) -> str:
        question = did_you_mean(name, others, limit=1)
        return question.replace(" Did you mean", f", nearest {where}:").rstrip("?")

    return [
        *_first(missing, lambda n: f"missing {n} {wanted[n].shape}{near(n, extra, 'there')}"),
        *_first(extra, lambda n: f"not in the model {n} {found[n]}{near(n, missing, 'here')}"),
        *_first(reshaped, lambda n: f"{n} is {found[n]} there, {wanted[n].shape} in the model"),
    ]


def _first(names: Set[str], line: Callable[[str], str]) -> list[str]:
    """The lines of the first names: another optimizer has hundreds of others."""
    rest = len(names) - _LISTED
    more = [f"and {rest} more like that"] if rest > 0 else []
    return [*map(line, sorted(names)[:_LISTED]), *more]
