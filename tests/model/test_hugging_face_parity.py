"""Logits and gradients of GPT-2, T5 1.0 and umT5 equal Hugging Face's, from random weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.layers.attention import AttentionConfig
from t5x_like.layers.mlp import MlpConfig
from t5x_like.layers.norms import NormConfig
from t5x_like.layers.positions import LearnedPositionsConfig, RelativePositionsConfig
from t5x_like.models.base import ModelDef
from t5x_like.models.block import BlockConfig
from t5x_like.models.decoder_only import DecoderOnlyConfig
from t5x_like.models.encoder_decoder import EncoderDecoderConfig

from .conftest import relative_l2

torch = pytest.importorskip("torch", reason="the oracle is PyTorch's")
transformers = pytest.importorskip("transformers", reason="the oracle is Hugging Face's")

LAYERS = 3
Get = Callable[[str], np.ndarray]


def randomise(model: Any) -> Any:
    """Random weights everywhere, biases and norms too; no dropout."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.0 if "norm" in name or "ln_" in name else 0.0
            parameter.copy_(scale + 0.15 * torch.randn_like(parameter))
    return model.eval()


def stack(get: Get, pattern: str, transpose: bool = False) -> np.ndarray:
    layers = [get(pattern.format(i)) for i in range(LAYERS)]
    return np.stack([x.T if transpose else x for x in layers])


def gpt2_tree(get: Get) -> dict[str, Any]:
    """GPT-2's tensors under our names; it keeps kernels as (in, out) and fuses q, k and v."""
    rows = functools.partial(stack, get)

    def linear(name: str, part: slice = slice(None)) -> dict[str, np.ndarray]:
        prefix = "transformer.h.{}." + name
        return {
            "kernel": rows(prefix + ".weight")[..., part],
            "bias": rows(prefix + ".bias")[..., part],
        }

    def norm(name: str) -> dict[str, np.ndarray]:
        prefix = "transformer.h.{}." + name
        return {"scale": rows(prefix + ".weight"), "bias": rows(prefix + ".bias")}

    attention = {
        name: linear("attn.c_attn", slice(32 * i, 32 * (i + 1)))
        for i, name in enumerate(("query", "key", "value"))
    }
    layers = {
        "pre_self_attention_layer_norm": norm("ln_1"),
        "self_attention": attention | {"out": linear("attn.c_proj")},
        "pre_mlp_layer_norm": norm("ln_2"),
        "mlp": {"wi": linear("mlp.c_fc"), "wo": linear("mlp.c_proj")},
    }
    final = {"scale": get("transformer.ln_f.weight"), "bias": get("transformer.ln_f.bias")}
    return {
        "token_embedder": {"embedding": get("transformer.wte.weight")},
        "position_embedder": {"embedding": get("transformer.wpe.weight")},
        "decoder": {"layers": layers, "decoder_norm": final},
    }


def t5_tree(get: Get, *, per_layer_bias: bool, mlp: dict[str, str]) -> dict[str, Any]:
    """T5's tensors under our names; PyTorch keeps kernels as (out, in)."""

    def side(name: str) -> dict[str, Any]:
        block = name + ".block.{}.layer."
        ours = "attention" if name == "encoder" else "self_attention"

        def attend(index: int, module: str) -> dict[str, Any]:
            return {
                long: {"kernel": stack(get, f"{block}{index}.{module}.{short}.weight", True)}
                for long, short in {"query": "q", "key": "k", "value": "v", "out": "o"}.items()
            }

        def norm(index: int) -> dict[str, Any]:
            return {"scale": stack(get, f"{block}{index}.layer_norm.weight")}

        last = 1 if name == "encoder" else 2
        layers = {
            f"pre_{ours}_layer_norm": norm(0),
            ours: attend(0, "SelfAttention"),
            "pre_mlp_layer_norm": norm(last),
            "mlp": {
                long: {"kernel": stack(get, f"{block}{last}.DenseReluDense.{short}.weight", True)}
                for long, short in mlp.items()
            },
        }
        if name == "decoder":
            layers["pre_cross_attention_layer_norm"] = norm(1)
            layers["encoder_decoder_attention"] = attend(1, "EncDecAttention")
        table = block + "0.SelfAttention.relative_attention_bias.weight"
        tree = {"layers": layers, f"{name}_norm": {"scale": get(f"{name}.final_layer_norm.weight")}}
        if per_layer_bias:
            layers["relpos_bias"] = {"rel_embedding": stack(get, table, True)}
        else:
            tree["relpos_bias"] = {"rel_embedding": get(table.format(0)).T}
        return tree

    return {
        "token_embedder": {"embedding": get("shared.weight")},
        "encoder": side("encoder"),
        "decoder": side("decoder"),
    }


