"""Greedy decoding and sampling."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from t5x_like.decoding import filters
from t5x_like.decoding.session import Generated, Session
from t5x_like.errors import UserError
from t5x_like.layers.cache import CacheShape
from t5x_like.layers.checks import check_number, check_positive_ints
from t5x_like.models.cached import Caches


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Draws token after token; what is given applies in the order of the attributes.

    Attributes:
      max_new_tokens: tokens generated for a prompt at most.
      repetition_penalty: above 1 makes tokens of the prompt and the continuation less likely.
      temperature: divides the logits; 0 takes the most likely token (greedy).
      top_k: draw from the k most likely tokens; 0 for all.
      top_p: draw from the most likely tokens whose probabilities reach p together; 1 for all.
      min_p: draw from tokens at least p times as likely as the most likely one; 0 for all.
      num_samples: independent continuations of each prompt.
      stop_sequences: ids after which a continuation ends, as it does after an end token.
    """

    max_new_tokens: int
    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    num_samples: int = 1
    stop_sequences: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        check_positive_ints(self, "max_new_tokens", "num_samples")
        check_number(self, "repetition_penalty", low=1e-6)
        check_number(self, "temperature", low=0.0)
        check_number(self, "min_p", low=0.0, high=1.0)
        if not isinstance(self.top_k, int) or isinstance(self.top_k, bool) or self.top_k < 0:
            raise UserError(f"Sampling.top_k is {self.top_k!r}; give an integer of at least 0")
        if isinstance(self.top_p, bool) or not 0 < self.top_p <= 1:
            raise UserError(f"Sampling.top_p is {self.top_p!r}; give a number in (0, 1]")
        stops = tuple(tuple(int(token) for token in stop) for stop in self.stop_sequences)
        object.__setattr__(self, "stop_sequences", stops)
        if not all(stops):
            raise UserError("Sampling.stop_sequences has an empty one; give at least one token")

    def cache_shape(self, slots: int) -> CacheShape:
        """What a loop over new tokens needs."""
        return CacheShape(slots=slots, samples=self.num_samples)

    def decode(
        self, session: Session, keys: Key[Array, " batch"], eos_ids: Sequence[int]
    ) -> Generated:
        """Runs until every row has ended; `keys` hold the randomness of each prompt."""
        samples, batch = self.num_samples, len(session.start)
        state = self._start(session, keys)
        logits = jnp.repeat(session.logits, samples, axis=0)
        state = self._extend(state, logits, eos_ids)

        def run(state: _State) -> _State:
            newest = jax.lax.dynamic_slice_in_dim(state.tokens, state.count - 1, 1, axis=1)
            logits, caches = session.step(newest, state.caches, index=state.count - 1)
            state = dataclasses.replace(state, caches=caches)
            return self._extend(state, logits[:, 0], eos_ids)

        state = jax.lax.while_loop(lambda state: ~jnp.all(state.done), run, state)
        token_log_probs = state.log_probs.reshape(batch, samples, -1)
        scores = jnp.sum(token_log_probs, axis=-1)
        order = jnp.argsort(-scores, axis=-1, stable=True)

        def best_first(x: jax.Array) -> jax.Array:
            at = order.reshape(*order.shape, *[1] * (x.ndim - 2))
            return jnp.take_along_axis(x, at, axis=1)

        return Generated(
            tokens=best_first(state.tokens.reshape(batch, samples, -1)),
            lengths=best_first(state.lengths.reshape(batch, samples)),
            token_log_probs=best_first(token_log_probs),
            scores=best_first(scores),
        )

    def _start(self, session: Session, keys: jax.Array) -> _State:
        samples, (batch, vocab) = self.num_samples, session.logits.shape
        of_sample = jax.vmap(jax.random.fold_in, (None, 0))
        row_keys = jax.vmap(of_sample, (0, None))(keys, jnp.arange(samples)).reshape(-1)
        limits = jnp.repeat(session.limits, samples)
        seen = None
        if self.repetition_penalty != 1.0:
            valid = jnp.arange(session.first_slot) >= session.start[:, None]
            seen = jnp.zeros((batch, vocab), bool)
            seen = seen.at[jnp.arange(batch)[:, None], session.prompt].max(valid)
            seen = jnp.repeat(seen, samples, axis=0)
        shape = (batch * samples, self.max_new_tokens)
        return _State(
            count=jnp.int32(0),
            tokens=jnp.zeros(shape, jnp.int32),
            log_probs=jnp.zeros(shape, jnp.float32),
            lengths=jnp.zeros(shape[:1], jnp.int32),
            done=limits <= 0,
            seen=seen,
            caches=session.caches,
            limits=limits,
            keys=row_keys,
        )

    def _extend(
        self, state: _State, logits: Float[Array, "rows vocab"], eos_ids: Sequence[int]
    ) -> _State:
        """Chooses one token more for every row that has not ended."""
        live = ~state.done
        token = self._choose(state, logits)
        at_token = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
        log_prob = at_token - jax.nn.logsumexp(logits, axis=-1)
        token = jnp.where(live, token, 0)
        log_prob = jnp.where(live, log_prob, 0.0)
        place = (0, state.count)
        tokens = jax.lax.dynamic_update_slice(state.tokens, token[:, None], place)
        lengths = state.lengths + live
        ends = jnp.isin(token, jnp.asarray(eos_ids, jnp.int32)) | (lengths >= state.limits)
        if self.stop_sequences:
            ends |= self._stops(tokens, state.count)
        seen = state.seen
        if seen is not None:
            seen = seen.at[jnp.arange(len(token)), token].max(live)
        return dataclasses.replace(
            state,
            count=state.count + 1,
            tokens=tokens,
            log_probs=jax.lax.dynamic_update_slice(state.log_probs, log_prob[:, None], place),
            lengths=lengths,
            done=state.done | ends,
            seen=seen,
        )

    def _choose(self, state: _State, logits: jax.Array) -> Int[Array, " rows"]:
        if state.seen is not None:
            logits = filters.penalise_repetition(logits, state.seen, self.repetition_penalty)
        if self.temperature == 0:
            return _most_likely(logits)
        logits = logits / self.temperature
        if self.top_k:
            logits = filters.keep_top_k(logits, self.top_k)
        if self.top_p < 1:
            logits = filters.keep_top_p(logits, self.top_p)
        if self.min_p:
            logits = filters.keep_min_p(logits, self.min_p)
        keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.count)
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)

    def _stops(self, tokens: jax.Array, newest: jax.Array) -> Bool[Array, " rows"]:
        """Whether a stop sequence ends at column `newest` of the tokens."""
        longest = max(map(len, self.stop_sequences))
        stops = np.full((len(self.stop_sequences), longest), -1)  # -1 matches everything
        for row, stop in zip(stops, self.stop_sequences, strict=True):
            row[longest - len(stop) :] = stop
        padded = jnp.pad(tokens, ((0, 0), (longest - 1, 0)), constant_values=-2)
        tail = jax.lax.dynamic_slice_in_dim(padded, newest, longest, axis=1)
        same = (tail[:, None] == stops) | (stops == -1)
        return jnp.any(jnp.all(same, axis=-1), axis=-1)


def _most_likely(logits: Float[Array, "rows vocab"]) -> Int[Array, " rows"]:
    """`argmax` as two plain reductions, which XLA's CPU compiler runs ten times faster."""
    highest = jnp.max(logits, axis=-1, keepdims=True)
    ids = jnp.where(logits == highest, jnp.arange(logits.shape[-1]), logits.shape[-1])
    return jnp.min(ids, axis=-1).astype(jnp.int32)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=(
        "count",
        "tokens",
        "log_probs",
        "lengths",
        "done",
        "seen",
        "caches",
        "limits",
        "keys",
    ),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class _State:
    """Of the loop over tokens: `count` columns of `tokens` and `log_probs` are filled."""

    count: Int[Array, ""]
    tokens: Int[Array, "rows new"]
    log_probs: Float[Array, "rows new"]
    lengths: Int[Array, " rows"]
    done: Bool[Array, " rows"]
    seen: Bool[Array, "rows vocab"] | None
    caches: Caches
    limits: Int[Array, " rows"]
    keys: Key[Array, " rows"]
