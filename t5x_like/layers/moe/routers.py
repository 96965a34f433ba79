"""Routers: which experts a token goes to, with what weights, and what that costs in balance.

All of it in float32. A group is a row of the batch or a part of one, so that neither dropping nor
the balance losses depend on devices or microbatches.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from t5x_like.errors import UserError
from t5x_like.layers.checks import check_bools, check_choice, check_number, check_positive_ints
from t5x_like.layers.moe.assignment import Assignments
from t5x_like.layers.parameter import ModelState, in_use, parameter

logger = logging.getLogger(__name__)

# Sums over tokens (or pairs) and what they are sums of: both add up over everything.
Pair = tuple[Float[Array, ""], Float[Array, ""]]
Statistics = dict[str, Pair]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routed:
    """What a router decided.

    Attributes:
      pairs: tokens and experts.
      selected: how many real tokens of each group chose each expert, before any is dropped.
      losses: `auxiliary_loss`, the weighted sum of those named after it, and these.
      statistics: entropy of the router's distribution in nats, and its largest probability.
    """

    pairs: Assignments
    selected: Float[Array, "groups experts"]
    losses: Statistics
    statistics: Statistics


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopKRouter:
    """Every token takes the k experts with the highest softmax probability.

    k = 1 with jitter is Switch (Fedus et al. 2021, arXiv:2101.03961); k = 2, renormalised, with
    random_second is GShard (Lepikhin et al. 2020, arXiv:2006.16668) and GLaM; k = 2 with scoring
    'selected' is Mixtral; k = 8, renormalised, is Qwen3; prioritised is Riquelme et al. 2021
    (arXiv:2106.05974).

    Attributes:
      k: experts of a token.
      scoring: `all` takes the weights from a softmax over all experts, `selected` from one over
        the k logits alone.
      renormalize: divide a token's weights by their sum.
      scale: multiplies the weights.
      num_groups, top_groups: if above 1, only experts of the `top_groups` best of `num_groups`
        equal groups of experts may be chosen, ranked by their best expert (DeepSeek-V2).
      jitter: in training, inputs of the router are multiplied by U(1 - jitter, 1 + jitter).
      random_second: in training, the second expert is used with probability min(1, 2 * its
        normalised weight). Needs k = 2.
      prioritized: where an expert is full, it keeps the tokens of the highest probability instead
        of the first ones. Which these are depends on later tokens.
      balance_loss, z_loss: coefficients of the losses below.
      force_balance: for benchmarks: experts get tokens in turn, whatever their scores.
    """

    k: int
    scoring: Literal["all", "selected"] = "all"
    renormalize: bool = False
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    jitter: float = 0.0
    random_second: bool = False
    prioritized: bool = False
    balance_loss: float = 0.01
    z_loss: float = 0.0
    force_balance: bool = False

    causal = True

    def __post_init__(self) -> None:
        check_positive_ints(self, "k", "num_groups", "top_groups")
        check_choice(self, "scoring", ("all", "selected"))
        check_bools(self, "renormalize", "random_second", "prioritized", "force_balance")
        check_number(self, "jitter", low=0.0, high=1.0)
        for name in ("scale", "balance_loss", "z_loss"):
            check_number(self, name, low=0.0)
        if self.random_second and self.k != 2:
            raise UserError(f"TopKRouter.random_second needs k = 2, and k is {self.k}")

    def check(self, num_experts: int) -> None:
        """Raises UserError unless so many experts can be routed to."""
        _check_top_k(self, num_experts)

    def build(self, *, embed_dim: int, num_experts: int) -> nnx.Module:
        return _TopK(self, embed_dim=embed_dim, num_experts=num_experts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SigmoidRouter:
    """DeepSeek-V3's router (arXiv:2412.19437, section 2.1.2): sigmoid scores, balanced by a bias.

    The bias of an expert is added to its scores where experts are chosen, not to the weights.
    After every step it rises by `bias_rate` for experts that had fewer tokens of the global batch
    than the mean, and falls for those that had more. It is no parameter: it has no gradient.

    Attributes:
      k: experts of a token.
      num_groups, top_groups: as in `TopKRouter`, ranked by the sum of their two best experts.
      renormalize: divide a token's weights by their sum.
      scale: multiplies the weights.
      bias_rate: step of the bias; 0 leaves it at zero.
      sequence_loss, z_loss: coefficients; `sequence_loss` is the balance of each row.
      force_balance: as of `TopKRouter`.
    """

    k: int
    num_groups: int = 1
    top_groups: int = 1
    renormalize: bool = True
    scale: float = 1.0
    bias_rate: float = 0.001
    sequence_loss: float = 1e-4
    z_loss: float = 0.0
    force_balance: bool = False

    causal = True

    def __post_init__(self) -> None:
        check_positive_ints(self, "k", "num_groups", "top_groups")
        check_bools(self, "renormalize", "force_balance")
        for name in ("scale", "bias_rate", "sequence_loss", "z_loss"):
            check_number(self, name, low=0.0)

    def check(self, num_experts: int) -> None:
        """Raises UserError unless so many experts can be routed to."""
        _check_top_k(self, num_experts)
        if self.num_groups > 1 and num_experts // self.num_groups < 2:
            raise UserError(
                f"SigmoidRouter ranks groups by their two best experts, and num_groups "
                f"{self.num_groups} leaves {num_experts // self.num_groups} of {num_experts} "
                "experts in each; choose fewer groups"
            )

    def build(self, *, embed_dim: int, num_experts: int) -> nnx.Module:
        return _Sigmoid(self, embed_dim=embed_dim, num_experts=num_experts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertChoiceRouter:
    """Every expert takes the tokens that score highest with it (Zhou et al. 2022, 2202.09368).

    Balanced by construction. An expert sees a whole group to choose, later tokens too: for
    encoders.

    Attributes:
      capacity_factor: mean number of experts a token has; an expert of a group of n real tokens
        takes round(capacity_factor * n / num_experts), at least one.
      z_loss: coefficient.
    """

    capacity_factor: float = 1.0
    z_loss: float = 0.0

    causal = False

    def __post_init__(self) -> None:
        check_number(self, "capacity_factor", low=1e-6)
        check_number(self, "z_loss", low=0.0)

    def check(self, num_experts: int) -> None:
        """Raises UserError unless so many experts can be routed to."""
        if self.capacity_factor > num_experts:
            raise UserError(
                f"ExpertChoiceRouter.capacity_factor {self.capacity_factor:g} is above "
                f"MoeConfig.num_experts {num_experts}: a token has each expert once at most; "
                f"choose at most {num_experts}"
            )

    def build(self, *, embed_dim: int, num_experts: int) -> nnx.Module:
        return _ExpertChoice(self, embed_dim=embed_dim, num_experts=num_experts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HashRouter:
    """The token's id decides (Roller et al. 2021, arXiv:2106.04426): nothing to learn.

    Attributes:
      seed: of the hash function.
    """

    seed: int = 0

    causal = True

    def check(self, num_experts: int) -> None:
        """Any number of experts will do."""

    def build(self, *, embed_dim: int, num_experts: int) -> nnx.Module:
        return _Hash(self, num_experts=num_experts)


RouterConfig = TopKRouter | SigmoidRouter | ExpertChoiceRouter | HashRouter


@functools.cache
def _warn_of_force() -> None:
    logger.warning(
        "Experts: force_balance is on: tokens go to experts in turn, not by their scores. This "
        "is for benchmarks: such a model learns no routing."
    )


def _check_top_k(config: TopKRouter | SigmoidRouter, num_experts: int) -> None:
    name, groups, top = type(config).__name__, config.num_groups, config.top_groups
    if config.k > num_experts:
        raise UserError(
            f"{name}.k {config.k} is above MoeConfig.num_experts {num_experts}: "
            f"choose k of at most {num_experts}, or more experts"
        )
    if num_experts % groups or top > groups:
        raise UserError(
            f"{name} cannot choose {top} of {groups} groups of {num_experts} experts: num_groups "
            "must divide num_experts, and top_groups be at most num_groups"
        )
    if config.k > num_experts // groups * top:
        raise UserError(
            f"{name}.k {config.k} is above the {num_experts // groups * top} experts in "
            f"top_groups {top} of num_groups {groups}: choose a smaller k or more top_groups"
        )


def capacities(factor: float, *, num_experts: int, group: int, least: int) -> np.ndarray:
    """Capacity of an expert for 0, 1, ..., `group` real tokens in a group.

    `round(factor * tokens / num_experts)` (halves to even), at least `least`, at most all tokens.
    """
    tokens = np.arange(group + 1)
    rounded = np.rint(factor * tokens / num_experts).astype(np.int32)
    return np.minimum(np.maximum(rounded, least), tokens)


class _Scores(nnx.Module):
    """The projection that all learned routers share."""

    def __init__(self, config: Any, *, embed_dim: int, num_experts: int) -> None:
        self.config, self.num_experts = config, num_experts
        self.kernel = parameter(
            (embed_dim, num_experts),
            logical_axes=("embed", None),
            initializer=jax.nn.initializers.normal(0.02),
        )

    def logits(
        self, x: Float[Array, "groups tokens embed"]
    ) -> Float[Array, "groups tokens experts"]:
        wide = jnp.promote_types(x.dtype, jnp.float32)
        kernel = in_use(self.kernel, wide)
        return jnp.matmul(x.astype(wide), kernel, precision=jax.lax.Precision.HIGHEST)

    def chosen(
        self, ranked: Float[Array, "groups tokens experts"], real: Bool[Array, "groups tokens"]
    ) -> Int[Array, "groups tokens k"]:
        """The k experts that rank highest; in turn where balance is forced."""
        k = self.config.k
        best = jax.lax.top_k(ranked, k)[1]
        if not self.config.force_balance:
            return best
        _warn_of_force()
        groups, tokens = real.shape
        # Groups of different numbers of real tokens begin at different experts.
        first = jnp.arange(groups)[:, None] * tokens + jnp.cumsum(real, axis=1) - real
        turn = (first[..., None] * k + jnp.arange(k)) % self.num_experts
        return turn + 0 * best  # Scores are ranked all the same: the cost is that of routing.


class _TopK(_Scores):
    def __call__(
        self,
        x: Float[Array, "groups tokens embed"],
        *,
        real: Bool[Array, "groups tokens"],
        rows: int,
        token_ids: Int[Array, "groups tokens"] | None,
        key: jax.Array | None,
    ) -> Routed:
        config: TopKRouter = self.config
        if key is not None and config.jitter:
            low, high = 1 - config.jitter, 1 + config.jitter
            noise = jax.random.uniform(jax.random.fold_in(key, 0), x.shape, minval=low, maxval=high)
            x = x * noise.astype(jnp.promote_types(x.dtype, jnp.float32))
        logits = self.logits(x)
        probabilities = jax.nn.softmax(logits, axis=-1)
        allowed = _best_groups(probabilities, config, top=1)
        expert = self.chosen(allowed, real)
        if config.scoring == "selected":
            weight = jax.nn.softmax(_pick(logits, expert), axis=-1)
        else:
            weight = _pick(probabilities, expert)
        weight = _scaled(weight, config.renormalize, config.scale)
        selected = _selected(expert, real, self.num_experts)
        taken = jnp.broadcast_to(real[..., None], expert.shape)
        if key is not None and config.random_second:
            share = weight[..., 1] / jnp.sum(weight, axis=-1)
            drawn = jax.random.uniform(jax.random.fold_in(key, 1), share.shape)
            taken = taken.at[..., 1].set(taken[..., 1] & (drawn < 2 * share))
        balance = _balance(selected, probabilities, real, factor=self.num_experts)
        losses = {
            "load_balance_loss": (config.balance_loss, balance),
            "router_z_loss": (config.z_loss, _z_loss(logits, real)),
        }
        best = jnp.max(probabilities, axis=-1) if config.prioritized else None
        return Routed(
            pairs=_token_pairs(expert, weight, taken, self.num_experts, best),
            selected=selected,
            losses=_weighted(losses),
            statistics=_distribution(probabilities, real),
        )


class _Sigmoid(_Scores):
    def __init__(self, config: SigmoidRouter, *, embed_dim: int, num_experts: int) -> None:
        super().__init__(config, embed_dim=embed_dim, num_experts=num_experts)
        self.balance_bias = parameter(
            (num_experts,),
            logical_axes=(None,),
            initializer=jax.nn.initializers.zeros,
            kind=ModelState,
        )

    def __call__(
        self,
        x: Float[Array, "groups tokens embed"],
        *,
        real: Bool[Array, "groups tokens"],
        rows: int,
        token_ids: Int[Array, "groups tokens"] | None,
        key: jax.Array | None,
    ) -> Routed:
        config: SigmoidRouter = self.config
        logits = self.logits(x)
        scores = jax.nn.sigmoid(logits)
        biased = scores + jax.lax.stop_gradient(self.balance_bias[...].astype(scores.dtype))
        expert = self.chosen(_best_groups(biased, config, top=2), real)
        weight = _scaled(_pick(scores, expert), config.renormalize, config.scale)
        selected = _selected(expert, real, self.num_experts)
        shares = scores / jnp.sum(scores, axis=-1, keepdims=True)
        by_row = [y.reshape(rows, -1, *y.shape[2:]) for y in (shares, real)]
        per_row = jnp.sum(selected.reshape(rows, -1, self.num_experts), axis=1)
        balance = _balance(per_row, *by_row, factor=self.num_experts / config.k)
        losses = {
            "sequence_loss": (config.sequence_loss, balance),
            "router_z_loss": (config.z_loss, _z_loss(logits, real)),
        }
        taken = jnp.broadcast_to(real[..., None], expert.shape)
        return Routed(
            pairs=_token_pairs(expert, weight, taken, self.num_experts, None),
            selected=selected,
            losses=_weighted(losses),
            statistics=_distribution(shares, real),
        )


class _ExpertChoice(_Scores):
    def __call__(
        self,
        x: Float[Array, "groups tokens embed"],
        *,
        real: Bool[Array, "groups tokens"],
        rows: int,
        token_ids: Int[Array, "groups tokens"] | None,
        key: jax.Array | None,
    ) -> Routed:
        config: ExpertChoiceRouter = self.config
        groups, tokens, _ = x.shape
        logits = self.logits(x)
        probabilities = jax.nn.softmax(logits, axis=-1)
        table = capacities(
            config.capacity_factor, num_experts=self.num_experts, group=tokens, least=1
        )
        ranked = jnp.where(real[..., None], probabilities, -1.0).swapaxes(1, 2)
        weight, token = jax.lax.top_k(ranked, int(table.max()))  # [groups, experts, capacity]
        taken_by_each = jnp.asarray(table)[jnp.sum(real, axis=1)]
        taken = jnp.arange(weight.shape[-1]) < taken_by_each[:, None, None]
        expert = jnp.arange(self.num_experts, dtype=jnp.int32)[:, None]
        pairs = Assignments(
            token=token.astype(jnp.int32).reshape(groups, -1),
            expert=jnp.where(taken, expert, self.num_experts).reshape(groups, -1),
            weight=weight.reshape(groups, -1),
            priority=None,
            choices=None,
        )
        return Routed(
            pairs=pairs,
            selected=jnp.sum(taken, axis=-1, dtype=jnp.float32)
            + jnp.zeros((1, self.num_experts), jnp.float32),
            losses=_weighted({"router_z_loss": (config.z_loss, _z_loss(logits, real))}),
            statistics=_distribution(probabilities, real),
        )


class _Hash(nnx.Module):
    def __init__(self, config: HashRouter, *, num_experts: int) -> None:
        self.config, self.num_experts = config, num_experts

    def __call__(
        self,
        x: Float[Array, "groups tokens embed"],
        *,
        real: Bool[Array, "groups tokens"],
        rows: int,
        token_ids: Int[Array, "groups tokens"] | None,
        key: jax.Array | None,
    ) -> Routed:
        if token_ids is None:
            raise UserError("HashRouter needs token ids, and this model gives its blocks none")
        expert = hash_expert(token_ids, num_experts=self.num_experts, seed=self.config.seed)[
            ..., None
        ]
        weight = jnp.ones(expert.shape, jnp.promote_types(x.dtype, jnp.float32))
        return Routed(
            pairs=_token_pairs(expert, weight, real[..., None], self.num_experts, None),
            selected=_selected(expert, real, self.num_experts),
            losses=_weighted({}),
            statistics={},
        )


def hash_expert(ids: Int[Array, "*shape"], *, num_experts: int, seed: int) -> Int[Array, "*shape"]:
    """Spreads ids over experts by the finaliser of MurmurHash3 (Appleby, public domain)."""
    h = ids.astype(jnp.uint32) ^ jnp.uint32((seed * 0x9E3779B9) % 2**32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> shift)) * jnp.uint32(factor)
    return ((h ^ (h >> 16)) % jnp.uint32(num_experts)).astype(jnp.int32)


def _best_groups(scores: jax.Array, config: TopKRouter | SigmoidRouter, *, top: int) -> jax.Array:
    """`scores` with minus infinity outside of the groups whose `top` best experts sum highest."""
    if config.top_groups == config.num_groups:
        return scores
    grouped = scores.reshape(*scores.shape[:-1], config.num_groups, -1)
    rank = jnp.sum(jax.lax.top_k(grouped, top)[0], axis=-1)
    best = jax.lax.top_k(rank, config.top_groups)[1]
    allowed = jnp.any(best[..., None] == jnp.arange(config.num_groups), axis=-2)
    return jnp.where(allowed[..., None], grouped, -jnp.inf).reshape(scores.shape)


def _pick(values: jax.Array, expert: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values, expert, axis=-1)


def _scaled(weight: jax.Array, renormalize: bool, scale: float) -> jax.Array:
    if renormalize:
        weight = weight / (jnp.sum(weight, axis=-1, keepdims=True) + 1e-20)
    return weight * scale


def _selected(expert: jax.Array, real: jax.Array, num_experts: int) -> jax.Array:
    """float32 [groups, experts]: real tokens that have the expert among their choices."""
    chosen = (expert[..., None] == jnp.arange(num_experts)) & real[..., None, None]
    return jnp.sum(chosen, axis=(1, 2), dtype=jnp.float32)


def _token_pairs(
    expert: jax.Array,
    weight: jax.Array,
    taken: jax.Array,
    num_experts: int,
    best: jax.Array | None,
) -> Assignments:
    """Pairs of [groups, tokens, k] choices: first choices of all tokens, then the second, ..."""
    groups, tokens, k = expert.shape
    expert = jnp.where(taken, expert, num_experts)
    token = jnp.tile(jnp.arange(tokens, dtype=jnp.int32), k)
    priority = None
    if best is not None:
        order = jnp.argsort(-jax.lax.stop_gradient(best), axis=-1)
        rank = jnp.argsort(order, axis=-1).astype(jnp.int32)[:, None, :]
        choice = jnp.arange(k, dtype=jnp.int32)[:, None] * tokens
        priority = (rank + choice).reshape(groups, -1)
    return Assignments(
        token=jnp.broadcast_to(token, (groups, k * tokens)),
        expert=expert.swapaxes(1, 2).reshape(groups, -1).astype(jnp.int32),
        weight=weight.swapaxes(1, 2).reshape(groups, -1),
        priority=priority,
        choices=k,
    )


def _balance(
    selected: jax.Array, probabilities: jax.Array, real: jax.Array, *, factor: float
) -> Pair:
    """`factor` * sum over groups of tokens * sum_e share that chose e * mean probability of e.

    The other factor of the pair is the number of tokens, so a group counts as many times as it
    has tokens. Both means are over the real tokens of one group: a product of means over a whole
    batch would not add up over microbatches.
    """
    tokens = jnp.sum(real, axis=1)
    total = jnp.sum(jnp.where(real[..., None], probabilities, 0.0), axis=1)
    products = jnp.sum(selected * total, axis=-1) / jnp.maximum(tokens, 1)
    return factor * jnp.sum(products), jnp.sum(tokens).astype(jnp.float32)


def _z_loss(logits: jax.Array, real: jax.Array) -> Pair:
    """ST-MoE's (Zoph et al. 2022, arXiv:2202.08906): squared logsumexp of the logits, per token."""
    squared = jnp.square(jax.nn.logsumexp(logits, axis=-1))
    return _token_sum(squared, real)


def _distribution(probabilities: jax.Array, real: jax.Array) -> Statistics:
    p = jax.lax.stop_gradient(probabilities)
    entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0), axis=-1)
    return {
        "router_entropy": _token_sum(entropy, real),
        "router_confidence": _token_sum(jnp.max(p, axis=-1), real),
    }


def _token_sum(values: jax.Array, real: jax.Array) -> Pair:
    return jnp.sum(jnp.where(real, values, 0.0)), jnp.sum(real, dtype=jnp.float32)


def _weighted(losses: dict[str, tuple[float, Any]]) -> Statistics:
    """The pairs of the named losses, and `auxiliary_loss`: their sum with their coefficients."""
    pairs = {name: pair for name, (_, pair) in losses.items()}
    total = sum(factor * pair[0] for factor, pair in losses.values())
    weight = next(iter(pairs.values()))[1] if pairs else jnp.float32(0)
    return {"auxiliary_loss": (jnp.asarray(total), weight), **pairs}
