"""Which tokens of a batch are padding."""

from __future__ import annotations

from collections.abc import Mapping

import jax
from jaxtyping import Array, Bool


def real_tokens(
    batch: Mapping[str, jax.Array], *, stack: str
) -> Bool[Array, "batch length"] | None:
    """False where a token that the `encoder` or `decoder` works on is padding; None if unknown.

    Packed examples have segment ids above 0. Else id 0 is padding: of an encoder's inputs, and of
    a decoder's targets, since its inputs begin with id 0.
    """
    segments = batch.get(f"{stack}_segment_ids")
    if segments is not None:
        return segments > 0
    tokens = batch.get("encoder_input_tokens" if stack == "encoder" else "decoder_target_tokens")
    return None if tokens is None else tokens > 0
