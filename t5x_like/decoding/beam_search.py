"""Beam search, by T5X's rules or by those of Hugging Face transformers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from t5x_like.decoding.session import Generated, Session
from t5x_like.errors import UserError
from t5x_like.layers.cache import CacheShape
from t5x_like.layers.checks import check_choice, check_number, check_positive_ints
from t5x_like.models.cached import Caches

UNLIKELY = -1e7  # The score of a place that no hypothesis has taken.


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeamSearch:
    """Keeps the `num_beams` most likely beginnings, and as many ended hypotheses.

    Attributes:
      max_new_tokens: tokens generated for a prompt at most.
      num_beams: beginnings that are followed.
      alpha: exponent of the length penalty, which a hypothesis's log-probability is divided by.
      length_penalty: `gnmt` is T5X's search: penalty ((5 + length) / 6) ** alpha (Wu et al. 2016,
        arXiv:1609.08144); every candidate may end a hypothesis; a row ends when no beam can catch
        up with its ended hypotheses; where none has ended within `max_new_tokens`, the beams
        themselves are returned, with scores that are not penalised. `power` is that of Hugging
        Face transformers: penalty length ** alpha; only the best `num_beams` candidates may end
        a hypothesis; a row ends when its best beam, penalised at its present length, is no better
        than the worst of `num_beams` ended hypotheses; all beams end after `max_new_tokens`.
      num_returned: hypotheses to return, the best ones.
    """

    max_new_tokens: int
    num_beams: int = 4
    alpha: float = 0.6
    length_penalty: Literal["gnmt", "power"] = "gnmt"
    num_returned: int = 1

    def __post_init__(self) -> None:
        check_positive_ints(self, "max_new_tokens", "num_beams", "num_returned")
        check_number(self, "alpha", low=0.0)
        check_choice(self, "length_penalty", ("gnmt", "power"))
        if self.num_returned > self.num_beams:
            raise UserError(
                f"BeamSearch.num_returned {self.num_returned} is above num_beams "
                f"{self.num_beams}; raise num_beams"
            )

    def cache_shape(self, slots: int) -> CacheShape:
        """What a loop over new tokens needs."""
        return CacheShape(slots=slots, beams=self.num_beams)

    def decode(
        self, session: Session, keys: Key[Array, " batch"], eos_ids: Sequence[int]
    ) -> Generated:
        """Runs until every row has ended; nothing is random, so `keys` are not used."""
        del keys
        state = self._start(session)
        batch, vocab = session.logits.shape
        logits = jnp.broadcast_to(session.logits[:, None], (batch, self.num_beams, vocab))
        state = self._extend(state, logits, session, eos_ids)

        def run(state: _State) -> _State:
            tokens = state.live.tokens
            newest = jax.lax.dynamic_slice_in_dim(tokens, state.count - 1, 1, axis=2)
            logits, caches = session.step(
                newest[:, :, 0], state.caches, index=state.count - 1, ancestors=state.ancestors
            )
            state = dataclasses.replace(state, caches=caches)
            return self._extend(state, logits, session, eos_ids)

        state = jax.lax.while_loop(lambda state: ~jnp.all(state.done), run, state)
        chosen = state.ended
        if self.length_penalty == "gnmt":
            some = jnp.any(state.ended.taken, axis=1)
            chosen = _where(some, state.ended, state.live)
        chosen = jax.tree.map(lambda x: x[:, : self.num_returned], chosen)
        return Generated(
            tokens=chosen.tokens,
            lengths=chosen.lengths,
            token_log_probs=chosen.log_probs,
            scores=chosen.scores,
        )

    def _penalty(self, length: Any) -> Any:
        base = (5.0 + length) / 6.0 if self.length_penalty == "gnmt" else length
        return jnp.asarray(base, jnp.float32) ** self.alpha

    def _start(self, session: Session) -> _State:
        batch, beams = len(session.start), self.num_beams
        shape = (batch, beams, self.max_new_tokens)
        # One beam is alive: all are equal at the start.
        scores = jnp.full((batch, beams), UNLIKELY).at[:, 0].set(0.0)
        empty = _Hypotheses(
            tokens=jnp.zeros(shape, jnp.int32),
            log_probs=jnp.zeros(shape, jnp.float32),
            lengths=jnp.zeros(shape[:2], jnp.int32),
            scores=jnp.full((batch, beams), UNLIKELY),
            taken=jnp.zeros(shape[:2], bool),
        )
        own = jnp.broadcast_to(
            jnp.arange(beams, dtype=jnp.int32)[:, None], (batch, beams, session.slots)
        )
        return _State(
            count=jnp.int32(0),
            live=dataclasses.replace(empty, scores=scores),
            ended=empty,
            done=session.limits <= 0,
            ancestors=own,
            caches=session.caches,
        )

    def _extend(
        self,
        state: _State,
        logits: Float[Array, "batch beams vocab"],
        session: Session,
        eos_ids: Sequence[int],
    ) -> _State:
        """Follows every row's best continuations by one token."""
        beams, length = self.num_beams, state.count + 1
        candidates, parents, ends = self._candidates(state, logits, eos_ids)
        last = length >= session.limits
        may_end = ends
        if self.length_penalty == "power":
            ends = ends | last[:, None]
            may_end = ends & (jnp.arange(ends.shape[1]) < beams)
        # Of the candidates that have ended and of those found before, the best.
        ended = dataclasses.replace(
            candidates,
            scores=jnp.where(may_end, candidates.scores / self._penalty(length), -jnp.inf),
            taken=may_end,
        )
        ended = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), state.ended, ended)
        ended = ended.take(jax.lax.top_k(ended.scores, beams)[1])
        # Of the others, as many as there are beams.
        open_scores = jnp.where(ends, candidates.scores + UNLIKELY, candidates.scores)
        scores, chosen = jax.lax.top_k(open_scores, beams)
        live = dataclasses.replace(candidates.take(chosen), scores=scores)

        best, worst = live.scores[:, 0], jnp.min(ended.scores, axis=1)
        if self.length_penalty == "gnmt":
            hopeless = worst > best / self._penalty(session.limits + 1)
        else:
            hopeless = worst >= best / self._penalty(length)
        done = state.done | last | (hopeless & jnp.all(ended.taken, axis=1))
        ancestors = _take(state.ancestors, jnp.take_along_axis(parents, chosen, axis=1))
        slot = session.first_slot + state.count
        own = jnp.broadcast_to(
            jnp.arange(beams, dtype=jnp.int32)[:, None], (*parents.shape[:1], beams, 1)
        )
        return dataclasses.replace(
            state,
            count=length,
            live=_where(state.done, state.live, live),
            ended=_where(state.done, state.ended, ended),
            done=done,
            ancestors=jax.lax.dynamic_update_slice(ancestors, own, (0, 0, slot)),
        )

    def _candidates(
        self, state: _State, logits: jax.Array, eos_ids: Sequence[int]
    ) -> tuple[_Hypotheses, Int[Array, "batch candidates"], Bool[Array, "batch candidates"]]:
        """The best continuations of all beams, the beam of each, and whether its token is an end.

        So many that enough are open even if all beams have ended in every end token.
        """
        batch, beams, vocab = logits.shape
        log_probs = jax.nn.log_softmax(logits, axis=-1)
        totals = (log_probs + state.live.scores[:, :, None]).reshape(batch, -1)
        keep = min(beams * (1 + max(1, len(eos_ids))), beams * vocab)
        totals, index = jax.lax.top_k(totals, keep)
        parents, token = index // vocab, index % vocab
        log_prob = jnp.take_along_axis(log_probs.reshape(batch, -1), index, axis=1)
        place = (0, 0, state.count)
        taken = state.live.take(parents)
        candidates = _Hypotheses(
            tokens=jax.lax.dynamic_update_slice(taken.tokens, token[..., None], place),
            log_probs=jax.lax.dynamic_update_slice(taken.log_probs, log_prob[..., None], place),
            lengths=taken.lengths + 1,
            scores=totals,
            taken=taken.taken,
        )
        return candidates, parents, jnp.isin(token, jnp.asarray(eos_ids, jnp.int32))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("tokens", "log_probs", "lengths", "scores", "taken"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Hypotheses:
    """Several continuations of each prompt; places that are not `taken` hold none that ended."""

    tokens: Int[Array, "batch places new"]
    log_probs: Float[Array, "batch places new"]
    lengths: Int[Array, "batch places"]
    scores: Float[Array, "batch places"]
    taken: Bool[Array, "batch places"]

    def take(self, places: Int[Array, "batch chosen"]) -> _Hypotheses:
        return jax.tree.map(lambda x: _take(x, places), self)


def _take(x: jax.Array, places: Int[Array, "batch chosen"]) -> jax.Array:
    """Of every row the given places of axis 1."""
    at = places.reshape(*places.shape, *[1] * (x.ndim - 2))
    return jnp.take_along_axis(x, at, axis=1)


def _where(condition: Bool[Array, " batch"], x: _Hypotheses, y: _Hypotheses) -> _Hypotheses:
    """Row by row, one or the other."""

    def pick(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(condition.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return jax.tree.map(pick, x, y)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("count", "live", "ended", "done", "ancestors", "caches"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class _State:
    """Of the loop over tokens: `count` of them were chosen; `live` scores are log-probabilities."""

    count: Int[Array, ""]
    live: _Hypotheses
    ended: _Hypotheses
    done: Bool[Array, " batch"]
    ancestors: Int[Array, "batch beams slots"]
    caches: Caches
