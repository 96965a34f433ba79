"""Switch Transformers: T5 with mixtures of experts, one expert a token.

transformers lets an expert take `expert_capacity` tokens of a row and drops the rest, whatever the
row's length; here capacity is a factor of it. A model that is read or written drops none, which is
the same as long as no expert is chosen by more than `expert_capacity` tokens of one row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from t5x_like.errors import UserError
from t5x_like.interop.hugging_face.adapter import (
    TRANSPOSE,
    ConfigJson,
    Entry,
    Family,
    layer_blocks,
    our_activation,
    their_activation,
)
from t5x_like.interop.hugging_face.experts import (
    dense_layers,
    mixture_entries,
    sparse_layers,
    top_k_mixture,
)
from t5x_like.interop.hugging_face.llama import repeating
from t5x_like.interop.hugging_face.t5 import attention_entries, mlp_sublayer, outer_entries
from t5x_like.layers.attention import AttentionConfig
from t5x_like.layers.mlp import MlpConfig
from t5x_like.layers.moe.layer import MoeConfig
from t5x_like.layers.moe.routers import TopKRouter
from t5x_like.layers.norms import NormConfig
from t5x_like.layers.positions import RelativePositionsConfig
from t5x_like.models.block import BlockConfig
from t5x_like.models.encoder_decoder import EncoderDecoderConfig
from t5x_like.models.stack import Pattern

# An expert's capacity that no row is long enough for.
NO_LIMIT = 2**20
SIDES = ("encoder", "decoder")


def _sparse(num_layers: int, step: int) -> tuple[int, ...]:
    """The layers that are mixtures where every `step`-th is, as transformers counts them."""
    return tuple(layer for layer in range(num_layers) if step == 1 or layer % step == 1)


def _step(config: ConfigJson, side: str, num_layers: int) -> int:
    if (step := config.get(f"{side}_sparse_step")) is not None:
        return step
    number = config.get(f"num_sparse_{side}_layers", 3)
    return num_layers // number if number > 0 else num_layers


def _from_config(config: ConfigJson) -> EncoderDecoderConfig:
    if config.get("router_bias", False):
        raise UserError("config.json: 'router_bias' is true, and no router here has a bias.")
    layers = {"encoder": config["num_layers"]}
    layers["decoder"] = config.get("num_decoder_layers") or layers["encoder"]
    dense = MlpConfig(
        mlp_dim=config["d_ff"], activations=(our_activation(config.get("dense_act_fn", "relu")),)
    )
    mixture = MoeConfig(
        num_experts=config["num_experts"],
        expert=dense,
        router=TopKRouter(
            k=1,
            jitter=config.get("router_jitter_noise", 0.01),
            balance_loss=config.get("router_aux_loss_coef", 0.001),
            z_loss=config.get("router_z_loss_coef", 0.001),
        ),
    )

    def block(mlp: MlpConfig | MoeConfig) -> BlockConfig:
        return BlockConfig(
            embed_dim=config["d_model"],
            attention=AttentionConfig(num_heads=config["num_heads"], head_dim=config["d_kv"]),
            mlp=mlp,
            norm=NormConfig(epsilon=config.get("layer_norm_epsilon", 1e-6)),
            dropout_rate=config.get("dropout_rate", 0.1),
        )

    def pattern(side: str) -> Pattern:
        sparse = _sparse(layers[side], _step(config, side, layers[side]))
        kinds = [mixture if layer in sparse else dense for layer in range(layers[side])]
        return repeating(kinds, block)

    encoder, decoder = (pattern(side) for side in SIDES)
    return EncoderDecoderConfig(
        vocab_size=config["vocab_size"],
        num_encoder_layers=layers["encoder"],
        num_decoder_layers=layers["decoder"],
        block=decoder,
        encoder_block=None if encoder == decoder else encoder,
        positions=RelativePositionsConfig(
            num_buckets=config.get("relative_attention_num_buckets", 32),
            max_distance=config.get("relative_attention_max_distance", 128),
        ),
        logits="tied_rescaled" if config.get("tie_word_embeddings", True) else "dense",
    )


def _to_config(config: Any) -> dict[str, Any]:
    if not isinstance(config, EncoderDecoderConfig):
        raise UserError(f"Switch is an encoder-decoder, not a {type(config).__name__}")
    positions = config.positions
    if not isinstance(positions, RelativePositionsConfig):
        raise UserError("Switch has relative positions")
    sides = {side: layer_blocks(config, side) for side in SIDES}
    moe, router = top_k_mixture([*sides["encoder"], *sides["decoder"]], name="Switch")
    block = config.first_block
    if len(moe.activations) > 1:
        raise UserError(f"Switch has no MLP with activations {moe.activations}")
    return {
        "architectures": ["SwitchTransformersForConditionalGeneration"],
        "model_type": "switch_transformers",
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": block.embed_dim,
        "d_kv": block.attention.head_dim,
        "d_ff": moe.expert.mlp_dim,
        "dense_act_fn": their_activation(moe.activations[0], prefer="gelu_new"),
        "num_heads": block.attention.num_heads,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "num_experts": moe.num_experts,
        "expert_capacity": NO_LIMIT,
        "router_jitter_noise": router.jitter,
        "router_aux_loss_coef": router.balance_loss,
        "router_z_loss_coef": router.z_loss,
        "layer_norm_epsilon": block.norm.epsilon,
        "dropout_rate": block.dropout_rate,
        "relative_attention_num_buckets": positions.num_buckets,
        "relative_attention_max_distance": positions.max_distance,
        "tie_word_embeddings": config.logits != "dense",
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        **_sparse_json("encoder", sides["encoder"]),
        **_sparse_json("decoder", sides["decoder"]),
    }


def _sparse_json(side: str, blocks: Sequence[BlockConfig]) -> dict[str, int]:
    """How many layers are mixtures, from which transformers makes the step, and the step."""
    wanted = sparse_layers(blocks)
    for number in range(1, len(blocks) + 1):
        step = len(blocks) // number
        if _sparse(len(blocks), step) == wanted:
            return {f"num_sparse_{side}_layers": number, f"{side}_sparse_step": step}
    raise UserError(f"Switch cannot have mixtures of experts in layers {wanted} of its {side}")


def _entries(config: EncoderDecoderConfig) -> list[Entry]:
    table, *logits = outer_entries(config)
    # Where logits have a table of their own, transformers ties the two sides' tables neither.
    table = dataclasses.replace(table, copied=config.logits == "dense")
    return [table, *logits, *_side(config, "encoder"), *_side(config, "decoder")]


def _side(config: EncoderDecoderConfig, side: str) -> list[Entry]:
    blocks = layer_blocks(config, side)
    ours, theirs = f"{side}/layers/mlp", f"{mlp_sublayer(side)}.mlp"
    expert = f"{theirs}.experts.expert_{{expert}}"
    names = {"router": f"{theirs}.router.classifier", "wi": f"{expert}.wi", "wo": f"{expert}.wo"}
    table = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    entries = [
        *attention_entries(side),
        Entry(f"{side}/relpos_bias/rel_embedding", table, TRANSPOSE),
    ]
    if dense := dense_layers(blocks):
        entries += [
            Entry(f"{ours}/{name}/kernel", f"{theirs}.{name}.weight", TRANSPOSE, layers=dense)
            for name in ("wi", "wo")
        ]
    if sparse := sparse_layers(blocks):
        moe, _ = top_k_mixture(blocks, name="Switch")
        entries += mixture_entries(moe, ours, names, layers=sparse)
    return entries


FAMILIES = (
    Family(
        name="Switch",
        architectures=("SwitchTransformersForConditionalGeneration",),
        model_types=("switch_transformers",),
        from_config=_from_config,
        to_config=_to_config,
        entries=_entries,
    ),
)
