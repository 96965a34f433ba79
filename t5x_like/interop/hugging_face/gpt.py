"""Adapters of the GPT line: GPT-1, GPT-2, GPT-NeoX (Pythia), GPT-J, Falcon."""

from __future__ import annotations

import dataclasses
from typing import Any

from t5x_like.errors import UserError
from t5x_like.interop.hugging_face.adapter import (
    SAME,
    TRANSPOSE,
    ConfigJson,
    Entry,
    Family,
    dense_mlp,
    fused,
    heads_of,
    our_activation,
    their_activation,
)
from t5x_like.interop.hugging_face.gpt_parts import (
    ATTENTION,
    DROPOUTS,
    LAYER,
    PDROPS,
    common_json,
    decoder_config,
    grouped_qkv,
    head_dim_of,
    linear_entries,
    norm_entries,
    only_block,
    qkv_entries,
    refuse,
    rope_of,
    vocabulary_entries,
)
from t5x_like.interop.hugging_face.llama import logits_of
from t5x_like.interop.hugging_face.rope import read_rope, write_rope
from t5x_like.layers.attention import AttentionConfig
from t5x_like.layers.mlp import MlpConfig
from t5x_like.layers.positions import AlibiConfig, LearnedPositionsConfig
from t5x_like.layers.rope import RopeConfig

# ---- GPT-1 and GPT-2: GPT-2 has the norms before the branches, and one at the end.


def _gpt(config: ConfigJson, *, activation: str, mlp_dim: int | None, placement: Any) -> Any:
    head_dim = head_dim_of(config, width="n_embd", heads="n_head")
    return decoder_config(
        config,
        embed_dim=config["n_embd"],
        attention=AttentionConfig(
            num_heads=config["n_head"],
            head_dim=head_dim,
            logit_scale="rsqrt_head_dim" if config.get("scale_attn_weights", True) else None,
            qkv_bias=True,
            out_bias=True,
        ),
        mlp=MlpConfig(
            mlp_dim=mlp_dim or 4 * config["n_embd"], activations=(activation,), use_bias=True
        ),
        epsilon=config.get("layer_norm_epsilon", 1e-5),
        num_layers=config["n_layer"],
        positions=LearnedPositionsConfig(max_length=config["n_positions"]),
        logits=logits_of(config, default=True),
        norm_placement=placement,
    )


def _gpt1_from(config: ConfigJson) -> Any:
    # This class calls the tanh approximation "gelu".
    name = config.get("afn", "gelu")
    activation = "gelu" if name == "gelu" else our_activation(name)
    return _gpt(config, activation=activation, mlp_dim=None, placement="post")


def _gpt2_from(config: ConfigJson) -> Any:
    refuse(config, add_cross_attention=False, scale_attn_by_inverse_layer_idx=False)
    activation = our_activation(config.get("activation_function", "gelu_new"))
    return _gpt(config, activation=activation, mlp_dim=config.get("n_inner"), placement="pre")


def _gpt_to(config: Any, *, architecture: str, model_type: str) -> dict[str, Any]:
    block = only_block(config)
    if not isinstance(config.positions, LearnedPositionsConfig):
        raise UserError("its positions are not learned ones")
    return {
        **common_json(config, architecture=architecture, model_type=model_type, dropouts=PDROPS),
        "n_positions": config.positions.max_length,
        "n_embd": block.embed_dim,
        "n_layer": config.num_layers,
        "n_head": block.attention.num_heads,
        "layer_norm_epsilon": block.norm.epsilon,
    }


def _gpt1_to(config: Any) -> dict[str, Any]:
    written = _gpt_to(config, architecture="OpenAIGPTLMHeadModel", model_type="openai-gpt")
    activation = config.block.mlp.activations[0]
    name = "gelu" if activation == "gelu" else their_activation(activation)
    return {**written, "afn": name}


def _gpt2_to(config: Any) -> dict[str, Any]:
    written = _gpt_to(config, architecture="GPT2LMHeadModel", model_type="gpt2")
    block = config.block
    return {
        **written,
        "n_inner": dense_mlp(block).mlp_dim,
        "activation_function": their_activation(block.mlp.activations[0]),
        "scale_attn_weights": block.attention.logit_scale is not None,
    }


