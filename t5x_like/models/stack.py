"""A stack of blocks whose parameters lie on a leading `layers` axis and are run by scan.

Layers may follow a repeating pattern (local and global attention in turn): the loop then runs
over the repeats, so that compile time grows with the pattern and not with the depth.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from t5x_like.errors import UserError, did_you_mean
from t5x_like.kernels.attention import AttentionMask
from t5x_like.kernels.position_bias import RelativeBias
from t5x_like.layers.dropout import dropout, fold_key
from t5x_like.layers.linear import Linear
from t5x_like.layers.moe.layer import Auxiliary
from t5x_like.layers.norms import Norm
from t5x_like.layers.parameter import stack_parameters
from t5x_like.layers.positions import RelativePositions, RelativePositionsConfig
from t5x_like.models.block import Block, BlockConfig

Pattern = BlockConfig | tuple[BlockConfig, ...]

SAVEABLE_NAMES = (
    "query",
    "key",
    "value",
    "latent",
    "attention_weights",
    "attention",
    "attention_out",
    "mlp_in",
    "mlp_out",
    "grouped_product",
    "dropout_mask",
)
_save_names = jax.checkpoint_policies.save_only_these_names
_POLICIES: dict[str, Callable[..., Any]] = {
    "none": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_saveable,
        _save_names("attention_weights", "dropout_mask", "grouped_product"),
    ),
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_saveable, _save_names("grouped_product")
    ),
    "minimal": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def remat_policy(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The transformation of a block's function that a remat policy stands for.

    It says what the backward pass finds of a block's forward pass; the rest is computed again.
    `none` keeps all but element-wise results, which cost nothing beside the products (and
    parameters as gathered from a sharded mesh, which would be the whole model); `dots` the
    products, those of attention too; `minimal` (T5X's name) the products with parameters;
    `full` the block's input alone; `save:NAME,NAME` the named ones of `SAVEABLE_NAMES`.

    Raises:
      UserError: an unknown policy, or an unknown name to save.
    """
    if name.startswith("save:"):
        saved = [part.strip() for part in name[len("save:") :].split(",")]
        for part in saved:
            if part not in SAVEABLE_NAMES:
                raise UserError(
                    f"remat policy {name!r} saves {part!r}; choose from "
                    f"{', '.join(SAVEABLE_NAMES)}.{did_you_mean(part, SAVEABLE_NAMES)}"
                )
        policy = _save_names(*saved)
    elif name in _POLICIES:
        policy = _POLICIES[name]
    else:
        known = (*_POLICIES, "save:NAME,...")
        raise UserError(
            f"remat policy {name!r} is unknown; choose from {', '.join(known)}."
            + did_you_mean(name, known)
        )
    return functools.partial(jax.checkpoint, policy=policy, prevent_cse=False)


def as_pattern(block: Pattern) -> tuple[BlockConfig, ...]:
    """One block config as a pattern of length 1."""
    return (block,) if isinstance(block, BlockConfig) else tuple(block)


def group_sizes(period: int, num_layers: int) -> tuple[tuple[int, int], ...]:
    """(blocks, repeats) of the groups that `num_layers` layers of a pattern make.

    The whole repeats of the pattern are one group, the layers left over are another.
    """
    repeats, left = divmod(num_layers, period)
    return tuple((n, r) for n, r in ((period, repeats), (left, 1)) if n and r)


def layer_slots(
    block: Pattern, num_layers: int, leading: tuple[BlockConfig, ...] = ()
) -> list[tuple[str, int]]:
    """Where in a stack's parameters every layer is: (path, index on the leading axis).

    `layers` holds a stack of one kind of block; a pattern has a path for each of its blocks, and
    so have the blocks that come before the pattern:

    >>> layer_slots((local, full), 5)
    [('group_0/block_0', 0), ('group_0/block_1', 0), ('group_0/block_0', 1),
     ('group_0/block_1', 1), ('group_1/block_0', 0)]
    >>> layer_slots(sparse, 3, leading=(dense,))
    [('leading/block_0', 0), ('layers', 0), ('layers', 1)]
    """
    if leading:
        first = [(f"leading/block_{i}", 0) for i in range(len(leading))]
        return first + layer_slots(block, num_layers - len(leading))
    period = len(as_pattern(block))
    if period == 1:
        return [("layers", index) for index in range(num_layers)]
    return [
        (f"group_{group}/block_{i}", repeat)
        for group, (blocks, repeats) in enumerate(group_sizes(period, num_layers))
        for repeat in range(repeats)
        for i in range(blocks)
    ]


