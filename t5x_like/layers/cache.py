"""Keys and values of tokens that a decoder has seen, kept from one decoding step to the next.

Prompts are left-padded to the same slot, so that all rows write the same slot of the cache in
place: order, windows and distances depend on slots alone, positions on `slot - start`.

The beams of a row stand side by side in every slot. Nothing is moved when the search drops a beam
and splits another: `DecodingStep.ancestors` says whose keys belong to the past of each beam.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from t5x_like.parallel.logical import constrain

_CACHE_AXES = ("layers", "batch", "kv_heads", None, "head_dim")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheShape:
    """Attributes:
    slots: tokens of the prompts and of what is generated.
    samples: rows of the cache for each prompt.
    beams: keys in each slot of a row.
    """

    slots: int
    samples: int = 1
    beams: int = 1

    def slots_of(self, window: int | None) -> int:
        """Slots that a layer keeps: a window has a ring of no more than its own size."""
        return self.slots if window is None else min(self.slots, window)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("slot", "start", "lengths", "ancestors"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingStep:
    """Where the tokens of one decoding step stand.

    Attributes:
      slot: the slot of these tokens, in every row.
      start: the first slot of each row that is not padding.
      lengths: tokens of each row's prompt and of all that may be generated; rotary scalings that
        depend on the length of a sequence go by it.
      ancestors: for every beam and slot, which of the slot's keys belongs to the past of the beam
        (at `slot`, its own); None where there is one beam.
    """

    slot: Int[Array, ""]
    start: Int[Array, " rows"]
    lengths: Int[Array, " rows"]
    ancestors: Int[Array, "rows beams slots"] | None = None

    @property
    def positions(self) -> Int[Array, "rows 1"]:
        """The position of these tokens in their sequences."""
        return (self.slot - self.start)[:, None]

    def distances(self, size: int) -> Int[Array, " size"]:
        """How far the token at each place of a ring of `size` slots stands before this step's.

        Slot s lies at place s mod size; a place that was not written yet seems to lie before
        slot 0.
        """
        return (self.slot - jnp.arange(size)) % size

    def allowed(self, size: int) -> Bool[Array, "#rows #beams keys"]:
        """Which of the `size * beams` keys of a ring each beam sees."""
        slots = self.slot - self.distances(size)
        written = slots >= self.start[:, None]
        if self.ancestors is None:
            return written[:, None]
        own = jnp.take(self.ancestors, jnp.maximum(slots, 0), axis=-1)[..., None]
        beams = own.shape[1]
        seen = (own == jnp.arange(beams)) & written[:, None, :, None]
        return seen.reshape(len(seen), beams, size * beams)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("key", "value", "relative"), meta_fields=()
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyValues:
    """Keys and values of the layers of a stack that are alike, or (no leading axis) of one layer.

    Attributes:
      key, value: heads first; the `beams` of a slot are neighbours on the axis of keys. Rotated
        and normalised, as attention uses them. Of latent attention: the key and the latent that
        all heads share.
      relative: Transformer-XL's keys of distances 0, 1, ..., or None.
    """

    key: Float[Array, "*layers rows kv_heads keys head_dim"]
    value: Float[Array, "*layers rows kv_heads keys value_dim"]
    relative: Float[Array, "*layers slots heads head_dim"] | None = None

    @classmethod
    def of_prompt(
        cls,
        key: Float[Array, "batch prompt kv_heads head_dim"],
        value: Float[Array, "batch prompt kv_heads value_dim"],
        *,
        shape: CacheShape,
        window: int | None,
        relative: Float[Array, "slots heads head_dim"] | None = None,
    ) -> KeyValues:
        """The cache of a layer after the prompts, with room for the slots to come."""
        size = shape.slots_of(window)
        # The newest slots that a ring has room for, slot s at place s mod size.
        newest = np.arange(key.shape[1])[-size:]
        places = np.argsort(newest % size)

        def arrange(x: jax.Array) -> jax.Array:
            x = x.swapaxes(1, 2)[:, :, newest[places]]
            x = jnp.pad(x, ((0, 0), (0, 0), (0, size - len(newest)), (0, 0)))
            x = jnp.repeat(jnp.repeat(x, shape.beams, axis=2), shape.samples, axis=0)
            return constrain(x, _CACHE_AXES[1:])

        return cls(key=arrange(key), value=arrange(value), relative=relative)

    def write(
        self,
        key: Float[Array, "rows beams kv_heads head_dim"],
        value: Float[Array, "rows beams kv_heads value_dim"],
        *,
        layer: Int[Array, ""] | None,
        slot: Int[Array, ""],
    ) -> KeyValues:
        """The cache with the keys and values of one slot of a layer: of number `layer` of a stack,
        or (None) of the only one."""
        beams = key.shape[1]
        place = slot % (self.key.shape[-2] // beams) * beams

        def put(cache: jax.Array, x: jax.Array) -> jax.Array:
            x = x.swapaxes(1, 2).astype(cache.dtype)
            at: tuple[Any, ...] = (0, 0, place, 0)
            if layer is not None:
                x, at = x[None], (layer, *at)
            return constrain(jax.lax.dynamic_update_slice(cache, x, at), _CACHE_AXES[-cache.ndim :])

        return dataclasses.replace(self, key=put(self.key, key), value=put(self.value, value))

    def layer(self, index: Int[Array, ""] | None) -> KeyValues:
        """The cache of one layer of a stack; None if it is of one layer."""
        if index is None:
            return self
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), self)