def _gpt_entries(config: Any, *, table: str, positions: str, placement: str) -> list[Entry]:
    theirs, width = "transformer.h.{layer}", config.block.embed_dim  # Kernels are (in, out).
    return [
        *vocabulary_entries(config, f"transformer.{table}.weight"),
        Entry("position_embedder/embedding", f"transformer.{positions}.weight"),
        *norm_entries(f"{LAYER}/{placement}_self_attention_layer_norm", f"{theirs}.ln_1"),
        *qkv_entries(f"{theirs}.attn.c_attn", bias=True, op=fused([width] * 3, transpose=False)),
        *linear_entries(f"{ATTENTION}/out", f"{theirs}.attn.c_proj", bias=True, op=SAME),
        *norm_entries(f"{LAYER}/{placement}_mlp_layer_norm", f"{theirs}.ln_2"),
        *linear_entries(f"{LAYER}/mlp/wi", f"{theirs}.mlp.c_fc", bias=True, op=SAME),
        *linear_entries(f"{LAYER}/mlp/wo", f"{theirs}.mlp.c_proj", bias=True, op=SAME),
    ]


def _gpt1_entries(config: Any) -> list[Entry]:
    return _gpt_entries(config, table="tokens_embed", positions="positions_embed", placement="post")


def _gpt2_entries(config: Any) -> list[Entry]:
    entries = _gpt_entries(config, table="wte", positions="wpe", placement="pre")
    return [*entries, *norm_entries("decoder/decoder_norm", "transformer.ln_f")]


# ---- GPT-NeoX and Pythia


def _neox_from(config: ConfigJson) -> Any:
    bias = config.get("attention_bias", True)
    # The names of older files, where the general ones are not given.
    named = {
        "rope_theta": config.get("rotary_emb_base", 10000),
        "partial_rotary_factor": config.get("rotary_pct", 0.25),
    }
    return decoder_config(
        config,
        embed_dim=config["hidden_size"],
        attention=AttentionConfig(
            num_heads=config["num_attention_heads"],
            head_dim=head_dim_of(config, width="hidden_size", heads="num_attention_heads"),
            logit_scale="rsqrt_head_dim",
            qkv_bias=bias,
            out_bias=bias,
            positions=read_rope(ConfigJson({**named, **config})),
        ),
        mlp=MlpConfig(
            mlp_dim=config["intermediate_size"],
            activations=(our_activation(config.get("hidden_act", "gelu")),),
            use_bias=True,
        ),
        epsilon=config.get("layer_norm_eps", 1e-5),
        num_layers=config["num_hidden_layers"],
        logits=logits_of(config, default=False),
        residual="parallel" if config.get("use_parallel_residual", True) else "sequential",
    )


def _neox_to(config: Any) -> dict[str, Any]:
    block = only_block(config)
    rope = rope_of(block)
    return {
        **common_json(
            config, architecture="GPTNeoXForCausalLM", model_type="gpt_neox", dropouts=DROPOUTS
        ),
        **write_rope(rope),
        "rotary_pct": rope.fraction,
        "rotary_emb_base": rope.theta,
        "hidden_size": block.embed_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": block.attention.num_heads,
        "intermediate_size": dense_mlp(block).mlp_dim,
        "hidden_act": their_activation(block.mlp.activations[0]),
        "layer_norm_eps": block.norm.epsilon,
        "attention_bias": heads_of(block).qkv_bias,
        "use_parallel_residual": block.residual == "parallel",
    }


def _neox_entries(config: Any) -> list[Entry]:
    theirs, attention = "gpt_neox.layers.{layer}", config.block.attention
    bias = attention.qkv_bias
    qkv = f"{theirs}.attention.query_key_value"
    return [
        *vocabulary_entries(config, "gpt_neox.embed_in.weight", "embed_out"),
        *norm_entries(f"{LAYER}/pre_self_attention_layer_norm", f"{theirs}.input_layernorm"),
        *qkv_entries(qkv, bias=bias, op=grouped_qkv(attention)),
        *linear_entries(f"{ATTENTION}/out", f"{theirs}.attention.dense", bias=bias),
        *norm_entries(f"{LAYER}/pre_mlp_layer_norm", f"{theirs}.post_attention_layernorm"),
        *linear_entries(f"{LAYER}/mlp/wi", f"{theirs}.mlp.dense_h_to_4h", bias=True),
        *linear_entries(f"{LAYER}/mlp/wo", f"{theirs}.mlp.dense_4h_to_h", bias=True),
        *norm_entries("decoder/decoder_norm", "gpt_neox.final_layer_norm"),
    ]


# ---- GPT-J


