"""From prompts to continuations: batching, compilation, placement on a mesh."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Key

from t5x_like.decoding.beam_search import BeamSearch
from t5x_like.decoding.sampling import Sampling
from t5x_like.decoding.session import Generated, Session
from t5x_like.errors import UserError
from t5x_like.layers.parameter import activation_dtype
from t5x_like.layers.positions import LearnedPositionsConfig
from t5x_like.models import cached
from t5x_like.models.base import ModelDef, Params
from t5x_like.models.encoder_decoder import EncoderDecoderConfig
from t5x_like.parallel.logical import Rules, batch_sharding, param_shardings, use_rules

_ENCODER, _PROMPT, _LENGTHS = (
    "encoder_input_tokens",
    "decoder_prompt_tokens",
    "decoder_prompt_lengths",
)
_PREFIX = "decoder_causal_attention"


def bucket(length: int) -> int:
    """The number of slots for `length` tokens: a multiple of a quarter of the next lower power of
    two, at least 8. A model is compiled once a bucket, and at most a quarter of it is padding.

    >>> [bucket(n) for n in (1, 9, 33, 40, 41, 1000)]
    [8, 10, 40, 40, 48, 1024]
    """
    step = max(1, 2 ** (max(length, 8).bit_length() - 1) // 4)
    return max(8, -(-length // step) * step)


def example_keys(seed: int, examples: Int[np.ndarray, " batch"]) -> Key[Array, " batch"]:
    """The randomness of examples by their number: the same in any batch."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.asarray(examples))


class Generator:
    """Continues prompts with a model.

    A prompt's continuations do not depend on the batch that it is in, but for rounding.
    """

    def __init__(
        self,
        model_def: ModelDef,
        decoding: Sampling | BeamSearch,
        *,
        eos_ids: tuple[int, ...],
        mesh: Mesh | None = None,
        rules: Rules | None = None,
        unrolled: bool | None = None,
    ) -> None:
        """Args:
        model_def: an encoder-decoder or a decoder.
        decoding: how tokens are chosen.
        eos_ids: end a continuation; there may be none.
        mesh, rules: where it runs; both or neither.
        unrolled: see `models.cached.Stepper`; None for True on a CPU and False elsewhere.
        """
        if (mesh is None) != (rules is None):
            raise ValueError("mesh and rules go together")
        self.model_def, self.decoding, self.eos_ids = model_def, decoding, tuple(eos_ids)
        self._mesh = mesh
        self._unrolled = jax.default_backend() == "cpu" if unrolled is None else unrolled
        self._reads_encoder = isinstance(model_def.config, EncoderDecoderConfig)
        if mesh is None or rules is None:
            self._run = jax.jit(self._generate)
            return
        self._rules = dataclasses.replace(rules, compute={**rules.compute, "length": None})
        whole = NamedSharding(mesh, PartitionSpec())
        rows = batch_sharding(mesh, self._rules)
        self._run = jax.jit(
            self._generate,
            in_shardings=(param_shardings(mesh, rules, model_def.param_info), rows, rows),
            out_shardings=whole,
        )

    def __call__(
        self,
        params: Params,
        batch: Mapping[str, Any],
        *,
        keys: Key[Array, " batch"] | None = None,
        max_new_tokens: Int[np.ndarray, " batch"] | None = None,
    ) -> Generated:
        """Continues every prompt.

        Args:
          params: of the model, where training left them.
          batch: host arrays, the same on every process. decoder_prompt_tokens [B, P]: the
            decoder's inputs, padded on the right, and decoder_prompt_lengths [B], at least 1; for
            a prefix LM also decoder_causal_attention [B, P]. An encoder-decoder takes
            encoder_input_tokens [B, T] (0 is padding); its prompts, if none are given, are the
            single token 0.
          keys: one a prompt; `example_keys(0, range(B))` if not given.
          max_new_tokens: of each prompt, where less than the decoding's; 0 generates nothing.

        Raises:
          UserError: an empty prompt, or one that is too long for learned positions.
        """
        inputs = self._inputs(batch, max_new_tokens)
        size = len(inputs["limits"])
        keys = example_keys(0, np.arange(size)) if keys is None else keys
        with contextlib.ExitStack() as stack:
            if self._mesh is not None:
                stack.enter_context(use_rules(self._mesh, self._rules))
                inputs, keys = self._placed(inputs, keys)
            generated = self._run(params, inputs, keys)
        return jax.tree.map(lambda x: x[:size], generated)

    def _inputs(self, batch: Mapping[str, Any], limits: Any) -> dict[str, np.ndarray]:
        """Prompts padded on the left, all lengths rounded up to a bucket."""
        inputs = {}
        size = len(batch[_ENCODER if self._reads_encoder else _PROMPT])
        if self._reads_encoder:
            tokens = np.asarray(batch[_ENCODER])
            used = np.flatnonzero(tokens.any(axis=0))
            inputs["encoder"] = _cut(tokens, self._slots(1 + int(used.max(initial=0))))
        prompts, lengths = np.zeros((size, 1), np.int32), np.ones(size, np.int32)
        if _PROMPT in batch:
            prompts, lengths = np.asarray(batch[_PROMPT]), np.asarray(batch[_LENGTHS])
        width = 1 if _PROMPT not in batch else self._slots(int(lengths.max()))
        if limits is None:
            limits = np.full(size, self.decoding.max_new_tokens)
        limits = np.minimum(limits, self.decoding.max_new_tokens).astype(np.int32)
        self._check(lengths, limits)
        inputs["prompt"] = _right_aligned(prompts, lengths, width)
        if _PREFIX in batch:
            inputs["prefix"] = _right_aligned(np.asarray(batch[_PREFIX]), lengths, width)
        inputs["start"] = (width - lengths).astype(np.int32)
        inputs["limits"] = limits
        return inputs

    def _max_length(self) -> int | None:
        positions = self.model_def.config.positions  # type: ignore[attr-defined]
        return positions.max_length if isinstance(positions, LearnedPositionsConfig) else None

    def _slots(self, length: int) -> int:
        slots, most = bucket(length), self._max_length()
        return slots if most is None else max(length, min(slots, most))

    def _check(self, lengths: np.ndarray, limits: np.ndarray) -> None:
        if lengths.min(initial=1) < 1:
            raise UserError(
                f"Prompt {int(lengths.argmin())} of the batch is empty; give it at least one "
                "token, such as the one that sequences begin with"
            )
        needed = lengths + limits - 1  # The last token is not read.
        most = self._max_length()
        if most is not None and needed.max(initial=0) > most:
            row = int(needed.argmax())
            raise UserError(
                f"Prompt {row} of the batch has {lengths[row]} tokens and may get {limits[row]} "
                f"more, but the model has {most} positions; shorten it or lower max_new_tokens"
            )

    def _placed(self, inputs: dict[str, np.ndarray], keys: Any) -> tuple[dict[str, Any], Any]:
        """On the mesh, with as many rows as it can share out; those added generate nothing."""
        assert self._mesh is not None
        sharding = batch_sharding(self._mesh, self._rules)
        axes = sharding.spec[0] or ()
        degree = math.prod(self._mesh.shape[a] for a in ([axes] if isinstance(axes, str) else axes))
        rows = len(keys)
        extra = -rows % degree

        def place(x: np.ndarray) -> jax.Array:
            return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

        def longer(x: np.ndarray) -> np.ndarray:
            return np.concatenate([x, np.repeat(x[-1:], extra, axis=0)])

        padded = {name: longer(x) for name, x in inputs.items()}
        padded["limits"][rows:] = 0
        data = longer(np.asarray(jax.random.key_data(keys)))
        return {n: place(x) for n, x in padded.items()}, jax.random.wrap_key_data(place(data))

    def _generate(self, params: Params, inputs: dict[str, jax.Array], keys: Any) -> Generated:
        """Traced: reads the prompts, then loops over new tokens."""
        dtype = activation_dtype(self.model_def.config.dtype)
        module = self.model_def.bind(_narrowed(params, dtype))
        prompt, start, limits = inputs["prompt"], inputs["start"], inputs["limits"]
        slots = prompt.shape[1] + self.decoding.max_new_tokens
        context = valid = None
        if self._reads_encoder:
            valid = inputs["encoder"] > 0
            context = module.encode(inputs["encoder"])
        logits, caches = cached.prefill(
            module,
            prompt,
            start=start,
            lengths=prompt.shape[1] - start + limits,
            shape=self.decoding.cache_shape(slots),
            prefix=inputs.get("prefix"),
            context=context,
            context_valid=valid,
        )
        stepper = cached.Stepper(module, unrolled=self._unrolled)
        session = Session(
            logits=logits,
            caches=stepper.arrange(caches),
            stepper=stepper,
            prompt=prompt,
            start=start,
            limits=limits,
            slots=slots,
            context_valid=valid,
        )
        return self.decoding.decode(session, keys, self.eos_ids)


