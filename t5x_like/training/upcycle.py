"""Sparse upcycling: a model with experts that starts as the dense model of a checkpoint.

Komatsuzaki et al. 2023, arXiv:2212.05055: every expert starts as a copy of the dense layer that it
takes the place of, and so does its optimizer state; routers (and shared experts, of which the
dense model has none) start as in any other run.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from t5x_like.errors import UserError
from t5x_like.interop.initial import load_initial_params
from t5x_like.interop.matching import check_match
from t5x_like.interop.own import find_own_checkpoint
from t5x_like.layers.moe.layer import MoeConfig
from t5x_like.models.base import ModelDef
from t5x_like.models.block import BlockConfig
from t5x_like.models.encoder_decoder import EncoderDecoderConfig
from t5x_like.models.stack import Pattern, as_pattern, layer_slots
from t5x_like.parallel.logical import param_shardings
from t5x_like.training.checkpoints import flatten
from t5x_like.training.run import Built, optimizer_of
from t5x_like.training.state import state_shapes, state_shardings

_LAYER = re.compile(r"(.*\b|)(encoder|decoder)/(layers|leading/block_\d+|group_\d+/block_\d+)/(.*)")


def upcycled(built: Built) -> dict[str, jax.Array]:
    """What INITIAL_CHECKPOINT_PATH, of the dense twin of the model, has to give to the train state.

    Args:
      built: of a run with `upcycle`: "params" takes the parameters, from a checkpoint of any kind;
        "state" the optimizer's state too, from one of ours that the same optimizer wrote.

    Returns:
      Arrays by their name in the state, laid out as there.

    Raises:
      UserError: the model has no experts, the checkpoint is not of its dense twin or has no
        optimizer state, or the optimizer has one that no copy of can be made for each expert.
    """
    run, config = built.run, built.run.model
    path = run.initial_checkpoint_path
    assert path is not None
    twin = dense_twin(config)
    if twin == config:
        raise UserError(
            f"UPCYCLE is {run.upcycle!r}, and no block of the model has experts: remove it, or "
            "give a model with MoeConfig."
        )
    dense_def = ModelDef(twin)
    shardings = param_shardings(built.mesh, run.rules, dense_def.param_info)
    params = load_initial_params(path, dense_def.param_info, shardings=shardings, config=twin)
    dense = {f"params/{name}": leaf for name, leaf in flatten(params).items()}
    if run.upcycle == "state":
        optimizer = optimizer_of(run, dense_def)
        wanted = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            state_shapes(dense_def, optimizer).opt_state,
            state_shardings(dense_def, optimizer, built.mesh, run.rules).opt_state,
        )
        dense |= {f"opt_state/{n}": x for n, x in flatten(_load_opt_state(path, wanted)).items()}
    return copies(flatten(built.abstract_state), dense, config=config, twin=twin)


def dense_twin(config: Any) -> Any:
    """The config of the dense model: in place of experts, a layer of the shape of one."""

    def dense(block: BlockConfig) -> BlockConfig:
        mlp = block.mlp
        return dataclasses.replace(block, mlp=mlp.expert) if isinstance(mlp, MoeConfig) else block

    def pattern(block: Pattern) -> Pattern:
        blocks = tuple(dense(b) for b in as_pattern(block))
        # Without experts, a pattern may repeat a shorter one.
        lengths = (n for n in range(1, len(blocks) + 1) if len(blocks) % n == 0)
        period = next(n for n in lengths if blocks == blocks[:n] * (len(blocks) // n))
        return blocks[0] if period == 1 else blocks[:period]

    changed: dict[str, Any] = {"block": pattern(config.block)}
    leading = tuple(dense(b) for b in config.leading_blocks)
    # Without experts, the first layers of a stack may be like the others.
    changed["leading_blocks"] = () if set(leading) == {changed["block"]} else leading
    if isinstance(config, EncoderDecoderConfig) and config.encoder_block is not None:
        encoder = pattern(config.encoder_block)
        changed["encoder_block"] = None if encoder == changed["block"] else encoder
    return dataclasses.replace(config, **changed)


def _slots(config: Any) -> dict[tuple[str, str, int], tuple[str, int]]:
    """(stack, path in it, index on the leading axis) -> the layer, as (stack, number)."""
    if isinstance(config, EncoderDecoderConfig):
        depths = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}
    else:
        depths = {"decoder": config.num_layers}
    found: dict[tuple[str, str, int], tuple[str, int]] = {}
    for stack, depth in depths.items():
        block = config.block
        if stack == "encoder" and config.encoder_block is not None:
            block = config.encoder_block
        slots = layer_slots(block, depth, leading=config.leading_blocks)
        found |= {(stack, *slot): (stack, number) for number, slot in enumerate(slots)}
    return found


def copies(
    wanted: Mapping[str, Any], dense: Mapping[str, jax.Array], *, config: Any, twin: Any
) -> dict[str, jax.Array]:
    """By name, the arrays of `wanted` that the dense state has something for.

    Args:
      wanted: shape, dtype and sharding by name, of parameters or of a whole state.
      dense: arrays of the same part of the dense state.
      config, twin: of the two models.
    """
    layer_of = _slots(config)
    slot_of = {layer: slot for slot, layer in _slots(twin).items()}
    given = {}
    for name, leaf in wanted.items():
        source, rows = name.replace("/mlp/experts/", "/mlp/", 1), None
        if found := _LAYER.fullmatch(source):
            before, stack, path, rest = found.groups()
            slots = [slot_of[layer_of[stack, path, i]] for i in range(leaf.shape[0])]
            source = f"{before}{stack}/{slots[0][1]}/{rest}"
            rows = np.array([index for _, _, index in slots])
        if source in dense:
            experts = "/mlp/experts/" in name
            given[name] = _placed(dense[source], leaf, rows=rows, experts=experts, name=name)
    return given


def _placed(
    dense: jax.Array,
    leaf: jax.ShapeDtypeStruct,
    *,
    rows: np.ndarray | None,
    experts: bool,
    name: str,
) -> jax.Array:
    """`rows` of the dense array, for each expert, where and as `leaf` is."""

    def copy(x: jax.Array) -> jax.Array:
        if rows is not None:
            x = x[rows]
        if experts:
            x = jnp.repeat(x[:, None], leaf.shape[1], axis=1)
        return x.astype(leaf.dtype)

    shape = jax.eval_shape(copy, dense).shape
    if shape != leaf.shape:
        raise UserError(
            f"UPCYCLE cannot make {name} of shape {leaf.shape} from the dense model's, whose "
            f"copies have shape {shape}: set UPCYCLE = 'params'."
        )
    return jax.jit(copy, out_shardings=leaf.sharding)(dense)


def _load_opt_state(path: str, wanted: Any) -> Any:
    """The optimizer state of a checkpoint of ours, laid out as `wanted` says."""
    step_dir = find_own_checkpoint(path)
    if step_dir is None:
        raise UserError(
            f"UPCYCLE is 'state' and '{path}' is no checkpoint of t5x_like, so that it has no "
            "optimizer state to copy: set UPCYCLE = 'params'."
        )
    state = epath.Path(step_dir).absolute() / "state"
    handler = ocp.PyTreeCheckpointHandler()
    try:
        stored = flatten(handler.metadata(state).tree.get("opt_state", {}))
        if not stored:
            raise UserError(
                f"UPCYCLE is 'state', and the checkpoint '{step_dir}' has parameters only: set "
                "UPCYCLE = 'params'."
            )
        shapes = {name: tuple(leaf.shape) for name, leaf in stored.items()}
        check_match(shapes, flatten(wanted), what=str(step_dir))
        item = {"opt_state": wanted}
        args = ocp.args.PyTreeRestore(
            item=item,
            restore_args=ocp.checkpoint_utils.construct_restore_args(item),
            partial_restore=True,
        )
        return handler.restore(state, args=args)["opt_state"]
    finally:
        handler.close()
