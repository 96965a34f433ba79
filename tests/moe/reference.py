"""A mixture of experts one token at a time in float64, written apart from the layer's own code.

Which experts a token goes to is decided on plain numbers; what follows from these decisions is
differentiable.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5x_like.layers.moe.layer import MoeConfig
from t5x_like.layers.moe.routers import (
    ExpertChoiceRouter,
    HashRouter,
    SigmoidRouter,
    TopKRouter,
    hash_expert,
)

# (row, first token of the group, token, expert, which choice)
Decision = tuple[int, int, int, int, int]


def scores_of(config: MoeConfig, params: Any, token: Any) -> tuple[Any, Any]:
    """Logits and scores of one token; of no use where its id decides."""
    if isinstance(config.router, HashRouter):
        return None, None
    logits = token @ params["router"]["kernel"]
    if isinstance(config.router, SigmoidRouter):
        return logits, 1 / (1 + jnp.exp(-logits))
    powers = jnp.exp(logits)
    return logits, powers / powers.sum()


def best(values: list[float], count: int) -> list[int]:
    return sorted(range(len(values)), key=lambda i: -values[i])[:count]


def choose(config: MoeConfig, params: Any, token: Any) -> list[int]:
    """The experts of one token, best first."""
    router = config.router
    values = [float(s) for s in scores_of(config, params, token)[1]]
    if isinstance(router, SigmoidRouter):
        values = [
            v + float(b) for v, b in zip(values, params["router"]["balance_bias"], strict=True)
        ]
    size = config.num_experts // router.num_groups
    groups = [values[i * size : (i + 1) * size] for i in range(router.num_groups)]
    top = 2 if isinstance(router, SigmoidRouter) else 1
    rank = [sum(sorted(group)[-top:]) for group in groups]
    open_groups = best(rank, router.top_groups)
    values = [v if e // size in open_groups else -math.inf for e, v in enumerate(values)]
    return best(values, router.k)


def decide(config: MoeConfig, params: Any, x: Any, real: Any, ids: Any) -> dict[str, Any]:
    """Every pair of token and expert, which of them find room, and how many chose an expert."""
    router, size = config.router, config.group_size or x.shape[1]
    kept: list[Decision] = []
    chosen: list[Decision] = []
    for row in range(len(x)):
        for first in range(0, x.shape[1], size):
            tokens = [t for t in range(first, first + size) if real[row, t]]
            if isinstance(router, ExpertChoiceRouter):
                room = round(router.capacity_factor * len(tokens) / config.num_experts)
                room = min(max(room, 1), len(tokens))
                for e in range(config.num_experts):
                    liking = [float(scores_of(config, params, x[row, t])[1][e]) for t in tokens]
                    group = [(row, first, tokens[i], e, 0) for i in best(liking, room)]
                    chosen += group
                    kept += limited(config, group, len(tokens))
                continue
            if isinstance(router, HashRouter):
                hashed = hash_expert(ids[row], num_experts=config.num_experts, seed=router.seed)
                experts = {t: [int(hashed[t])] for t in tokens}
                k = 1
            else:
                experts, k = {t: choose(config, params, x[row, t]) for t in tokens}, router.k
            order = tokens
            if isinstance(router, TopKRouter) and router.prioritized:
                liking = [float(max(scores_of(config, params, x[row, t])[1])) for t in tokens]
                order = [tokens[i] for i in best(liking, len(tokens))]
            group = [(row, first, t, experts[t][j], j) for j in range(k) for t in order]
            chosen += group
            kept += limited(config, group, len(tokens))
    return {"kept": kept, "chosen": chosen}


def limited(config: MoeConfig, group: list[Decision], num_tokens: int) -> list[Decision]:
    dispatcher = config.dispatcher
    if dispatcher.kind != "capacity":
        return group
    room = round(dispatcher.capacity_factor * num_tokens / config.num_experts)
    room = max(room, dispatcher.min_capacity or 4)
    taken = [0] * config.num_experts
    kept = []
    for decision in group:
        taken[decision[3]] += 1
        if taken[decision[3]] <= room:
            kept.append(decision)
    return kept


def feed_forward(mlp: Any, linear: Any, x: Any) -> Any:
    act = {"gelu": lambda v: jax.nn.gelu(v, approximate=True), "linear": lambda v: v}
    names = ["wi_0", "wi_1"] if len(mlp.activations) == 2 else ["wi"]
    hidden = 1.0
    for name, activation in zip(names, mlp.activations, strict=True):
        hidden = hidden * act[activation](linear(name, x))
    return linear("wo", hidden)


def run(config: MoeConfig, params: Any, x: Any, real: Any, decisions: dict[str, Any]) -> Any:
    """Outputs [rows, tokens, embed] and the auxiliary values as means."""
    experts = params["experts"]
    scores = {
        (row, t): scores_of(config, params, x[row, t])
        for row in range(len(x))
        for t in range(x.shape[1])
        if real[row, t]
    }
    outputs = {}
    if config.shared_expert is not None:

        def shared(name: str, v: Any) -> Any:
            return v @ params["shared"][name]["kernel"]

    for row in range(x.shape[0]):
        for t in range(x.shape[1]):
            outputs[row, t] = jnp.zeros(x.shape[2])
            if config.shared_expert is not None:
                outputs[row, t] += feed_forward(config.shared_expert, shared, x[row, t])
    by_token: dict[tuple[int, int], list[int]] = {}
    for row, _, t, e, _ in decisions["chosen"]:
        by_token.setdefault((row, t), []).append(e)
    for row, _, t, e, _ in decisions["kept"]:

        def linear(name: str, v: Any, e: int = e) -> Any:
            y = v @ experts[name]["kernel"][e]
            return y + experts[name]["bias"][e] if "bias" in experts[name] else y

        y = feed_forward(config.expert, linear, x[row, t])
        outputs[row, t] += weight(config, scores, (row, t), e, by_token[row, t]) * y
    y = jnp.stack([jnp.stack([outputs[r, t] for t in range(x.shape[1])]) for r in range(len(x))])
    return y, auxiliary(config, scores, x.shape, decisions["chosen"])


def weight(config: MoeConfig, by_token: Any, token: Any, e: int, experts: list[int]) -> Any:
    router = config.router
    if isinstance(router, HashRouter):
        return 1.0
    logits, scores = by_token[token]
    if isinstance(router, ExpertChoiceRouter):
        return scores[e]
    if isinstance(router, TopKRouter) and router.scoring == "selected":
        return router.scale * jnp.exp(logits[e]) / sum(jnp.exp(logits[i]) for i in experts)
    total = sum(scores[i] for i in experts) if router.renormalize else 1.0
    return router.scale * scores[e] / total


def auxiliary(config: MoeConfig, scores: Any, shape: Any, chosen: list[Decision]) -> Any:
    """Means over real tokens of what the layer gives as sums."""
    router, num_experts = config.router, config.num_experts
    if isinstance(router, HashRouter):
        return {}
    squares = [jnp.log(jnp.exp(logits).sum()) ** 2 for logits, _ in scores.values()]
    values = {"router_z_loss": sum(squares) / len(scores)}
    if isinstance(router, ExpertChoiceRouter):
        return values
    size = shape[1] if isinstance(router, SigmoidRouter) else config.group_size or shape[1]
    total: Any = 0.0
    for row in range(shape[0]):
        for first in range(0, shape[1], size):
            group = [k for k in scores if k[0] == row and first <= k[1] < first + size]
            fractions = [
                sum((r, t) in group and i == e for r, _, t, i, _ in chosen) / max(len(group), 1)
                for e in range(num_experts)
            ]
            for token in group:  # a mean, times the tokens of the group
                total += (jnp.asarray(fractions) * scores[token][1]).sum() / scores[token][1].sum()
    name, factor = "load_balance_loss", num_experts
    if isinstance(router, SigmoidRouter):
        name, factor = "sequence_loss", num_experts / router.k
    return values | {name: factor * total / len(scores)}


def as_float64(tree: Any) -> Any:
    return jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), tree)
