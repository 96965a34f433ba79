"""BERT and RoBERTa: pre-training, masked language models, sequence classification."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from t5x_like.errors import UserError
from t5x_like.interop.hugging_face.adapter import (
    ConfigJson,
    Entry,
    Family,
    dense_mlp,
    our_activation,
    their_activation,
)
from t5x_like.interop.hugging_face.gpt_parts import (
    head_dim_of,
    linear_entries,
    norm_entries,
    refuse,
)
from t5x_like.layers.attention import AttentionConfig
from t5x_like.layers.mlp import MlpConfig
from t5x_like.layers.norms import NormConfig
from t5x_like.layers.positions import LearnedPositionsConfig
from t5x_like.models.block import BlockConfig
from t5x_like.models.encoder_only import EncoderOnlyConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Kind:
    """One of their classes.

    Attributes:
      model_type: also the prefix of the names of its tensors.
      offset: rows of the position table before that of position 0.
      masked_lm: name of the masked-LM head's projection, norm and bias; None without that head.
      classes: names of the pooler and of the classifier; None without them.
    """

    architecture: str
    model_type: str = "bert"
    offset: int = 0
    masked_lm: tuple[str, str, str] | None = None
    classes: tuple[str, str] | None = None


_BERT_HEAD = (
    "cls.predictions.transform.dense",
    "cls.predictions.transform.LayerNorm",
    "cls.predictions",
)
_ROBERTA: dict[str, Any] = {"model_type": "roberta", "offset": 2}
_PRETRAINING = _Kind(
    architecture="BertForPreTraining",
    masked_lm=_BERT_HEAD,
    classes=("bert.pooler.dense", "cls.seq_relationship"),
)
_KINDS = (
    _PRETRAINING,
    _Kind(architecture="BertForMaskedLM", masked_lm=_BERT_HEAD),
    _Kind(
        architecture="BertForSequenceClassification", classes=("bert.pooler.dense", "classifier")
    ),
    _Kind(
        architecture="RobertaForMaskedLM",
        masked_lm=("lm_head.dense", "lm_head.layer_norm", "lm_head"),
        **_ROBERTA,
    ),
    _Kind(
        architecture="RobertaForSequenceClassification",
        classes=("classifier.dense", "classifier.out_proj"),
        **_ROBERTA,
    ),
)


def _from_config(config: ConfigJson, *, kind: _Kind) -> EncoderOnlyConfig:
    refuse(
        config,
        is_decoder=False,
        add_cross_attention=False,
        tie_word_embeddings=True,
        position_embedding_type="absolute",
    )
    activation = our_activation(config.get("hidden_act", "gelu"))
    if kind.model_type == "roberta" and kind.masked_lm and activation != "gelu_exact":
        raise UserError(
            f"config.json: hidden_act '{config['hidden_act']}' with RoBERTa's masked-LM head, "
            "which always has 'gelu', is not supported"
        )
    num_classes = None
    if kind.classes:
        labels = config.get("id2label") or range(config.get("num_labels", 2))
        num_classes = 2 if kind is _PRETRAINING else len(labels)
    return EncoderOnlyConfig(
        vocab_size=config["vocab_size"],
        num_layers=config["num_hidden_layers"],
        block=BlockConfig(
            embed_dim=config["hidden_size"],
            attention=AttentionConfig(
                num_heads=config["num_attention_heads"],
                head_dim=head_dim_of(config, width="hidden_size", heads="num_attention_heads"),
                logit_scale="rsqrt_head_dim",
                qkv_bias=True,
                out_bias=True,
            ),
            mlp=MlpConfig(
                mlp_dim=config["intermediate_size"], activations=(activation,), use_bias=True
            ),
            norm=NormConfig(
                kind="layer", epsilon=config.get("layer_norm_eps", 1e-12), use_bias=True
            ),
            norm_placement="post",
            dropout_rate=config.get("hidden_dropout_prob", 0.1),
            broadcast_dropout=False,
            init_stddev=config.get("initializer_range", 0.02),
        ),
        positions=LearnedPositionsConfig(
            max_length=config["max_position_embeddings"] - kind.offset, offset=kind.offset
        ),
        num_token_types=config["type_vocab_size"],
        embedding_norm=True,
        logits_bias=True,
        masked_lm_head=kind.masked_lm is not None,
        num_classes=num_classes,
    )


def _to_config(config: Any, *, kind: _Kind) -> dict[str, Any]:
    if not isinstance(config, EncoderOnlyConfig) or not isinstance(config.block, BlockConfig):
        raise UserError("it is not an encoder of equal blocks")
    if not isinstance(config.positions, LearnedPositionsConfig) or not config.num_token_types:
        raise UserError("it has no learned positions, or no token types")
    block, positions = config.block, config.positions
    labels = [f"LABEL_{i}" for i in range(config.num_classes or 2)]
    return {
        "architectures": [kind.architecture],
        "model_type": kind.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": block.embed_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": block.attention.num_heads,
        "intermediate_size": dense_mlp(block).mlp_dim,
        "hidden_act": their_activation(block.mlp.activations[0]),
        "layer_norm_eps": block.norm.epsilon,
        "hidden_dropout_prob": block.dropout_rate,
        "attention_probs_dropout_prob": block.dropout_rate,
        "initializer_range": block.embedding_stddev,
        "max_position_embeddings": positions.max_length + positions.offset,
        "type_vocab_size": config.num_token_types,
        "tie_word_embeddings": True,
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }


def _entries(config: EncoderOnlyConfig, *, kind: _Kind) -> list[Entry]:
    theirs = f"{kind.model_type}.embeddings"
    table, bias = f"{theirs}.word_embeddings.weight", []
    aliases: tuple[str, ...] = ()
    if kind.masked_lm:
        head = kind.masked_lm[2]
        aliases = (f"{head}.decoder.weight",)
        bias = [Entry("logits_bias", f"{head}.bias", aliases=(f"{head}.decoder.bias",))]
    return [
        Entry("token_embedder/embedding", table, aliases=aliases),
        Entry("position_embedder/embedding", f"{theirs}.position_embeddings.weight"),
        Entry("token_type_embedder/embedding", f"{theirs}.token_type_embeddings.weight"),
        *norm_entries("embedding_norm", f"{theirs}.LayerNorm"),
        *_block_entries(f"{kind.model_type}.encoder.layer.{{layer}}"),
        *bias,
        *_head_entries(kind),
    ]


def _block_entries(theirs: str) -> list[Entry]:
    ours = "encoder/layers"
    linear = {
        "attention/query": "attention.self.query",
        "attention/key": "attention.self.key",
        "attention/value": "attention.self.value",
        "attention/out": "attention.output.dense",
        "mlp/wi": "intermediate.dense",
        "mlp/wo": "output.dense",
    }
    entries = [
        entry
        for mine, their in linear.items()
        for entry in linear_entries(f"{ours}/{mine}", f"{theirs}.{their}", bias=True)
    ]
    return [
        *entries,
        *norm_entries(f"{ours}/post_attention_layer_norm", f"{theirs}.attention.output.LayerNorm"),
        *norm_entries(f"{ours}/post_mlp_layer_norm", f"{theirs}.output.LayerNorm"),
    ]


def _head_entries(kind: _Kind) -> list[Entry]:
    entries = []
    if kind.masked_lm:
        entries += linear_entries("masked_lm_head/dense", kind.masked_lm[0], bias=True)
        entries += norm_entries("masked_lm_head/layer_norm", kind.masked_lm[1])
    if kind.classes:
        entries += linear_entries("pooler", kind.classes[0], bias=True)
        entries += linear_entries("classifier", kind.classes[1], bias=True)
    return entries


def _family(kind: _Kind) -> Family:
    ignored = [rf"{kind.model_type}\.embeddings\.(position_ids|token_type_ids)"]
    # Heads that the file of a published checkpoint holds besides those of its class.
    if not kind.classes:
        ignored += [rf"{kind.model_type}\.pooler\..*", r"cls\.seq_relationship\..*"]
    return Family(
        name={"bert": "BERT", "roberta": "RoBERTa"}[kind.model_type],
        architectures=(kind.architecture,),
        model_types=("bert",) if kind is _PRETRAINING else (),
        from_config=functools.partial(_from_config, kind=kind),
        to_config=functools.partial(_to_config, kind=kind),
        entries=functools.partial(_entries, kind=kind),
        ignored=tuple(ignored),
        # The first releases called a norm's parameters so.
        renames=(
            (r"LayerNorm\.gamma$", "LayerNorm.weight"),
            (r"LayerNorm\.beta$", "LayerNorm.bias"),
        ),
    )


FAMILIES = tuple(_family(kind) for kind in _KINDS)
