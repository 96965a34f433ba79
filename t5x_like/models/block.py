"""One Transformer block: self-attention, cross-attention where there is a context, MLP."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from t5x_like.errors import UserError
from t5x_like.kernels.attention import AttentionMask
from t5x_like.kernels.position_bias import RelativeBias
from t5x_like.layers.attention import Attention, AttentionConfig
from t5x_like.layers.cache import KeyValues
from t5x_like.layers.checks import (
    check_bools,
    check_choice,
    check_instance,
    check_number,
    check_positive_ints,
)
from t5x_like.layers.dropout import dropout, fold_key
from t5x_like.layers.latent_attention import LatentAttention, LatentAttentionConfig
from t5x_like.layers.mlp import Mlp, MlpConfig
from t5x_like.layers.moe.layer import Auxiliary, MoeConfig
from t5x_like.layers.norms import Norm, NormConfig
from t5x_like.layers.positions import RelativePositions, RelativePositionsConfig
from t5x_like.parallel.logical import constrain

Branch = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """A residual block.

    Attributes:
      embed_dim: width of the residual stream.
      attention, mlp, norm: its layers.
      cross_attention: attention over the encoder's output, where there is one; None for the
        projections of `attention` without its positions and windows (not of a latent one).
      norm_placement: `pre` is `x + f(norm(x))`, `post` is `norm(x + f(x))` (BERT), `sandwich` is
        `x + norm(f(norm(x)))` (Gemma 2).
      residual: `sequential`; or attention and MLP side by side on the same input, `parallel` with
        a norm each (GPT-NeoX) or `parallel_shared_norm` with one (GPT-J, PaLM).
      dropout_rate: of attention weights, MLP activations, residual branches and embeddings.
      broadcast_dropout: draw one dropout mask for all positions of a sequence, as T5X does.
      init_stddev: None initialises as T5X (variance 1/fan_in); a number draws every kernel from
        a normal of that deviation, those that write to the residual stream divided by
        sqrt(2 * num_layers), and embeddings too (GPT-2).
    """

    embed_dim: int
    attention: AttentionConfig | LatentAttentionConfig
    mlp: MlpConfig | MoeConfig
    norm: NormConfig = NormConfig()
    cross_attention: AttentionConfig | None = None
    norm_placement: Literal["pre", "post", "sandwich"] = "pre"
    residual: Literal["sequential", "parallel", "parallel_shared_norm"] = "sequential"
    dropout_rate: float = 0.0
    broadcast_dropout: bool = True
    init_stddev: float | None = None

    def __post_init__(self) -> None:
        check_positive_ints(self, "embed_dim")
        check_instance(self, "attention", AttentionConfig, LatentAttentionConfig)
        check_instance(self, "cross_attention", AttentionConfig, type(None))
        check_instance(self, "mlp", MlpConfig, MoeConfig)
        check_instance(self, "norm", NormConfig)
        check_choice(self, "norm_placement", ("pre", "post", "sandwich"))
        check_choice(self, "residual", ("sequential", "parallel", "parallel_shared_norm"))
        check_number(self, "dropout_rate", low=0.0, high=1.0)
        check_bools(self, "broadcast_dropout")
        if self.init_stddev is not None:
            check_number(self, "init_stddev", low=0.0)
        if self.residual != "sequential" and self.norm_placement != "pre":
            raise UserError(
                f"BlockConfig.residual {self.residual!r} goes with norm_placement 'pre', "
                f"not {self.norm_placement!r}"
            )

    @property
    def embedding_stddev(self) -> float:
        """Standard deviation of embedding tables at the start; T5X's is 1."""
        return 1.0 if self.init_stddev is None else self.init_stddev


@functools.partial(jax.tree_util.register_dataclass, data_fields=("own", "context"), meta_fields=())
@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockCache:
    """Keys and values of the tokens so far, and (or None) those of the encoder's output."""

    own: KeyValues
    context: KeyValues | None


