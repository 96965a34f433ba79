"""DeepSeek-V2 and V3: latent attention, and experts after some dense layers.

The files of V3 go on with a layer for multi-token prediction, which transformers does not read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from t5x_like.errors import UserError
from t5x_like.interop.hugging_face.adapter import (
    EXPERTS,
    TRANSPOSE,
    ConfigJson,
    Entry,
    Family,
    Op,
    Shape,
    dense_mlp,
    fused,
    our_activation,
    their_activation,
)
from t5x_like.interop.hugging_face.llama import (
    LAYER,
    NORMS,
    linear,
    logits_of,
    norm,
    outer_entries,
)
from t5x_like.interop.hugging_face.rope import read_rope, write_rope
from t5x_like.layers.latent_attention import LatentAttentionConfig
from t5x_like.layers.mlp import MlpConfig
from t5x_like.layers.moe.layer import MoeConfig
from t5x_like.layers.moe.routers import SigmoidRouter, TopKRouter
from t5x_like.layers.norms import NormConfig
from t5x_like.models.block import BlockConfig
from t5x_like.models.decoder_only import DecoderOnlyConfig

Router = TopKRouter | SigmoidRouter
_FUTURE = "future/layers"
_FUTURE_NORMS = {
    "embedding_norm": "enorm",
    "hidden_norm": "hnorm",
    "norm": "shared_head.norm",
}
_PROJECTIONS = {"wi_0": "gate_proj", "wi_1": "up_proj", "wo": "down_proj"}


# ---- config.json -> ours.


def _check(config: ConfigJson) -> None:
    """Raises UserError for what published models do not have, and we do not either."""
    if config.get("quantization_config"):
        raise UserError(
            "config.json has a 'quantization_config', and its weights need their scales: "
            "dequantise them first, as DeepSeek's fp8_cast_bf16.py does."
        )
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    wanted = {
        "num_key_value_heads": heads, "attention_bias": False, "mlp_bias": False,
        "moe_layer_freq": 1,
    }  # fmt: skip
    for key, value in wanted.items():
        if config.get(key) not in (None, value):
            raise UserError(f"config.json: '{key}' {config[key]} is not supported, only {value}.")
    if config.get("first_k_dense_replace", 0) >= layers or not config.get("n_shared_experts"):
        raise UserError(
            "config.json: a DeepSeek model without experts ('first_k_dense_replace', "
            "'num_hidden_layers') or without 'n_shared_experts' is not supported."
        )


def _attention(config: ConfigJson, *, interleaved: bool) -> LatentAttentionConfig:
    parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    rope = read_rope(config)
    if rope.fraction != 1:
        raise UserError(
            "config.json: 'partial_rotary_factor' is not supported for this architecture."
        )
    return LatentAttentionConfig(
        num_heads=config["num_attention_heads"],
        head_dim=config["qk_nope_head_dim"],
        rotary_dim=config["qk_rope_head_dim"],
        value_dim=config["v_head_dim"],
        latent_dim=config["kv_lora_rank"],
        query_dim=config["q_lora_rank"],
        positions=dataclasses.replace(rope, interleaved=interleaved),
        mscale=parameters.get("mscale_all_dim") or 0.0,
        norm=NormConfig(epsilon=1e-6),
    )


def _decoder(config: ConfigJson, router: Router, *, interleaved: bool) -> DecoderOnlyConfig:
    activations = (our_activation(config.get("hidden_act", "silu")), "linear")

    def mlp(width: int) -> MlpConfig:
        return MlpConfig(mlp_dim=width, activations=activations)

    width = config["moe_intermediate_size"]
    sparse = BlockConfig(
        embed_dim=config["hidden_size"],
        attention=_attention(config, interleaved=interleaved),
        mlp=MoeConfig(
            num_experts=config["n_routed_experts"],
            expert=mlp(width),
            router=router,
            shared_expert=mlp(width * config["n_shared_experts"]),
        ),
        norm=NormConfig(epsilon=config.get("rms_norm_eps", 1e-6)),
        broadcast_dropout=False,
        init_stddev=config.get("initializer_range", 0.02),
    )
    dense = dataclasses.replace(sparse, mlp=mlp(config["intermediate_size"]))
    return DecoderOnlyConfig(
        vocab_size=config["vocab_size"],
        num_layers=config["num_hidden_layers"],
        block=sparse,
        leading_blocks=(dense,) * config.get("first_k_dense_replace", 0),
        logits=logits_of(config, default=False),
    )


def _v2(config: ConfigJson) -> DecoderOnlyConfig:
    _check(config)
    method, grouped = config.get("topk_method", "greedy"), "group_limited_greedy"
    if method not in ("greedy", grouped) or config.get("scoring_func", "softmax") != "softmax":
        raise UserError(
            f"config.json: 'topk_method' '{method}' with 'scoring_func' "
            f"'{config.get('scoring_func', 'softmax')}' is not supported, only softmax with "
            f"greedy or {grouped}."
        )
    if config.get("norm_topk_prob"):
        raise UserError("config.json: 'norm_topk_prob' is ignored for deepseek_v2; set it to false")
    k = config["num_experts_per_tok"]
    router = TopKRouter(
        k=k,
        scale=config.get("routed_scaling_factor", 1.0),
        num_groups=config["n_group"] if method == grouped else 1,
        top_groups=config["topk_group"] if method == grouped else 1,
        # Their loss has the share of a token's k choices, ours the number of them.
        balance_loss=config.get("aux_loss_alpha", 0.001) / k,
    )
    return _decoder(config, router, interleaved=True)


def _v3(config: ConfigJson) -> DecoderOnlyConfig:
    _check(config)
    for key, value in {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}.items():
        if config.get(key, value) != value:
            raise UserError(f"config.json: '{key}' '{config[key]}' is not supported, only {value}.")
    router = SigmoidRouter(
        k=config["num_experts_per_tok"],
        num_groups=config["n_group"],
        top_groups=config["topk_group"],
        renormalize=config.get("norm_topk_prob", True),
        scale=config.get("routed_scaling_factor", 2.5),
        sequence_loss=config.get("aux_loss_alpha", 0.0001),
    )
    decoder = _decoder(config, router, interleaved=config.get("rope_interleave", True))
    # transformers writes 'num_nextn_predict_layers' whether there is such a layer or not.
    first, tensors = decoder.num_layers, config.tensors or frozenset()
    numbers = range(first, first + config.get("num_nextn_predict_layers", 0))
    depth = sum(f"model.layers.{layer}.eh_proj.weight" in tensors for layer in numbers)
    return dataclasses.replace(decoder, future_depth=depth)


# ---- Ours -> config.json.


def _parts(config: Any) -> tuple[BlockConfig, LatentAttentionConfig, MoeConfig, MlpConfig]:
    """The block with experts, its attention and experts, and the MLP of the leading blocks.

    Raises:
      UserError: another model. What these parts do not say is compared once it is read back.
    """
    block = getattr(config, "block", None)
    if (
        isinstance(config, DecoderOnlyConfig)
        and isinstance(block, BlockConfig)
        and isinstance(block.attention, LatentAttentionConfig)
        and isinstance(block.mlp, MoeConfig)
        and block.mlp.shared_expert is not None
    ):
        dense = [dense_mlp(leading) for leading in config.leading_blocks]
        return block, block.attention, block.mlp, dense[0] if dense else block.mlp.expert
    raise UserError("DeepSeek has latent attention, and experts with a shared one")


def _json(name: str, config: Any, router: type[Router]) -> tuple[dict[str, Any], Any]:
    """(what both versions write, the router, which is of that kind)."""
    block, attention, moe, dense = _parts(config)
    assert moe.shared_expert is not None
    if not isinstance(moe.router, router):
        raise UserError(f"Deepseek{name} has a {router.__name__}")
    rope = write_rope(attention.positions)
    if attention.mscale:
        scaling = rope["rope_scaling"]
        scaling["mscale_all_dim"] = attention.mscale
        if scaling.get("attention_factor") == 1:  # As published: a ratio of two equal numbers.
            scaling["mscale"] = attention.mscale
            del scaling["attention_factor"]
    return {
        "architectures": [f"Deepseek{name}ForCausalLM"],
        "model_type": f"deepseek_{name.lower()}",
        "vocab_size": config.vocab_size,
        "hidden_size": block.embed_dim,
        "intermediate_size": dense.mlp_dim,
        "moe_intermediate_size": moe.expert.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "first_k_dense_replace": len(config.leading_blocks),
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_heads,
        "qk_nope_head_dim": attention.head_dim,
        "qk_rope_head_dim": attention.rotary_dim,
        "v_head_dim": attention.value_dim,
        "kv_lora_rank": attention.latent_dim,
        "q_lora_rank": attention.query_dim,
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.shared_expert.mlp_dim // moe.expert.mlp_dim,
        "num_experts_per_tok": moe.router.k,
        "n_group": moe.router.num_groups,
        "topk_group": moe.router.top_groups,
        "norm_topk_prob": moe.router.renormalize,
        "routed_scaling_factor": moe.router.scale,
        "hidden_act": their_activation(moe.activations[0]),
        "rms_norm_eps": block.norm.epsilon,
        "tie_word_embeddings": config.logits == "tied",
        **({} if block.init_stddev is None else {"initializer_range": block.init_stddev}),
        **rope,
    }, moe.router


def _v2_json(config: Any) -> dict[str, Any]:
    written, router = _json("V2", config, TopKRouter)
    return written | {
        "topk_method": "group_limited_greedy" if router.num_groups > 1 else "greedy",
        "scoring_func": "softmax",
        "aux_loss_alpha": router.balance_loss * router.k,
    }


def _v3_json(config: Any) -> dict[str, Any]:
    written, router = _json("V3", config, SigmoidRouter)
    return written | {
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "aux_loss_alpha": router.sequence_loss,
        "num_nextn_predict_layers": config.future_depth,
        "rope_interleave": config.block.attention.positions.interleaved,
    }


# ---- The table of names.


def _heads(num_heads: int, dims: tuple[int, int]) -> Op:
    """Keys and values, a head of the one after a head of the other in one torch.nn.Linear."""

    def to_ours(theirs: np.ndarray) -> tuple[np.ndarray, ...]:
        by_head = theirs.reshape(num_heads, sum(dims), -1)
        parts = np.split(by_head, [dims[0]], axis=1)
        return tuple(part.reshape(-1, theirs.shape[-1]).T for part in parts)

    def to_theirs(*ours: np.ndarray) -> np.ndarray:
        parts = [x.T.reshape(num_heads, dim, -1) for x, dim in zip(ours, dims, strict=True)]
        return np.concatenate(parts, axis=1).reshape(num_heads * sum(dims), -1)

    def theirs_shape(key: Shape, value: Shape) -> Shape:
        return key[1] + value[1], key[0]

    return Op(to_ours=to_ours, to_theirs=to_theirs, theirs_shape=theirs_shape)


def _block_entries(
    block: str, attention: LatentAttentionConfig, moe: MoeConfig, *, dense: range, sparse: range
) -> list[Entry]:
    """The layers that are called `block` here."""
    theirs = "model.layers.{layer}"
    entries = [e for ours, name in NORMS.items() for e in norm(f"{block}/{ours}", name)]
    entries += _attention_entries(attention, f"{block}/self_attention", f"{theirs}.self_attn")

    def mlp(ours: str, name: str) -> list[Entry]:
        return [
            Entry(
                f"{block}/mlp/{ours}{one}/kernel", f"{theirs}.mlp.{name}{other}.weight", TRANSPOSE
            )
            for one, other in _PROJECTIONS.items()
        ]

    of_experts = mlp("shared/", "shared_experts.") + [
        Entry(
            f"{block}/mlp/experts/{ours}/kernel",
            tuple(f"{theirs}.mlp.experts.{e}.{name}.weight" for e in range(moe.num_experts)),
            EXPERTS,
        )
        for ours, name in _PROJECTIONS.items()
    ]
    of_experts += linear(f"{block}/mlp/router", f"{theirs}.mlp.gate")
    if isinstance(moe.router, SigmoidRouter):
        bias = f"{theirs}.mlp.gate.e_score_correction_bias"
        of_experts.append(Entry(f"{block}/mlp/router/balance_bias", bias))
    entries += [dataclasses.replace(entry, layers=dense) for entry in mlp("", "")]
    return entries + [dataclasses.replace(entry, layers=sparse) for entry in of_experts]


def _attention_entries(config: LatentAttentionConfig, ours: str, theirs: str) -> list[Entry]:
    if config.query_dim is None:
        entries = linear(f"{ours}/query", f"{theirs}.q_proj")
    else:
        entries = [
            *linear(f"{ours}/query_down", f"{theirs}.q_a_proj"),
            *norm(f"{ours}/query_norm", f"{theirs}.q_a_layernorm"),
            *linear(f"{ours}/query", f"{theirs}.q_b_proj"),
        ]
    return [
        *entries,
        Entry(
            (f"{ours}/latent/kernel", f"{ours}/rotary_key/kernel"),
            f"{theirs}.kv_a_proj_with_mqa.weight",
            fused([config.latent_dim, config.rotary_dim], transpose=True),
        ),
        *norm(f"{ours}/latent_norm", f"{theirs}.kv_a_layernorm"),
        Entry(
            (f"{ours}/key/kernel", f"{ours}/value/kernel"),
            f"{theirs}.kv_b_proj.weight",
            _heads(config.num_heads, (config.head_dim, config.value_dim)),
        ),
        *linear(f"{ours}/out", f"{theirs}.o_proj"),
    ]


def _entries(config: DecoderOnlyConfig) -> list[Entry]:
    _, attention, moe, _ = _parts(config)
    first, last = len(config.leading_blocks), config.num_layers
    further = range(last, last + config.future_depth)
    return [
        *(_with_copies(entry, further) for entry in outer_entries(config)),
        *_block_entries(LAYER, attention, moe, dense=range(first), sparse=range(first, last)),
        *_block_entries(f"{_FUTURE}/block", attention, moe, dense=range(0), sparse=further),
        *(
            entry
            for ours, name in _FUTURE_NORMS.items()
            for entry in norm(f"{_FUTURE}/{ours}", f"model.layers.{{layer}}.{name}")
        ),
        *linear(f"{_FUTURE}/projection", "model.layers.{layer}.eh_proj"),
    ]


def _with_copies(entry: Entry, layers: range) -> Entry:
    """Each module of multi-token prediction has copies of the token table and the output kernel."""
    copies = {
        "model.embed_tokens.weight": "embed_tokens.weight",
        "lm_head.weight": "shared_head.head.weight",
    }
    names = [copies[str(name)] for name in (entry.theirs, *entry.aliases) if name in copies]
    more = [f"model.layers.{layer}.{name}" for layer in layers for name in names]
    return dataclasses.replace(entry, aliases=(*entry.aliases, *more))


def _family(
    version: str,
    from_config: Callable[[ConfigJson], DecoderOnlyConfig],
    to_config: Callable[[Any], dict[str, Any]],
) -> Family:
    return Family(
        name=f"DeepSeek-{version}",
        architectures=(f"Deepseek{version}ForCausalLM",),
        model_types=(f"deepseek_{version.lower()}",),
        from_config=from_config,
        to_config=to_config,
        entries=_entries,
        # Buffers that early versions of their code saved.
        ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
        plain=False,
    )


FAMILIES = (_family("V2", _v2, _v2_json), _family("V3", _v3, _v3_json))
