"""Which token goes to which expert, and where its row lies among the rows of that expert."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_like.kernels.grouped_matmul import Groups, like_varying


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("token", "expert", "weight", "priority", "limit"),
    meta_fields=("choices",),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Assignments:
    """Pairs of a token and an expert, in groups of tokens that are dispatched apart.

    Attributes:
      token: index of the token in its group.
      expert: the expert; `num_experts` stands for none (padding, or a choice that was not taken).
      weight: factor of the expert's output in the token's.
      priority: within a group, an expert with too many tokens keeps those of lowest priority;
        None for the order of the pairs.
      limit: how many tokens each expert of a group may take, if the dispatcher limits it.
      choices: k where every token has k pairs and pair `j * tokens + t` is choice j of token t;
        None where experts choose tokens.
    """

    token: Int[Array, "groups pairs"]
    expert: Int[Array, "groups pairs"]
    weight: Float[Array, "groups pairs"]
    priority: Int[Array, "groups pairs"] | None
    limit: Int[Array, " groups"] | None = None
    choices: int | None

    def merged(self, tokens: int) -> Assignments:
        """All groups, of `tokens` tokens each, as one without a leading dim; not if limited."""
        assert self.limit is None
        first = jnp.arange(len(self.token), dtype=jnp.int32)[:, None] * tokens
        pairs = (self.token + first, self.expert, self.weight)
        if self.choices is None:
            token, expert, weight = (x.reshape(-1) for x in pairs)
        else:  # choice j of all tokens of all groups stays in front of choice j + 1
            k = self.choices
            split = (x.reshape(-1, k, tokens).swapaxes(0, 1) for x in pairs)
            token, expert, weight = (x.reshape(-1) for x in split)
        return dataclasses.replace(
            self, token=token, expert=expert, weight=weight, priority=None, limit=None
        )


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("token", "expert", "weight", "rows_of_token"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """Which token lies in which row.

    Attributes:
      token: the token of each row; the number of tokens for an empty row.
      expert: the expert of each row's pair; -1 for an empty row.
      weight: the weight of each row's pair, 0 for an empty row.
      rows_of_token: the rows of each token, one a choice, the number of rows where it has none;
        None where experts choose tokens.
    """

    token: Int[Array, " rows"]
    expert: Int[Array, " rows"]
    weight: Float[Array, " rows"]
    rows_of_token: Int[Array, "tokens choices"] | None

    def merged(self, tokens: int, num_experts: int) -> Placement:
        """Many groups of `tokens` tokens as one; rows [group, expert, slot] -> expert first."""
        groups, rows = self.token.shape
        slots = rows // num_experts
        group = jnp.arange(groups, dtype=jnp.int32)[:, None]

        def expert_first(x: jax.Array) -> jax.Array:
            return x.reshape(groups, num_experts, slots).swapaxes(0, 1).reshape(-1)

        inverse = self.rows_of_token
        if inverse is not None:
            row = inverse.reshape(groups, -1)
            expert, slot = jnp.divmod(row, slots)
            row = jnp.where(row < rows, (expert * groups + group) * slots + slot, groups * rows)
            inverse = row.reshape(groups * tokens, -1)
        token = jnp.where(self.token < tokens, self.token + group * tokens, groups * tokens)
        return Placement(
            token=expert_first(token),
            expert=expert_first(self.expert),
            weight=expert_first(self.weight),
            rows_of_token=inverse,
        )


def count(expert: Int[Array, " pairs"], *, num_experts: int) -> Int[Array, " experts"]:
    """How many pairs every expert has."""
    return jnp.sum(expert[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)


def place(
    pairs: Assignments,
    *,
    num_experts: int,
    num_tokens: int,
    layout: Callable[[Int[Array, " experts"]], Groups],
    destination: Int[Array, " pairs"] | None = None,
) -> Placement:
    """Lays the pairs of one group of tokens (no leading dim) out in rows, expert by expert.

    Memory and time grow with the number of pairs and rows only.

    Args:
      pairs: where tokens go.
      num_experts: of them.
      num_tokens: in the group.
      layout: gives, for the number of pairs of every expert, where their rows start and how many
        of them there is room for (`sizes`).
      destination: goes by this, in place of the pairs' experts, if given.
    """
    goal = pairs.expert if destination is None else destination
    num_pairs = len(pairs.expert)
    index = jnp.arange(num_pairs, dtype=jnp.int32)
    keys = (goal,) if pairs.priority is None else (goal, pairs.priority)
    *_, order = jax.lax.sort((*keys, like_varying(index, goal)), num_keys=len(keys))
    counts = count(goal, num_experts=num_experts)
    groups = layout(counts)
    first = jnp.cumsum(counts) - counts  # where an expert's pairs begin in `order`

    row = like_varying(jnp.arange(groups.num_rows, dtype=jnp.int32), order)
    owner = groups.of_rows(row)
    rank = row - groups.starts[owner]
    pair = order.at[first[owner] + rank].get(mode="fill", fill_value=num_pairs)
    pair = jnp.where(rank < groups.sizes[owner], pair, num_pairs)

    def of_pair(values: jax.Array, empty: int) -> jax.Array:
        return values.at[pair].get(mode="fill", fill_value=empty)

    inverse = None
    if pairs.choices is not None:
        sorted_goal = goal[order]
        real = sorted_goal < num_experts
        owner = jnp.where(real, sorted_goal, 0)
        rank = index - first[owner]
        kept = real & (rank < groups.sizes[owner])
        rows = jnp.where(kept, groups.starts[owner] + rank, groups.num_rows)
        by_pair = jnp.zeros_like(rows).at[order].set(rows, unique_indices=True)
        inverse = by_pair.reshape(pairs.choices, -1).T
    return Placement(
        token=of_pair(pairs.token, num_tokens),
        expert=of_pair(pairs.expert, -1),
        weight=of_pair(pairs.weight, 0),
        rows_of_token=inverse,
    )


def spread(x: Float[Array, "tokens width"], placed: Placement) -> Float[Array, "rows width"]:
    """The token of every row; zeros in an empty row. `gather` is its transpose."""
    if (inverse := placed.rows_of_token) is None:
        return _take(x, placed.token)
    return _spread(x, placed.token, inverse)


def gather(
    rows: Float[Array, "rows width"], placed: Placement, *, num_tokens: int
) -> Float[Array, "tokens width"]:
    """For every token the sum of its rows; zeros for a token that has none."""
    if (inverse := placed.rows_of_token) is None:
        zeros = like_varying(jnp.zeros((num_tokens, rows.shape[1]), rows.dtype), rows)
        return zeros.at[placed.token].add(rows, mode="drop")
    return _gather(rows, placed.token, inverse)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    return x.at[index].get(mode="fill", fill_value=0)


# Differentiating a gather gives a scatter-add, which is slow. Both tables are at hand, so each
# direction is a gather, forward and backward.
@jax.custom_vjp
def _spread(x: jax.Array, token: jax.Array, inverse: jax.Array) -> jax.Array:
    return _take(x, token)


@jax.custom_vjp
def _gather(rows: jax.Array, token: jax.Array, inverse: jax.Array) -> jax.Array:
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    parts = [_take(rows, inverse[:, j]).astype(wide) for j in range(inverse.shape[1])]
    return sum(parts[1:], parts[0]).astype(rows.dtype)


_spread.defvjp(
    lambda x, token, inverse: (_spread(x, token, inverse), (token, inverse)),
    lambda tables, grad: (_gather(grad, *tables), None, None),
)
_gather.defvjp(
    lambda rows, token, inverse: (_gather(rows, token, inverse), (token, inverse)),
    lambda tables, grad: (_spread(grad, *tables), None, None),
)