def _gptj_from(config: ConfigJson) -> Any:
    refuse(config, tie_word_embeddings=False)
    head_dim = head_dim_of(config, width="n_embd", heads="n_head")
    return decoder_config(
        config,
        embed_dim=config["n_embd"],
        attention=AttentionConfig(
            num_heads=config["n_head"],
            head_dim=head_dim,
            logit_scale="rsqrt_head_dim",
            positions=RopeConfig(fraction=config["rotary_dim"] / head_dim, interleaved=True),
        ),
        mlp=MlpConfig(
            mlp_dim=config.get("n_inner") or 4 * config["n_embd"],
            activations=(our_activation(config.get("activation_function", "gelu_new")),),
            use_bias=True,
        ),
        epsilon=config.get("layer_norm_epsilon", 1e-5),
        num_layers=config["n_layer"],
        logits="dense",
        logits_bias=True,
        residual="parallel_shared_norm",
    )


def _gptj_to(config: Any) -> dict[str, Any]:
    block = only_block(config)
    rope = rope_of(block)
    return {
        **common_json(config, architecture="GPTJForCausalLM", model_type="gptj", dropouts=PDROPS),
        "n_embd": block.embed_dim,
        "n_layer": config.num_layers,
        "n_head": block.attention.num_heads,
        "n_inner": dense_mlp(block).mlp_dim,
        "rotary_dim": rope.rotated_dims(block.attention.head_dim),
        "activation_function": their_activation(block.mlp.activations[0]),
        "layer_norm_epsilon": block.norm.epsilon,
    }


def _gptj_entries(config: Any) -> list[Entry]:
    theirs = "transformer.h.{layer}"
    projections = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
    return [
        *vocabulary_entries(config, "transformer.wte.weight"),
        *norm_entries(f"{LAYER}/pre_self_attention_layer_norm", f"{theirs}.ln_1"),
        *(
            Entry(f"{ATTENTION}/{mine}/kernel", f"{theirs}.attn.{their}.weight", TRANSPOSE)
            for mine, their in projections.items()
        ),
        *linear_entries(f"{LAYER}/mlp/wi", f"{theirs}.mlp.fc_in", bias=True),
        *linear_entries(f"{LAYER}/mlp/wo", f"{theirs}.mlp.fc_out", bias=True),
        *norm_entries("decoder/decoder_norm", "transformer.ln_f"),
    ]


# ---- Falcon


def _falcon_residual(config: ConfigJson) -> str:
    """Falcon-RW is sequential; 7B shares the norm of its branches; 40B has one for each."""
    norms = config.get("num_ln_in_parallel_attn")
    if config.get("new_decoder_architecture", False):
        return "parallel" if norms in (None, 2) else "parallel_shared_norm"
    if norms == 2:
        raise UserError(
            "config.json: num_ln_in_parallel_attn 2 goes with new_decoder_architecture true only"
        )
    return "parallel_shared_norm" if config.get("parallel_attn", True) else "sequential"


def _falcon_from(config: ConfigJson) -> Any:
    heads, bias = config["num_attention_heads"], config.get("bias", False)
    head_dim = head_dim_of(config, width="hidden_size", heads="num_attention_heads")
    grouped = config.get("new_decoder_architecture", False)
    if not grouped and config.get("multi_query", True):
        kv_heads = 1
    else:
        kv_heads = config.get("num_kv_heads") or heads
    if config.get("alibi", False):
        positions: Any = AlibiConfig(scale=head_dim**-0.5)  # Added before the logits are scaled.
    else:
        positions = dataclasses.replace(read_rope(config), fraction=1.0)  # It rotates whole heads.
    return decoder_config(
        config,
        embed_dim=config["hidden_size"],
        attention=AttentionConfig(
            num_heads=heads,
            head_dim=head_dim,
            num_kv_heads=None if kv_heads == heads else kv_heads,
            logit_scale="rsqrt_head_dim",
            qkv_bias=bias,
            out_bias=bias,
            positions=positions,
        ),
        mlp=MlpConfig(
            mlp_dim=config.get("ffn_hidden_size") or 4 * config["hidden_size"],
            activations=(our_activation(config.get("activation", "gelu")),),
            use_bias=bias,
        ),
        epsilon=config.get("layer_norm_epsilon", 1e-5),
        num_layers=config["num_hidden_layers"],
        logits=logits_of(config, default=True),
        residual=_falcon_residual(config),
    )