def _cut(tokens: np.ndarray, width: int) -> np.ndarray:
    """The first `width` columns, with zeros where there are fewer."""
    padded = np.pad(tokens[:, :width], ((0, 0), (0, max(0, width - tokens.shape[1]))))
    return padded.astype(np.int32)


def _right_aligned(tokens: np.ndarray, lengths: np.ndarray, width: int) -> np.ndarray:
    """Rows [B, width] that end with the first `lengths[b]` tokens of row b; zeros before."""
    from_start = np.arange(width) - (width - lengths[:, None])
    last = tokens.shape[1] - 1
    moved = np.take_along_axis(tokens, np.clip(from_start, 0, last), axis=1)
    return np.where(from_start >= 0, moved, 0).astype(np.int32)


def _narrowed(params: Params, dtype: jnp.dtype) -> Any:
    """Kernels and tables in the dtype of activations, so that a step does not read them wide."""

    def cast(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        return x.astype(dtype) if path[-1].key in ("kernel", "embedding") else x

    return jax.tree_util.tree_map_with_path(cast, dict(params))


Scorer = Callable[[int, Sequence[np.ndarray]], Sequence[float]]


def best_of_n(
    generated: Generated,
    *,
    score: Literal["log_prob", "mean_log_prob"] | Scorer = "log_prob",
) -> Generated:
    """The best continuation of every prompt, as host arrays with N = 1.

    Args:
      generated: N continuations of B prompts.
      score: their `scores`; those divided by their lengths; or a function that is given the
        number of a prompt and the tokens of its continuations, without padding, and returns a
        number for each, the highest being the best. The earlier one wins a tie.
    """
    host = jax.tree.map(np.asarray, generated)
    if score == "log_prob":
        values = host.scores
    elif score == "mean_log_prob":
        values = np.sum(host.token_log_probs, axis=-1) / np.maximum(host.lengths, 1)
    elif callable(score):
        values = np.array(
            [
                score(row, [t[:n] for t, n in zip(tokens, lengths, strict=True)])
                for row, (tokens, lengths) in enumerate(zip(host.tokens, host.lengths, strict=True))
            ]
        )
    else:
        raise UserError(
            f"best_of_n by {score!r}; choose from log_prob, mean_log_prob, or give a function"
        )
    best = np.argmax(values, axis=1)
    return jax.tree.map(lambda x: x[np.arange(len(best)), best][:, None], host)
