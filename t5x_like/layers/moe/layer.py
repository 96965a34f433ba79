"""The mixture-of-experts layer: a router, a dispatcher, experts, and what they tell of it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Shaped

from t5x_like.layers.checks import check_instance, check_number, check_positive_ints
from t5x_like.layers.dropout import fold_key
from t5x_like.layers.mlp import MlpConfig
from t5x_like.layers.moe.dispatch import Dispatcher, DispatcherConfig, dropped, limits
from t5x_like.layers.moe.experts import Experts
from t5x_like.layers.moe.routers import (
    ExpertChoiceRouter,
    HashRouter,
    RouterConfig,
    SigmoidRouter,
    Statistics,
    TopKRouter,
    capacities,
)
from t5x_like.layers.parameter import Initializer, mlp_kernel_init
from t5x_like.parallel.logical import constrain


@functools.partial(jax.tree_util.register_dataclass, data_fields=("load", "sums"), meta_fields=())
@dataclasses.dataclass(frozen=True, kw_only=True)
class Auxiliary:
    """What a layer gives besides its output; all of it adds up over tokens, and so over anything.

    Attributes:
      load: real tokens that chose each expert, before any is dropped, in float32.
      sums: name -> (sum, what it is a sum of): `auxiliary_loss`, what is added to the training
        loss once it is divided by the second number; its unweighted parts `load_balance_loss`,
        `router_z_loss`, `sequence_loss`; `router_entropy`, `router_confidence`, per token; and
        `dropped_fraction`, per pair of token and expert.
    """

    load: Float[Array, "*layers experts"]
    sums: Statistics


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """A feed-forward layer of which every token uses a part.

    Attributes:
      num_experts: how many experts.
      expert: the shape of one; `use_bias` gives each of them biases.
      router: which experts a token goes to.
      dispatcher: how it gets there.
      group_size: tokens that are balanced, dropped and chosen among together; None for a whole
        row. The last group of a row may have fewer.
      shared_expert: a layer that every token goes through besides, or None (several shared
        experts are one whose mlp_dim is the sum of theirs).
      expert_dropout_rate: dropout of the experts' hidden layer; None for the block's rate.
    """

    num_experts: int
    expert: MlpConfig
    router: RouterConfig
    dispatcher: DispatcherConfig = DispatcherConfig()
    group_size: int | None = None
    shared_expert: MlpConfig | None = None
    expert_dropout_rate: float | None = None

    def __post_init__(self) -> None:
        check_positive_ints(self, "num_experts")
        check_instance(self, "expert", MlpConfig)
        check_instance(self, "router", TopKRouter, SigmoidRouter, ExpertChoiceRouter, HashRouter)
        check_instance(self, "dispatcher", DispatcherConfig)
        check_instance(self, "shared_expert", MlpConfig, type(None))
        if self.group_size is not None:
            check_positive_ints(self, "group_size")
        if self.expert_dropout_rate is not None:
            check_number(self, "expert_dropout_rate", low=0.0, high=1.0)
        self.router.check(self.num_experts)

    @property
    def active_experts(self) -> float:
        """Experts that a token goes through, in the mean where experts choose."""
        if isinstance(self.router, ExpertChoiceRouter):
            return self.router.capacity_factor
        return 1 if isinstance(self.router, HashRouter) else self.router.k

    @property
    def activations(self) -> tuple[str, ...]:
        """Those of an expert, as `MlpConfig` has them."""
        return self.expert.activations

    def build(
        self,
        *,
        embed_dim: int,
        dtype: jnp.dtype,
        kernel_init: Initializer | None = None,
        out_init: Initializer | None = None,
    ) -> Moe:
        """Builds the layer; without initialisers, T5X's truncated normal of variance 1/fan_in."""
        return Moe(
            self,
            embed_dim=embed_dim,
            dtype=dtype,
            kernel_init=kernel_init or mlp_kernel_init,
            out_init=out_init or mlp_kernel_init,
        )


