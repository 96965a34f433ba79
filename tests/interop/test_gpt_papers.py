"""GPT-3, LaMDA, Gopher and PaLM, of which Hugging Face has no class, equal their papers' formulas.

Each gin file, made narrow, is compared with a forward pass in float64 numpy of one sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import pytest

from t5x_like.interop.hugging_face.adapter import layer_slots
from t5x_like.models.base import ModelDef
from t5x_like.models.stack import as_pattern
from t5x_like.training.flops import named_leaves

from ..model.conftest import resolve
from ..model.shrink import VOCAB_SIZE, WINDOW, shrunk

__all__ = ["resolve"]  # the fixture

Tree = Mapping[str, Any]  # Float64 parameters by the part of their name below the layer.


# ---- What the papers' models are made of.


def softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def layer_norm(x: np.ndarray, p: Tree, name: str, epsilon: float) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    y = centred / np.sqrt(centred.var(-1, keepdims=True) + epsilon) * p[f"{name}/scale"]
    return y + p.get(f"{name}/bias", 0.0)


def rms_norm(x: np.ndarray, p: Tree, name: str) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p[f"{name}/scale"]


def gelu(x: np.ndarray) -> np.ndarray:
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def linear(x: np.ndarray, p: Tree, name: str) -> np.ndarray:
    return x @ p[f"{name}/kernel"] + p.get(f"{name}/bias", 0.0)


def heads(x: np.ndarray, p: Tree, name: str, head_dim: int) -> np.ndarray:
    """[T, embed] -> [heads, T, head_dim]"""
    return linear(x, p, f"self_attention/{name}").reshape(len(x), -1, head_dim).swapaxes(0, 1)


def attend(logits: np.ndarray, v: np.ndarray, p: Tree, *, band: int | None = None) -> np.ndarray:
    """Causal attention, within `band` positions if it is given; logits [heads, T, T]."""
    length = logits.shape[-1]
    distance = np.arange(length)[:, None] - np.arange(length)
    allowed = (distance >= 0) & (distance < (band or length))
    mixed = softmax(np.where(allowed, logits, -np.inf)) @ v
    return linear(mixed.swapaxes(0, 1).reshape(length, -1), p, "self_attention/out")


# ---- The papers' models: tokens [T] -> logits [T, vocab].


def gpt3(tokens: np.ndarray, p: Tree, layers: list[Tree], head_dim: int) -> np.ndarray:
    """Brown et al. 2020, section 2.1: dense and banded layers in turn."""
    x = p["token_embedder/embedding"][tokens]
    x = x + p["position_embedder/embedding"][: len(tokens)]
    for number, layer in enumerate(layers):
        y = layer_norm(x, layer, "pre_self_attention_layer_norm", 1e-5)
        q, k, v = (heads(y, layer, name, head_dim) for name in ("query", "key", "value"))
        logits = q @ k.swapaxes(1, 2) / np.sqrt(head_dim)
        x = x + attend(logits, v, layer, band=WINDOW if number % 2 else None)
        y = layer_norm(x, layer, "pre_mlp_layer_norm", 1e-5)
        x = x + linear(gelu(linear(y, layer, "mlp/wi")), layer, "mlp/wo")
    return layer_norm(x, p, "decoder/decoder_norm", 1e-5) @ p["token_embedder/embedding"].T


def lamda(tokens: np.ndarray, p: Tree, layers: list[Tree], head_dim: int) -> np.ndarray:
    """Thoppilan et al. 2022, section 3: T5's relative attention and gated GELU."""
    past = np.maximum(np.arange(len(tokens))[:, None] - np.arange(len(tokens)), 0)
    far = 16 + np.floor(np.log(np.maximum(past, 1) / 16) / np.log(128 / 16) * 16)
    bucket = np.where(past < 16, past, np.minimum(far, 31)).astype(int)
    bias = p["decoder/relpos_bias/rel_embedding"][:, bucket]
    x = p["token_embedder/embedding"][tokens]
    for layer in layers:
        y = rms_norm(x, layer, "pre_self_attention_layer_norm")
        q, k, v = (heads(y, layer, name, head_dim) for name in ("query", "key", "value"))
        x = x + attend(q @ k.swapaxes(1, 2) + bias, v, layer)
        y = rms_norm(x, layer, "pre_mlp_layer_norm")
        gated = gelu(linear(y, layer, "mlp/wi_0")) * linear(y, layer, "mlp/wi_1")
        x = x + linear(gated, layer, "mlp/wo")
    return linear(rms_norm(x, p, "decoder/decoder_norm"), p, "decoder/logits_dense")