def _falcon_to(config: Any) -> dict[str, Any]:
    block = only_block(config)
    attention = heads_of(block)
    heads, kv_heads = attention.num_heads, attention.num_kv_heads or attention.num_heads
    # The newer decoder is parallel with any number of key and value heads, the older one has one
    # norm or is sequential, with one or all of them.
    grouped = block.residual == "parallel" or kv_heads not in (1, heads)
    norms = 2 if block.residual == "parallel" else 1
    alibi = isinstance(attention.positions, AlibiConfig)
    return {
        **common_json(
            config, architecture="FalconForCausalLM", model_type="falcon", dropouts=DROPOUTS
        ),
        **({} if alibi else write_rope(rope_of(block))),
        "hidden_size": block.embed_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": heads,
        "num_kv_heads": kv_heads,
        "ffn_hidden_size": dense_mlp(block).mlp_dim,
        "activation": their_activation(block.mlp.activations[0]),
        "layer_norm_epsilon": block.norm.epsilon,
        "bias": attention.qkv_bias,
        "alibi": alibi,
        "new_decoder_architecture": grouped,
        "multi_query": kv_heads == 1,
        "parallel_attn": block.residual != "sequential",
        "num_ln_in_parallel_attn": norms if grouped else None,
    }


def _falcon_entries(config: Any) -> list[Entry]:
    theirs, block = "transformer.h.{layer}", config.block
    bias = block.attention.qkv_bias
    attention_norm, mlp_norm = {
        "sequential": ("input_layernorm", "post_attention_layernorm"),
        "parallel": ("ln_attn", "ln_mlp"),
        "parallel_shared_norm": ("input_layernorm", None),
    }[block.residual]
    qkv = f"{theirs}.self_attention.query_key_value"
    return [
        *vocabulary_entries(config, "transformer.word_embeddings.weight"),
        *norm_entries(f"{LAYER}/pre_self_attention_layer_norm", f"{theirs}.{attention_norm}"),
        *qkv_entries(qkv, bias=bias, op=grouped_qkv(block.attention)),
        *linear_entries(f"{ATTENTION}/out", f"{theirs}.self_attention.dense", bias=bias),
        *(norm_entries(f"{LAYER}/pre_mlp_layer_norm", f"{theirs}.{mlp_norm}") if mlp_norm else ()),
        *linear_entries(f"{LAYER}/mlp/wi", f"{theirs}.mlp.dense_h_to_4h", bias=bias),
        *linear_entries(f"{LAYER}/mlp/wo", f"{theirs}.mlp.dense_4h_to_h", bias=bias),
        *norm_entries("decoder/decoder_norm", "transformer.ln_f"),
    ]


# ---- The families.

# OpenAI's own files have no name for the model around the decoder.
_PREFIX = ((r"^(?!transformer\.|lm_head\.)", "transformer."),)

FAMILIES = (
    Family(
        name="GPT-1",
        architectures=("OpenAIGPTLMHeadModel",),
        model_types=("openai-gpt",),
        from_config=_gpt1_from,
        to_config=_gpt1_to,
        entries=_gpt1_entries,
        ignored=(r"transformer\.h\.\d+\.attn\.bias", r"transformer\.position_ids"),
        renames=_PREFIX,
    ),
    Family(
        name="GPT-2",
        architectures=("GPT2LMHeadModel",),
        model_types=("gpt2",),
        from_config=_gpt2_from,
        to_config=_gpt2_to,
        entries=_gpt2_entries,
        ignored=(r"transformer\.h\.\d+\.attn\.(masked_)?bias",),
        renames=_PREFIX,
    ),
    Family(
        name="GPT-NeoX",
        architectures=("GPTNeoXForCausalLM",),
        model_types=("gpt_neox",),
        from_config=_neox_from,
        to_config=_neox_to,
        entries=_neox_entries,
        ignored=(
            r"gpt_neox\.layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)",
            r"gpt_neox\.rotary_emb\.inv_freq",
        ),
        renames=((r"^lm_head\.", "embed_out."),),
    ),
    Family(
        name="GPT-J",
        architectures=("GPTJForCausalLM",),
        model_types=("gptj",),
        from_config=_gptj_from,
        to_config=_gptj_to,
        entries=_gptj_entries,
        ignored=(r"transformer\.h\.\d+\.attn\.((masked_)?bias|embed_positions)",),
    ),
    Family(
        name="Falcon",
        architectures=("FalconForCausalLM",),
        model_types=("falcon",),
        from_config=_falcon_from,
        to_config=_falcon_to,
        entries=_falcon_entries,
        ignored=(r"transformer\.h\.\d+\.self_attention\.(maybe_)?rotary(_emb)?\.inv_freq",),
    ),
)