def compare(
    model: Any,
    ours: ModelDef,
    tree: Callable[[Get], Any],
    batch: Any,
    inputs: Any,
    *,
    floor: float = 0.0,
) -> None:
    """Checks logits and the gradient of their weighted sum on the target tokens."""
    logits = model(**{k: torch.tensor(v) for k, v in inputs.items()}).logits
    real = batch["decoder_target_tokens"] > 0
    weights = np.random.default_rng(1).normal(size=logits.shape).astype(np.float32)
    weights *= real[..., None]
    (logits * torch.tensor(weights)).sum().backward()
    theirs = dict(model.named_parameters())
    params = tree(lambda name: theirs[name].detach().numpy())
    expected_grads = tree(lambda name: theirs[name].grad.numpy())

    def loss(params):
        logits = ours.bind(params)(batch)
        return jnp.sum(logits * weights), logits

    grads, actual = jax.jit(jax.grad(loss, has_aux=True))(params)
    expected = logits.detach().numpy()
    assert np.abs(np.asarray(actual) - expected)[real].max() <= 2e-5 * np.abs(expected).max()
    assert jax.tree.map(np.shape, grads) == jax.tree.map(lambda i: i.shape, ours.param_info)
    assert relative_l2(grads, expected_grads, floor=floor) < 1e-4


def test_gpt2():
    model = randomise(
        transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                n_embd=32, n_layer=LAYERS, n_head=4, vocab_size=61, n_positions=24
            )
        )
    )
    ours = ModelDef(
        DecoderOnlyConfig(
            vocab_size=61,
            num_layers=LAYERS,
            block=BlockConfig(
                embed_dim=32,
                attention=AttentionConfig(
                    num_heads=4,
                    head_dim=8,
                    logit_scale="rsqrt_head_dim",
                    qkv_bias=True,
                    out_bias=True,
                ),
                mlp=MlpConfig(mlp_dim=128, activations=("gelu",), use_bias=True),
                norm=NormConfig(kind="layer", epsilon=1e-5),
            ),
            positions=LearnedPositionsConfig(max_length=24),
            logits="tied",
            dtype="float32",
        )
    )
    tokens = np.random.default_rng(0).integers(1, 61, (3, 20)).astype(np.int32)
    targets = np.where(np.arange(20) < np.array([[20], [13], [5]]), tokens, 0)
    batch = {"decoder_input_tokens": tokens, "decoder_target_tokens": targets}
    inputs = {"input_ids": tokens, "attention_mask": (targets > 0).astype(np.int64)}
    compare(model, ours, gpt2_tree, batch, inputs, floor=1e-3)


@pytest.mark.parametrize("family", ["t5_1_0", "umt5"])
def test_t5(family):
    sizes = {
        "d_model": 32, "d_ff": 48, "num_layers": LAYERS, "num_heads": 4, "d_kv": 8,
        "vocab_size": 61, "dropout_rate": 0.0, "tie_word_embeddings": True,
    }  # fmt: skip
    umt5 = family == "umt5"
    if umt5:
        model = transformers.UMT5ForConditionalGeneration(
            transformers.UMT5Config(**sizes, feed_forward_proj="gated-gelu")
        )
        activations = ("gelu", "linear")
        mlp = {"wi_0": "wi_0", "wi_1": "wi_1", "wo": "wo"}
    else:
        model = transformers.T5ForConditionalGeneration(
            transformers.T5Config(**sizes, feed_forward_proj="relu")
        )
        activations, mlp = ("relu",), {"wi": "wi", "wo": "wo"}
    model = randomise(model)
    ours = ModelDef(
        EncoderDecoderConfig(
            vocab_size=61,
            num_encoder_layers=LAYERS,
            num_decoder_layers=LAYERS,
            block=BlockConfig(
                embed_dim=32,
                attention=AttentionConfig(num_heads=4, head_dim=8),
                mlp=MlpConfig(mlp_dim=48, activations=activations),
            ),
            positions=RelativePositionsConfig(per_layer=umt5),
            logits="tied_rescaled",
            dtype="float32",
        )
    )
    rng = np.random.default_rng(0)
    source = rng.integers(1, 61, (3, 40)).astype(np.int32)
    source = np.where(np.arange(40) < np.array([[40], [23], [5]]), source, 0)
    targets = rng.integers(1, 61, (3, 20)).astype(np.int32)
    shifted = np.roll(targets, 1, axis=1)
    shifted[:, 0] = 0
    batch = {
        "encoder_input_tokens": source,
        "decoder_input_tokens": shifted,
        "decoder_target_tokens": targets,
    }
    inputs = {
        "input_ids": source,
        "attention_mask": (source > 0).astype(np.int64),
        "decoder_input_ids": shifted,
    }
    tree = functools.partial(t5_tree, per_layer_bias=umt5, mlp=mlp)
    compare(model, ours, tree, batch, inputs)