def gopher(tokens: np.ndarray, p: Tree, layers: list[Tree], head_dim: int) -> np.ndarray:
    """Rae et al. 2021, section 3.1; the four terms of Dai et al. 2019, section 3.3."""
    length = len(tokens)
    distance = np.arange(length)[:, None] - np.arange(length)
    width = p["token_embedder/embedding"].shape[1]
    angle = distance[..., None] / 10000.0 ** (np.arange(0, width, 2) / width)
    sinusoids = np.concatenate([np.sin(angle), np.cos(angle)], axis=-1)
    x = p["token_embedder/embedding"][tokens]
    for layer in layers:
        y = rms_norm(x, layer, "pre_self_attention_layer_norm")
        q, k, v = (heads(y, layer, name, head_dim) for name in ("query", "key", "value"))
        relative = sinusoids @ layer["self_attention/xl_positions/relative/kernel"]
        relative = relative.reshape(length, length, -1, head_dim)
        content = layer["self_attention/xl_positions/content_bias"].reshape(-1, 1, head_dim)
        position = layer["self_attention/xl_positions/position_bias"].reshape(-1, 1, head_dim)
        logits = (q + content) @ k.swapaxes(1, 2)
        logits = logits + np.einsum("hid,ijhd->hij", q + position, relative)
        x = x + attend(logits / np.sqrt(head_dim), v, layer)
        y = rms_norm(x, layer, "pre_mlp_layer_norm")
        x = x + linear(gelu(linear(y, layer, "mlp/wi")), layer, "mlp/wo")
    return rms_norm(x, p, "decoder/decoder_norm") @ p["token_embedder/embedding"].T


def palm(tokens: np.ndarray, p: Tree, layers: list[Tree], head_dim: int) -> np.ndarray:
    """Chowdhery et al. 2022, section 2: y = x + MLP(LayerNorm(x)) + Attention(LayerNorm(x))."""
    half = head_dim // 2
    turn = np.exp(1j * np.arange(len(tokens))[:, None] / 10000.0 ** (np.arange(half) / half))

    def rotate(x: np.ndarray) -> np.ndarray:
        turned = (x[..., :half] + 1j * x[..., half:]) * turn
        return np.concatenate([turned.real, turned.imag], axis=-1)

    x = p["token_embedder/embedding"][tokens]
    for layer in layers:
        y = layer_norm(x, layer, "pre_self_attention_layer_norm", 1e-6)
        q, k, v = (heads(y, layer, name, head_dim) for name in ("query", "key", "value"))
        assert k.shape[0] == v.shape[0] == 1  # Every query head has the same keys and values.
        logits = rotate(q) @ rotate(k).swapaxes(1, 2) / np.sqrt(head_dim)
        gate = linear(y, layer, "mlp/wi_0")
        gated = gate / (1 + np.exp(-gate)) * linear(y, layer, "mlp/wi_1")
        x = x + linear(gated, layer, "mlp/wo") + attend(logits, v, layer)
    table = p["token_embedder/embedding"]
    return layer_norm(x, p, "decoder/decoder_norm", 1e-6) @ table.T / np.sqrt(table.shape[1])


# ---- Comparison.


def random_parameters(model: ModelDef) -> dict[str, np.ndarray]:
    """Every one random, those of norms around 1; flat, by name."""
    rng = np.random.default_rng(0)
    return {
        name: (rng.normal(size=info.shape) * 0.3 + name.endswith("scale")).astype(np.float32)
        for name, info in named_leaves(model.param_info)
    }


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, leaf = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def by_layer(flat: Mapping[str, np.ndarray], config: Any) -> Iterator[Tree]:
    for place, index in layer_slots(config.block, config.num_layers):
        prefix = f"decoder/{place}/"
        yield {n.removeprefix(prefix): x[index] for n, x in flat.items() if n.startswith(prefix)}


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("gpt3/small", gpt3),
        ("lamda/2b", lamda),
        ("gopher/44m", gopher),
        ("chinchilla/70b", gopher),
        ("palm/8b", palm),
    ],
)
def test_paper(resolve, name: str, reference: Callable[..., np.ndarray]) -> None:
    config = shrunk(resolve(name))
    model = ModelDef(config)
    flat = random_parameters(model)

    # Row 0 holds two packed sequences, row 1 one and padding.
    rng, length, cuts = np.random.default_rng(1), 32, (20, 27)
    tokens = rng.integers(1, VOCAB_SIZE, (2, length)).astype(np.int32)
    index = np.arange(length)
    segments = np.stack([1 + (index >= cuts[0]), index < cuts[1]]).astype(np.int32)
    restarted = np.where(index < cuts[0], index, index - cuts[0])
    batch = {
        "decoder_input_tokens": tokens,
        "decoder_target_tokens": np.where(segments > 0, tokens, 0),
        "decoder_segment_ids": segments,
        "decoder_positions": np.stack([restarted, index]).astype(np.int32),
    }
    actual = np.asarray(jax.jit(lambda p, b: model.bind(p)(b))(nested(flat), batch))

    exact = {n: x.astype(np.float64) for n, x in flat.items()}
    layers = list(by_layer(exact, config))
    head_dim = as_pattern(config.block)[0].attention.head_dim
    for row, part in (0, slice(0, cuts[0])), (0, slice(cuts[0], length)), (1, slice(0, cuts[1])):
        expected = reference(tokens[row, part], exact, layers, head_dim)
        assert np.abs(actual[row, part] - expected).max() <= 2e-5 * np.abs(expected).max()