class Moe(nnx.Module):
    """`sum_e weight_e(x) * expert_e(x) (+ shared(x))`; padding gives zeros from the experts."""

    def __init__(
        self,
        config: MoeConfig,
        *,
        embed_dim: int,
        dtype: jnp.dtype,
        kernel_init: Initializer,
        out_init: Initializer,
    ) -> None:
        self.config = config
        inits: dict[str, Any] = {"kernel_init": kernel_init, "out_init": out_init}
        width: dict[str, Any] = {"embed_dim": embed_dim, "dtype": dtype}
        self.router = config.router.build(embed_dim=embed_dim, num_experts=config.num_experts)
        self.experts = Experts(config.expert, num_experts=config.num_experts, **width, **inits)
        if config.shared_expert is not None:
            self.shared = config.shared_expert.build(**width, **inits)

    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        *,
        dropout_rate: float,
        dropout_key: jax.Array | None,
        broadcast_dims: tuple[int, ...],
        real: Bool[Array, "batch length"] | None = None,
        token_ids: Int[Array, "batch length"] | None = None,
        dropping: bool = True,
    ) -> tuple[Float[Array, "batch length embed"], Auxiliary]:
        """Output, zero from the experts where a token is padding or dropped, and the rest.

        Args:
          x: input.
          dropout_rate, dropout_key, broadcast_dims: as of `Mlp`; a key means training. The
            experts draw for every token apart, whatever `broadcast_dims` says.
          real: False for padding, which takes no capacity and counts in no loss; None for none.
          token_ids: of the input, for a router that goes by them.
          dropping: False takes the dropless dispatcher in place of one with capacity.
        """
        config = self.config
        batch, length, _ = x.shape
        if real is None:
            real = jnp.ones((batch, length), bool)
        size = min(config.group_size or length, length)
        y, auxiliary = self._routed(
            _grouped(x, size),
            real=_grouped(real, size),
            rows=batch,
            token_ids=None if token_ids is None else _grouped(token_ids, size),
            dispatcher=config.dispatcher if dropping else config.dispatcher.without_dropping(),
            dropout_rate=dropout_rate,
            key=dropout_key,
        )
        y = constrain(y.reshape(batch, -1, x.shape[2])[:, :length], ("batch", "length", "embed"))
        if config.shared_expert is not None:
            y = y + self.shared(
                x,
                dropout_rate=dropout_rate,
                dropout_key=fold_key(dropout_key, 2),
                broadcast_dims=broadcast_dims,
            )
        return y, auxiliary

    def _routed(
        self,
        x: Float[Array, "groups tokens embed"],
        *,
        real: Bool[Array, "groups tokens"],
        rows: int,
        token_ids: Int[Array, "groups tokens"] | None,
        dispatcher: DispatcherConfig,
        dropout_rate: float,
        key: jax.Array | None,
    ) -> tuple[Float[Array, "groups tokens embed"], Auxiliary]:
        """The part of the experts that tokens are routed to; arguments as of a call."""
        config, num_experts = self.config, self.config.num_experts
        routed = self.router(x, real=real, rows=rows, token_ids=token_ids, key=fold_key(key, 0))
        pairs, capacity = routed.pairs, None
        if dispatcher.kind == "capacity":
            table = capacities(
                dispatcher.factor(training=key is not None),
                num_experts=num_experts,
                group=x.shape[1],
                least=dispatcher.min_capacity or 4,
            )
            capacity = int(table.max())
            pairs = dataclasses.replace(pairs, limit=limits(table, real))
        rate = dropout_rate if config.expert_dropout_rate is None else config.expert_dropout_rate
        dispatch = Dispatcher(
            config=dispatcher,
            mlp=config.expert,
            num_experts=num_experts,
            capacity=capacity,
            dropout_rate=rate or None,
        )
        y = dispatch(x, pairs, self.experts.arrays(), fold_key(key, 1))
        lost = dropped(pairs, num_experts=num_experts)
        sums = {**routed.losses, **routed.statistics, "dropped_fraction": lost}
        return y, Auxiliary(load=jnp.sum(routed.selected, axis=0), sums=sums)


def _grouped(
    x: Shaped[Array, "batch length *rest"], size: int
) -> Shaped[Array, "groups size *rest"]:
    """Rows cut into groups of `size` tokens, the last of a row filled up with zeros (padding)."""
    missing = -x.shape[1] % size
    if missing:
        x = jnp.pad(x, ((0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)))
    return x.reshape(-1, size, *x.shape[2:])
