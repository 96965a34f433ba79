"""Bringing tokens to experts and back: four ways, one result where nothing is dropped."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from t5x_like.errors import UserError
from t5x_like.kernels.grouped_matmul import (
    BACKENDS,
    Groups,
    block_rows,
    choose_backend,
    grouped_matmul,
    like_varying,
)
from t5x_like.layers.checks import check_choice, check_number, check_positive_ints
from t5x_like.layers.mlp import MlpConfig
from t5x_like.layers.moe.assignment import Assignments, Placement, gather, place, spread
from t5x_like.layers.moe.experts import Dropout, apply_experts
from t5x_like.parallel import exchange

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DispatcherConfig:
    """How tokens get to their experts.

    Attributes:
      kind: `dropless` sorts the tokens of a device by expert and multiplies group by group;
        `capacity` gives every expert a fixed number of rows in each group of tokens, and what
        finds no room goes past the experts on the residual stream; `dense` runs every expert on
        every token, for reference.
      exchange: where the mesh has an `expert` axis, `all_to_all` sends tokens to their experts and
        back, `all_gather` brings all tokens of that axis to every device, each of which adds its
        experts' part (reduce-scatter): the cheaper one where a token has about as many experts as
        the axis has devices. None for all_to_all with capacity, all_gather without: dropless
        all_to_all reserves rows for the case that all tokens go to one device.
      matmul: `ragged` or `blocked` (see `kernels.grouped_matmul`), or `auto`; of dropless.
      capacity_factor, eval_capacity_factor: rows that an expert has in a group of n real tokens
        (padding has none): round(factor * n / num_experts) - flaxformer's formula, without k.
        The second holds without dropout; None for the first.
      min_capacity: fewest rows of an expert; None for flaxformer's 4.
    """

    kind: Literal["dropless", "capacity", "dense"] = "dropless"
    exchange: Literal["all_to_all", "all_gather"] | None = None
    matmul: Literal["auto", "ragged", "blocked"] = "auto"
    capacity_factor: float | None = None
    eval_capacity_factor: float | None = None
    min_capacity: int | None = None

    def __post_init__(self) -> None:
        check_choice(self, "kind", ("dropless", "capacity", "dense"))
        check_choice(self, "matmul", BACKENDS)
        if self.exchange is not None:
            check_choice(self, "exchange", ("all_to_all", "all_gather"))
        self._refuse("matmul", "auto", "dropless")
        if self.kind == "dense":
            self._refuse("exchange", None, "dropless' or 'capacity")
        for name in ("capacity_factor", "eval_capacity_factor", "min_capacity"):
            self._refuse(name, None, "capacity")
        if self.kind != "capacity":
            return
        if self.capacity_factor is None:
            raise UserError(
                "DispatcherConfig.kind is 'capacity' and capacity_factor None; "
                "give a number, such as 1.25"
            )
        check_number(self, "capacity_factor", low=1e-6)
        if self.eval_capacity_factor is not None:
            check_number(self, "eval_capacity_factor", low=1e-6)
        if self.min_capacity is not None:
            check_positive_ints(self, "min_capacity")

    def _refuse(self, name: str, unset: Any, kind: str) -> None:
        """Raises UserError where a field is set that another kind of dispatcher has."""
        value = getattr(self, name)
        if value != unset and self.kind not in kind.split("' or '"):
            raise UserError(
                f"DispatcherConfig.{name} is {value!r} and kind {self.kind!r}, which has none: "
                f"leave it out, or choose kind '{kind}'"
            )

    def factor(self, *, training: bool) -> float:
        """The capacity factor in force."""
        evaluated = self.eval_capacity_factor
        factor = self.capacity_factor if training or evaluated is None else evaluated
        assert factor is not None
        return factor

    def without_dropping(self) -> DispatcherConfig:
        """For generation: a token alone in its group would not compete for capacity either."""
        if self.kind != "capacity":
            return self
        return DispatcherConfig(exchange=self.exchange)

    def how(self) -> Literal["all_to_all", "all_gather"]:
        """The exchange in force."""
        return self.exchange or ("all_to_all" if self.kind == "capacity" else "all_gather")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dispatcher:
    """Runs tokens through experts as configured.

    Attributes:
      config: how.
      mlp: the shape of an expert.
      num_experts: how many there are.
      capacity: rows an expert has in a group, where that is limited.
      dropout_rate: of the hidden layer; None for no dropout.
    """

    config: DispatcherConfig
    mlp: MlpConfig
    num_experts: int
    capacity: int | None
    dropout_rate: float | None

    def __call__(
        self,
        x: Float[Array, "groups tokens embed"],
        pairs: Assignments,
        arrays: dict[str, Any],
        key: jax.Array | None,
    ) -> Float[Array, "groups tokens embed"]:
        """The weighted sum of its experts' outputs for every token."""
        groups, tokens, _ = x.shape
        ids = jnp.arange(groups * tokens, dtype=jnp.int32).reshape(groups, tokens)
        key = None if self.dropout_rate is None else key
        if self.config.kind == "dense":
            _announce_dense()
            return self._dense(x, pairs, arrays, ids, key)
        work = self._sharded
        return exchange.over_tokens(
            work, (x, pairs, ids), arrays, key, num_experts=self.num_experts
        )

    def _sharded(self, tokens: Any, arrays: dict[str, Any], key: Any, degree: int) -> jax.Array:
        """A device's part: its groups of tokens, and its part of `degree` of the experts."""
        _announce(self.config, degree, jax.default_backend())
        x, pairs, ids = tokens
        if degree == 1:
            return self._local(x, pairs, arrays, ids, key, first_expert=0)
        count = self.num_experts // degree
        first = exchange.expert_index() * count
        if self.config.how() == "all_gather":
            x, pairs, ids = jax.tree.map(exchange.all_gather, (x, pairs, ids))
            mine = (pairs.expert >= first) & (pairs.expert < first + count)
            pairs = dataclasses.replace(pairs, expert=jnp.where(mine, pairs.expert - first, count))
            y = self._local(x, pairs, arrays, ids, key, first_expert=first)
            return exchange.reduce_scatter(y)
        if self.capacity is not None:
            return self._limited(x, pairs, arrays, ids, key, first_expert=first, degree=degree)
        return self._sent(x, pairs, arrays, ids, key, first_expert=first, degree=degree)

    def _local(
        self,
        x: jax.Array,
        pairs: Assignments,
        arrays: dict[str, Any],
        ids: jax.Array,
        key: Any,
        *,
        first_expert: Any,
    ) -> jax.Array:
        """All experts of `arrays` on all groups; `pairs` counts experts from `first_expert`."""
        if self.capacity is not None:
            return self._limited(x, pairs, arrays, ids, key, first_expert=first_expert, degree=1)
        flat = x.reshape(-1, x.shape[-1])
        merged = pairs.merged(x.shape[1])
        y = self._sorted(flat, merged, arrays, ids.reshape(-1), key, first_expert=first_expert)
        return y.reshape(x.shape)

    def _sorted(
        self,
        x: Float[Array, "tokens embed"],
        pairs: Assignments,
        arrays: dict[str, Any],
        ids: Int[Array, " tokens"],
        key: Any,
        *,
        first_expert: Any,
    ) -> Float[Array, "tokens embed"]:
        """Dropless: rows sorted by expert, multiplied group by group."""
        num_experts, num_pairs = len(arrays["wo"][0]), pairs.expert.shape[-1]
        backend, _ = choose_backend(self.config.matmul, jax.default_backend())
        block = block_rows(backend, rows=num_pairs, groups=num_experts)
        groups: Groups | None = None

        def layout(counts: jax.Array) -> Groups:
            nonlocal groups
            groups = Groups.of(counts, total=num_pairs, block=block)
            return groups

        placed = place(pairs, num_experts=num_experts, num_tokens=len(x), layout=layout)
        assert groups is not None
        y = apply_experts(
            self.mlp,
            arrays,
            spread(x, placed),
            multiply=functools.partial(_grouped, groups),
            expert=placed.expert,
            drop=self._dropout(key, _tokens_of(ids, placed), placed.expert + first_expert),
        )
        return gather(y * placed.weight[:, None].astype(y.dtype), placed, num_tokens=len(x))

    def _limited(
        self,
        x: Float[Array, "groups tokens embed"],
        pairs: Assignments,
        arrays: dict[str, Any],
        ids: Int[Array, "groups tokens"],
        key: Any,
        *,
        first_expert: Any,
        degree: int,
    ) -> Float[Array, "groups tokens embed"]:
        """With capacity: `capacity` rows for every group and expert, exchanged if degree > 1."""
        assert self.capacity is not None and pairs.limit is not None
        num_groups, num_tokens, embed = x.shape
        count = len(arrays["wo"][0])
        placed = _place_limited(pairs, count * degree, num_tokens, self.capacity)
        flat = x.reshape(-1, embed)
        token = _tokens_of(ids.reshape(-1), placed)
        rows_shape = (count * degree, num_groups * self.capacity)
        rows = spread(flat, placed).reshape(*rows_shape, embed)
        if degree > 1:
            rows = exchange.all_to_all(rows, split=0, concat=1)
            token = exchange.all_to_all(token.reshape(rows_shape), split=0, concat=1).reshape(-1)
        per_expert = rows.shape[1]
        expert = like_varying(jnp.repeat(jnp.arange(count, dtype=jnp.int32), per_expert), x)
        y = apply_experts(
            self.mlp,
            arrays,
            rows.reshape(-1, embed),
            multiply=_batched,
            expert=expert,
            drop=self._dropout(key, token, expert + first_expert),
        )
        if degree > 1:
            y = exchange.all_to_all(y.reshape(count, per_expert, embed), split=1, concat=0)
            y = y.reshape(-1, embed)
        y = gather(y * placed.weight[:, None].astype(y.dtype), placed, num_tokens=len(flat))
        return y.reshape(x.shape)

    def _sent(
        self,
        x: jax.Array,
        pairs: Assignments,
        arrays: dict[str, Any],
        ids: jax.Array,
        key: Any,
        *,
        first_expert: Any,
        degree: int,
    ) -> jax.Array:
        """Dropless all-to-all: rows sorted by device, sent, sorted by expert there, sent back."""
        flat, count = x.reshape(-1, x.shape[-1]), len(arrays["wo"][0])
        pairs = pairs.merged(x.shape[1])
        room = len(pairs.expert)  # all of them may go to one device
        placed = place(
            pairs,
            num_experts=degree,
            num_tokens=len(flat),
            layout=_slots(degree, room, None),
            destination=pairs.expert // count,
        )

        def send(rows: jax.Array) -> jax.Array:
            split = rows.reshape(degree, room, *rows.shape[1:])
            return exchange.all_to_all(split, split=0, concat=0).reshape(rows.shape)

        token = send(_tokens_of(ids.reshape(-1), placed))
        rows, expert = send(spread(flat, placed)), send(placed.expert)
        here = Assignments(
            token=like_varying(jnp.arange(len(rows), dtype=jnp.int32), x),
            expert=jnp.where(expert >= 0, expert - first_expert, count),
            weight=jnp.where(expert >= 0, 1.0, 0.0),
            priority=None,
            choices=1,
        )
        y = send(self._sorted(rows, here, arrays, token, key, first_expert=first_expert))
        y = gather(y * placed.weight[:, None].astype(y.dtype), placed, num_tokens=len(flat))
        return y.reshape(x.shape)

    def _dense(
        self,
        x: jax.Array,
        pairs: Assignments,
        arrays: dict[str, Any],
        ids: jax.Array,
        key: Any,
    ) -> jax.Array:
        """Every expert on every token, and a matrix of weights that is mostly zero."""
        groups, tokens, embed = x.shape
        flat = jnp.broadcast_to(x.reshape(1, -1, embed), (self.num_experts, groups * tokens, embed))
        expert = jnp.repeat(jnp.arange(self.num_experts, dtype=jnp.int32), groups * tokens)
        y = apply_experts(
            self.mlp,
            arrays,
            flat.reshape(-1, embed),
            multiply=_batched,
            expert=expert,
            drop=self._dropout(key, jnp.tile(ids.reshape(-1), self.num_experts), expert),
        ).reshape(self.num_experts, groups, tokens, embed)
        group = jnp.arange(groups)[:, None]
        weights = jnp.zeros((groups, tokens, self.num_experts), pairs.weight.dtype)
        weights = weights.at[group, pairs.token, pairs.expert].add(pairs.weight, mode="drop")
        return jnp.einsum("egtd,gte->gtd", y, weights.astype(y.dtype))

    def _dropout(
        self, key: Any, token: jax.Array, expert: jax.Array
    ) -> Callable[[jax.Array], jax.Array]:
        if key is None:
            return lambda hidden: hidden
        assert self.dropout_rate is not None
        drop = Dropout(rate=self.dropout_rate, key=key)
        return lambda hidden: drop(hidden, token, expert)