class BlockGroup(nnx.Module):
    """The blocks of a pattern, `block_0`, `block_1`, ..., in the order in which they run."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        for i, block in enumerate(blocks):
            setattr(self, f"block_{i}", block)


def blocks_of(group: Block | BlockGroup) -> list[Block]:
    """The blocks of one repeat, in the order in which they run."""
    if isinstance(group, Block):
        return [group]
    count = sum(name.startswith("block_") for name in vars(group))
    return [getattr(group, f"block_{i}") for i in range(count)]


class Stack(nnx.Module):
    """Blocks, their shared relative-position tables, and the final norm of pre-norm blocks."""

    logits_dense: Linear  # Of a decoder whose logits are not tied to the token table.

    def __init__(
        self,
        block: Pattern,
        *,
        num_layers: int,
        decoder: bool,
        cross_attention: bool,
        relative_positions: RelativePositionsConfig | None,
        dtype: jnp.dtype,
        remat: str,
        scan_unroll: int,
        leading: tuple[BlockConfig, ...] = (),
    ) -> None:
        pattern = as_pattern(block)
        if len(leading) >= num_layers:
            raise UserError(
                f"TransformerConfig.leading_blocks has {len(leading)} blocks and a stack "
                f"{num_layers} layers: leave at least one for `block`"
            )
        self.block, self.decoder = pattern[0], decoder
        self.remat, self.scan_unroll = remat, scan_unroll
        self.is_pattern = len(pattern) > 1
        self.groups = group_sizes(len(pattern), num_layers - len(leading))
        self.num_leading = len(leading)
        per_layer = relative_positions is not None and relative_positions.per_layer

        def build(config: BlockConfig) -> Block:
            return Block(
                config,
                decoder=decoder,
                cross_attention=cross_attention,
                num_layers=num_layers,
                relative_positions=relative_positions if per_layer else None,
                dtype=dtype,
            )

        if leading:
            first = BlockGroup([build(config) for config in leading])
            self.leading = stack_parameters(first, num_layers=1)
        for index, (blocks, repeats) in enumerate(self.groups):
            built = [build(config) for config in pattern[:blocks]]
            group = BlockGroup(built) if self.is_pattern else built[0]
            setattr(self, self._group_name(index), stack_parameters(group, num_layers=repeats))
        self._add_tables((*leading, *pattern), relative_positions, per_layer=per_layer, dtype=dtype)
        if self.block.norm_placement != "post":
            norm = Norm(self.block.norm, embed_dim=self.block.embed_dim, dtype=dtype)
            setattr(self, self._norm_name(), norm)

    def _add_tables(
        self,
        pattern: tuple[BlockConfig, ...],
        relative_positions: RelativePositionsConfig | None,
        *,
        per_layer: bool,
        dtype: jnp.dtype,
    ) -> None:
        needs_global = any(b.attention.global_block_size is not None for b in pattern)
        if needs_global and (relative_positions is None or per_layer):
            raise UserError(
                "AttentionConfig.global_block_size needs RelativePositionsConfig with "
                "per_layer False as the model's `positions`"
            )
        if relative_positions is None or per_layer:
            return
        names = ["relpos_bias"] + ["global_relpos_bias"] * needs_global
        for name in names:
            table = RelativePositions(
                relative_positions,
                num_heads=self.block.attention.num_heads,
                bidirectional=not self.decoder,
                dtype=dtype,
            )
            setattr(self, name, table)

    def _norm_name(self) -> str:
        return "decoder_norm" if self.decoder else "encoder_norm"

    def _group_name(self, index: int) -> str:
        return f"group_{index}" if self.is_pattern else "layers"

    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        *,
        mask: AttentionMask,
        positions: Int[Array, "batch length"] | None = None,
        context: Float[Array, "batch key embed"] | None = None,
        context_mask: AttentionMask | None = None,
        real: Bool[Array, "batch length"] | None = None,
        token_ids: Int[Array, "batch length"] | None = None,
        dropout_key: jax.Array | None = None,
    ) -> Float[Array, "batch length embed"]:
        """Dropout of the embedded input, the blocks, the final norm and its dropout.

        Layer l draws its dropout from `fold_in(dropout_key, l)`. What mixtures of experts say of
        themselves is left in `auxiliary`, by the path of the layers in the stack.
        """
        rate, broadcast = self.block.dropout_rate, self.block.broadcast_dropout
        shared = (-2,) if broadcast else ()
        key_in, key_layers, key_out = (fold_key(dropout_key, i) for i in range(3))
        x = dropout(x, rate=rate, key=key_in, broadcast_dims=shared)
        inputs: dict[str, Any] = {
            "mask": mask,
            "positions": positions,
            "relative_bias": self.relative_bias(),
            "context": context,
            "context_mask": context_mask,
            "real": real,
            "token_ids": token_ids,
        }
        if hasattr(self, "global_relpos_bias"):
            inputs["global_bias"] = self.global_relpos_bias()
        first, auxiliary = 0, {}
        for name, (blocks, repeats) in self._named_groups():
            group = getattr(self, name)
            x, of_blocks = self._run(
                group, x, first=first, repeats=repeats, key=key_layers, inputs=inputs
            )
            for i, of_block in enumerate(of_blocks):
                if of_block is not None:
                    path = name if isinstance(group, Block) else f"{name}/block_{i}"
                    auxiliary[path] = of_block
            first += blocks * repeats
        if auxiliary:
            self.auxiliary = nnx.Intermediate(auxiliary)
        if self.block.norm_placement == "post":
            return x  # The last block ends with its norm; nothing is dropped after it (BERT).
        x = self.normalise(x)
        # T5X shares the last draw among positions in the decoder, but not in the encoder.
        return dropout(x, rate=rate, key=key_out, broadcast_dims=shared if self.decoder else ())

    def layer_groups(self) -> list[Block | BlockGroup]:
        """The groups of layers in the order in which they run, each with its repeats stacked."""
        return [getattr(self, name) for name, _ in self._named_groups()]

    def _named_groups(self) -> list[tuple[str, tuple[int, int]]]:
        """Name, blocks and repeats of `layer_groups`."""
        groups = [(self._group_name(i), sizes) for i, sizes in enumerate(self.groups)]
        return ([("leading", (self.num_leading, 1))] if self.num_leading else []) + groups

    def relative_bias(self) -> RelativeBias | None:
        """The relative-position table of all layers; None if there is none or one a layer."""
        return self.relpos_bias() if hasattr(self, "relpos_bias") else None

    def normalise(
        self, x: Float[Array, "batch length embed"]
    ) -> Float[Array, "batch length embed"]:
        """The norm after the last layer, where norms do not stand after every branch."""
        name = self._norm_name()
        return getattr(self, name)(x) if hasattr(self, name) else x

    def _run(
        self,
        group: Block | BlockGroup,
        x: jax.Array,
        *,
        first: int,
        repeats: int,
        key: jax.Array | None,
        inputs: dict[str, Any],
    ) -> tuple[jax.Array, list[Auxiliary | None]]:
        """Scans over the repeats of a group whose first layer is layer `first` of the stack.

        The second result has an element a block, with a leading dim for the repeats.
        """
        graphdef, params = nnx.split(group)
        transform = remat_policy(self.remat)
        blocks = len(blocks_of(group))

        def run_group(
            x: jax.Array, scanned: tuple[Any, jax.Array]
        ) -> tuple[jax.Array, list[Auxiliary | None]]:
            params, repeat = scanned
            auxiliary = []
            for i, block in enumerate(blocks_of(nnx.merge(graphdef, params))):
                layer = first + repeat * blocks + i
                x, of_block = block(x, dropout_key=fold_key(key, layer), **inputs)
                auxiliary.append(of_block)
            return x, auxiliary

        scanned = (params, jnp.arange(repeats))
        unroll = min(self.scan_unroll, repeats)
        return jax.lax.scan(transform(run_group), x, scanned, unroll=unroll)