class Block(nnx.Module):
    """Self-attention, cross-attention (where there is a context) and MLP, each a residual branch.

    The names of the self-attention and its norms are T5X's: an encoder's have no `self_`.
    """

    def __init__(
        self,
        config: BlockConfig,
        *,
        decoder: bool,
        cross_attention: bool,
        num_layers: int,
        relative_positions: RelativePositionsConfig | None,
        dtype: jnp.dtype,
    ) -> None:
        self.config, self.cross_attention = config, cross_attention
        if cross_attention and config.residual != "sequential":
            raise UserError(
                f"BlockConfig.residual {config.residual!r} has no place for cross-attention; "
                "use 'sequential' in an encoder-decoder"
            )
        if decoder and isinstance(config.mlp, MoeConfig) and not config.mlp.router.causal:
            raise UserError(
                f"{type(config.mlp.router).__name__} looks at later tokens, so that a decoder "
                "would see what it is to predict; use it in encoder blocks only"
            )
        self.self_name = "self_attention" if decoder else "attention"
        width: dict[str, Any] = {"embed_dim": config.embed_dim, "dtype": dtype}
        inits: dict[str, Any] = {}
        if config.init_stddev is not None:
            out_stddev = config.init_stddev / (2 * num_layers) ** 0.5
            inits["kernel_init"] = jax.nn.initializers.normal(config.init_stddev)
            inits["out_init"] = jax.nn.initializers.normal(out_stddev)
        self._add_norms(self.self_name, **width)
        attention: Attention | LatentAttention
        if isinstance(config.attention, LatentAttentionConfig):
            attention = LatentAttention(config.attention, **width, **inits)
        else:
            attention = Attention(config.attention, norm=config.norm, **width, **inits)
        setattr(self, self.self_name, attention)
        if cross_attention:
            self._add_norms("cross_attention", **width)
            self.encoder_decoder_attention = Attention(
                _over_context(config), norm=config.norm, **width, **inits
            )
        if config.residual != "parallel_shared_norm":
            self._add_norms("mlp", **width)
        self.mlp = config.mlp.build(**width, **inits)
        self.has_bias = relative_positions is not None
        if relative_positions is not None:
            self.relpos_bias = RelativePositions(
                relative_positions,
                num_heads=config.attention.num_heads,
                bidirectional=not decoder,
                dtype=dtype,
            )

    def _add_norms(self, branch: str, **width: Any) -> None:
        if self.config.norm_placement != "post":
            setattr(self, f"pre_{branch}_layer_norm", Norm(self.config.norm, **width))
        if self.config.norm_placement != "pre":
            setattr(self, f"post_{branch}_layer_norm", Norm(self.config.norm, **width))

    def __call__(
        self,
        x: Float[Array, "batch query embed"],
        *,
        mask: AttentionMask,
        positions: Int[Array, "batch query"] | None = None,
        relative_bias: RelativeBias | None = None,
        global_bias: RelativeBias | None = None,
        context: Float[Array, "batch key embed"] | None = None,
        context_mask: AttentionMask | None = None,
        real: Bool[Array, "batch query"] | None = None,
        token_ids: Int[Array, "batch query"] | None = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[Float[Array, "batch query embed"], Auxiliary | None]:
        """Runs the block; `relative_bias` is that of the stack, unless the block has its own.

        `real` (False on padding) and `token_ids` are for mixtures of experts. The second result
        is what a mixture says of itself, None of a dense MLP.
        """
        auxiliary: Auxiliary | None = None
        rate = self.config.dropout_rate
        broadcast_dims = (-2,) if self.config.broadcast_dropout else ()
        inner: dict[str, Any] = {"dropout_rate": rate, "broadcast_dims": broadcast_dims}
        keys = [fold_key(dropout_key, i) for i in range(6)]
        if self.has_bias:
            relative_bias = self.relpos_bias()

        def attend_self(y: jax.Array) -> jax.Array:
            return self._self_attention(
                y,
                mask=mask,
                positions=positions,
                relative_bias=relative_bias,
                global_bias=global_bias,
                dropout_key=keys[0],
                **inner,
            )

        def attend_context(y: jax.Array) -> jax.Array:
            assert context is not None and context_mask is not None
            attend = self.encoder_decoder_attention
            return attend(y, context, mask=context_mask, dropout_key=keys[2], **inner)

        def feed_forward(y: jax.Array) -> jax.Array:
            nonlocal auxiliary
            if isinstance(self.mlp, Mlp):
                return self.mlp(y, dropout_key=keys[4], **inner)
            y, auxiliary = self.mlp(y, real=real, token_ids=token_ids, dropout_key=keys[4], **inner)
            return y

        def drop(branch: int, y: jax.Array) -> jax.Array:
            key = keys[2 * branch + 1]
            return dropout(y, rate=rate, key=key, broadcast_dims=broadcast_dims)

        x = self._residual(x, attend_self, attend_context, feed_forward, drop=drop)
        return x, auxiliary

    def prefill(
        self,
        x: Float[Array, "batch prompt embed"],
        *,
        context: Float[Array, "batch key embed"] | None,
        context_mask: AttentionMask | None,
        token_ids: Int[Array, "batch prompt"],
        **inputs: Any,
    ) -> tuple[Float[Array, "batch prompt embed"], BlockCache]:
        """Runs the block on prompts and keeps what later tokens look at.

        `inputs` are those of `Attention.prefill`.
        """
        kept: dict[str, KeyValues] = {}

        def attend_self(y: jax.Array) -> jax.Array:
            out, kept["own"] = self._self_attention.prefill(y, **self._with_bias(inputs))
            return out

        def attend_context(y: jax.Array) -> jax.Array:
            assert context is not None and context_mask is not None
            attend = self.encoder_decoder_attention
            out, kept["context"] = attend.prefill_context(y, context, mask=context_mask)
            return out

        mask: AttentionMask = inputs["mask"]
        feed_forward = functools.partial(
            self._feed_forward, real=mask.key_valid, token_ids=token_ids
        )
        x = self._residual(x, attend_self, attend_context, feed_forward)
        return x, BlockCache(own=kept["own"], context=kept.get("context"))

    def step(
        self,
        x: Float[Array, "rows beams embed"],
        own: KeyValues,
        context: KeyValues | None,
        *,
        context_valid: Bool[Array, "batch key"] | None,
        token_ids: Int[Array, "rows beams"],
        **inputs: Any,
    ) -> tuple[Float[Array, "rows beams embed"], KeyValues]:
        """Runs the block on one token of every beam; `inputs` are those of `Attention.step`.

        Returns the new `own`, the cache of self-attention; that of the context stays.
        """
        written = own

        def attend_self(y: jax.Array) -> jax.Array:
            nonlocal written
            out, written = self._self_attention.step(y, own, **self._with_bias(inputs))
            return out

        def attend_context(y: jax.Array) -> jax.Array:
            assert context is not None and context_valid is not None
            return self.encoder_decoder_attention.step_context(y, context, valid=context_valid)

        feed_forward = functools.partial(self._feed_forward, real=None, token_ids=token_ids)
        return self._residual(x, attend_self, attend_context, feed_forward), written

    @property
    def _self_attention(self) -> Attention | LatentAttention:
        attention: Attention | LatentAttention = getattr(self, self.self_name)
        return attention

    def _with_bias(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """With the block's own relative bias, where it has one, in place of the stack's."""
        return inputs | {"relative_bias": self.relpos_bias()} if self.has_bias else inputs

    def _feed_forward(
        self, y: jax.Array, *, real: jax.Array | None, token_ids: jax.Array
    ) -> jax.Array:
        """The MLP while generating: no dropout, and no expert drops a token."""
        plain: dict[str, Any] = {"dropout_rate": 0.0, "dropout_key": None, "broadcast_dims": ()}
        if isinstance(self.mlp, Mlp):
            return self.mlp(y, **plain)
        return self.mlp(y, real=real, token_ids=token_ids, dropping=False, **plain)[0]

    def _residual(
        self,
        x: jax.Array,
        attend_self: Branch,
        attend_context: Branch,
        feed_forward: Branch,
        *,
        drop: Callable[[int, jax.Array], jax.Array] = lambda _, y: y,
    ) -> jax.Array:
        """The branches in their order, or side by side; `drop` is the dropout of each."""
        if self.config.residual != "sequential":
            y = self._norm(f"pre_{self.self_name}", x)
            shared = self.config.residual == "parallel_shared_norm"
            z = y if shared else self._norm("pre_mlp", x)
            x = x + drop(0, attend_self(y)) + drop(2, feed_forward(z))
            return constrain(x, ("batch", "length", "embed"))
        x = self._branch(self.self_name, attend_self, x, lambda y: drop(0, y))
        if self.cross_attention:
            x = self._branch("cross_attention", attend_context, x, lambda y: drop(1, y))
        return self._branch("mlp", feed_forward, x, lambda y: drop(2, y))

    def _norm(self, name: str, x: jax.Array) -> jax.Array:
        norm: Norm = getattr(self, f"{name}_layer_norm")
        return norm(x)

    def _branch(self, name: str, function: Branch, x: jax.Array, drop: Branch) -> jax.Array:
        """`x` plus a branch, with the norms where the config places them."""
        placement = self.config.norm_placement
        y = function(x if placement == "post" else self._norm(f"pre_{name}", x))
        if placement == "sandwich":
            y = self._norm(f"post_{name}", y)
        x = x + drop(y)
        if placement == "post":
            x = self._norm(f"post_{name}", x)
        return constrain(x, ("batch", "length", "embed"))


def _over_context(config: BlockConfig) -> AttentionConfig:
    """The cross-attention of a block."""
    if config.cross_attention is not None:
        return config.cross_attention
    if isinstance(config.attention, LatentAttentionConfig):
        raise UserError(
            "BlockConfig.cross_attention is None and attention a LatentAttentionConfig, which is "
            "for self-attention only; give cross_attention an AttentionConfig"
        )
    return config.attention.for_context()
