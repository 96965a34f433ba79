"""The decoder of a model, run on prompts at once and then one token at a time with a cache."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from t5x_like.kernels.attention import AttentionMask
from t5x_like.layers.cache import CacheShape, DecodingStep
from t5x_like.models.block import BlockCache
from t5x_like.models.stack import Stack, blocks_of
from t5x_like.models.transformer import Transformer

# The blocks of every group of layers, each with a leading axis of repeats if they are stacked.
Caches = list[list[BlockCache]]


def prefill(
    module: Transformer,
    tokens: Int[Array, "batch prompt"],
    *,
    start: Int[Array, " batch"],
    lengths: Int[Array, " batch"],
    shape: CacheShape,
    prefix: Int[Array, "batch prompt"] | None = None,
    context: Float[Array, "batch key embed"] | None = None,
    context_valid: Bool[Array, "batch key"] | None = None,
) -> tuple[Float[Array, "batch vocab"], Caches]:
    """Runs prompts that are padded on the left.

    Args:
      module: with its parameters.
      tokens: the decoder's inputs; row b's prompt begins at slot `start[b]`.
      start: below the number of slots: no prompt is empty.
      lengths: tokens of each prompt and of what may be generated after it.
      shape: of the cache to make.
      prefix: positive on tokens that see each other in both directions (prefix LM), or None.
      context, context_valid: the encoder's output, and where it is not padding.

    Returns:
      float32 logits of the token after each prompt, and the cache.
    """
    stack, slots = module.decoder, jnp.arange(tokens.shape[1])
    positions = jnp.maximum(slots - start[:, None], 0)
    inputs: dict[str, Any] = {
        "mask": AttentionMask(causal=True, key_valid=slots >= start[:, None], prefix=prefix),
        "positions": positions,
        "lengths": lengths,
        "token_ids": tokens,
        "relative_bias": stack.relative_bias(),
        "shape": shape,
        "context": context,
        "context_mask": None if context_valid is None else AttentionMask(key_valid=context_valid),
    }
    x, caches = module.embed(tokens, positions), []
    for group in stack.layer_groups():
        graphdef, params = nnx.split(group)

        def run(
            x: jax.Array, params: Any, graphdef: Any = graphdef
        ) -> tuple[jax.Array, list[BlockCache]]:
            made = []
            for block in blocks_of(nnx.merge(graphdef, params)):
                x, cache = block.prefill(x, **inputs)
                made.append(cache)
            return x, made

        x, made = jax.lax.scan(run, x, params)
        caches.append(made)
    return module.to_logits(stack.normalise(x[:, -1:]))[:, 0], caches


class Stepper:
    """Runs one token of every beam, with what the tokens before it left in the cache.

    Made before the loop over tokens. `unrolled` takes the layers of a stack apart, parameters and
    caches: XLA's CPU compiler copies what a loop over layers cuts out of a stack, that is the
    whole model for every token. Elsewhere it costs compile time and a copy of the parameters.
    """

    def __init__(self, module: Transformer, *, unrolled: bool) -> None:
        self.module, self.unrolled = module, unrolled
        self._groups = [
            (graphdef, part)
            for graphdef, params in map(nnx.split, module.decoder.layer_groups())
            for part in self._apart(params)
        ]

    def _apart(self, tree: Any) -> list[Any]:
        """A stack of layers, or each of its layers without the leading axis."""
        if not self.unrolled:
            return [tree]
        repeats = len(jax.tree.leaves(tree)[0])
        return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(repeats)]

    def arrange(self, caches: Caches) -> Caches:
        """The caches of `prefill` in the form that calls take and return."""
        return [part for group in caches for part in self._apart(group)]

    def __call__(
        self,
        tokens: Int[Array, "rows beams"],
        caches: Caches,
        *,
        at: DecodingStep,
        context_valid: Bool[Array, "batch key"] | None = None,
    ) -> tuple[Float[Array, "rows beams vocab"], Caches]:
        """float32 logits of the next token of every beam, and the caches with this one."""
        stack: Stack = self.module.decoder
        x = self.module.embed(tokens, jnp.broadcast_to(at.positions, tokens.shape))
        inputs: dict[str, Any] = {
            "at": at,
            "token_ids": tokens,
            "relative_bias": stack.relative_bias(),
            "context_valid": context_valid,
        }
        written = []
        for (graphdef, params), group in zip(self._groups, caches, strict=True):
            context = [cache.context for cache in group]

            def run(
                carry: tuple[jax.Array, list[Any]], scanned: Any, graphdef: Any = graphdef
            ) -> tuple[tuple[jax.Array, list[Any]], None]:
                (x, own), (params, context, layer) = carry, scanned
                own = list(own)
                for i, block in enumerate(blocks_of(nnx.merge(graphdef, params))):
                    x, own[i] = block.step(x, own[i], context[i], layer=layer, **inputs)
                return (x, own), None

            carry = (x, [cache.own for cache in group])
            if self.unrolled:
                (x, own), _ = run(carry, (params, context, None))
            else:
                repeats = jnp.arange(len(jax.tree.leaves(params)[0]))
                (x, own), _ = jax.lax.scan(run, carry, (params, context, repeats))
            written.append(
                [BlockCache(own=o, context=c) for o, c in zip(own, context, strict=True)]
            )
        return self.module.to_logits(stack.normalise(x)), written