@functools.cache
def _announce_dense() -> None:
    logger.info("Experts: dispatcher dense, as configured: every expert works on every token")


@functools.cache
def _announce(config: DispatcherConfig, degree: int, platform: str) -> None:
    """Logs once how tokens get to their experts, and why so."""
    words = [f"dispatcher {config.kind}"]
    if degree == 1:
        words.append("no exchange (the mesh has no expert axis)")
    else:
        why = "as configured" if config.exchange else f"the default with {config.kind}"
        words.append(f"exchange {config.how()} over the expert axis of {degree} ({why})")
    if config.kind == "capacity":
        words.append("batched matmul (every expert has as many rows)")
    else:
        backend, why = choose_backend(config.matmul, platform)
        words.append(f"grouped matmul {backend} ({why})")
    logger.info("Experts on %s: %s", platform, ", ".join(words))


def _grouped(groups: Groups, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return grouped_matmul(x, kernel, groups)


def _batched(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Rows are as many for every expert."""
    y = jnp.einsum("eni,eio->eno", x.reshape(len(kernel), -1, x.shape[-1]), kernel)
    return y.reshape(-1, y.shape[-1])


def _tokens_of(ids: Int[Array, " tokens"], placed: Placement) -> Int[Array, " rows"]:
    return ids.at[placed.token].get(mode="fill", fill_value=0)


def _slots(
    num_experts: int, capacity: int, limit: jax.Array | None
) -> Callable[[jax.Array], Groups]:
    """The layout of `capacity` rows for every expert, of which `limit` are used at most."""

    def layout(counts: jax.Array) -> Groups:
        starts = jnp.arange(num_experts, dtype=jnp.int32) * capacity
        sizes = jnp.minimum(counts, capacity if limit is None else limit)
        return Groups(starts=starts, sizes=sizes, num_rows=num_experts * capacity, block=0)

    return layout


def _place_limited(
    pairs: Assignments, num_experts: int, num_tokens: int, capacity: int
) -> Placement:
    """All groups' placements, each with `capacity` rows an expert, as one, expert by expert."""

    def one(pairs: Assignments) -> Placement:
        layout = _slots(num_experts, capacity, pairs.limit)
        return place(pairs, num_experts=num_experts, num_tokens=num_tokens, layout=layout)

    return jax.vmap(one)(pairs).merged(num_tokens, num_experts)


def dropped(pairs: Assignments, *, num_experts: int) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Pairs that find no room, and all pairs; both add up over groups."""
    experts = jnp.arange(num_experts)
    counts = jnp.sum(pairs.expert[..., None] == experts, axis=1, dtype=jnp.float32)
    total = jnp.sum(counts)
    if pairs.limit is None:
        return jnp.float32(0), total
    return jnp.sum(jnp.maximum(counts - pairs.limit[:, None], 0)), total


def limits(table: np.ndarray, real: jax.Array) -> Int[Array, " groups"]:
    """Every group's capacity, by its number of real tokens."""
    return jnp.asarray(table)[jnp.sum(real, axis=1)]
