"""Multi-token prediction against its formulas, written out for one example at a time in float64."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.decoding.generate import Generator
from t5x_like.decoding.sampling import Sampling
from t5x_like.errors import UserError
from t5x_like.layers.attention import AttentionConfig
from t5x_like.layers.mlp import MlpConfig
from t5x_like.models.base import ModelDef
from t5x_like.models.block import BlockConfig
from t5x_like.models.decoder_only import DecoderOnlyConfig
from t5x_like.objectives.causal_lm import CausalLm
from t5x_like.objectives.multi_token import MultiTokenLm
from t5x_like.training.step import make_eval_step

VOCAB, HEADS, HEAD_DIM, DEPTH = 19, 2, 4, 2
CONFIG = DecoderOnlyConfig(
    vocab_size=VOCAB,
    num_layers=1,
    block=BlockConfig(
        embed_dim=8,
        attention=AttentionConfig(num_heads=HEADS, head_dim=HEAD_DIM),
        mlp=MlpConfig(mlp_dim=12, activations=("relu",)),
    ),
    future_depth=DEPTH,
    dtype="float32",
)
MODEL = ModelDef(CONFIG)
OBJECTIVE = MultiTokenLm(future_weight=0.7, z_loss=0.01)
# Examples of each row; the shortest has no token for the second module, or for any.
LENGTHS = [(4, 1, 2), (5,)]
ROW = 8


def random_params() -> Any:
    rng = np.random.default_rng(0)

    def draw(path: Any, info: Any) -> np.ndarray:
        centre = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        return (centre + 0.4 * rng.normal(size=info.shape)).astype(np.float32)

    is_leaf = lambda x: hasattr(x, "logical_axes")  # noqa: E731
    return jax.tree_util.tree_map_with_path(draw, MODEL.param_info, is_leaf=is_leaf)


def examples() -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """(tokens, loss weights) of every example of every row."""
    rng = np.random.default_rng(1)
    return [
        [(rng.integers(1, VOCAB, n), rng.choice([0.5, 1.0], n)) for n in row] for row in LENGTHS
    ]


def packed() -> dict[str, np.ndarray]:
    names = ("input_tokens", "target_tokens", "loss_weights", "segment_ids", "positions")
    batch = {f"decoder_{name}": np.zeros((len(LENGTHS), ROW), np.int32) for name in names}
    batch["decoder_loss_weights"] = np.zeros((len(LENGTHS), ROW), np.float32)
    for i, row in enumerate(examples()):
        at = 0
        for segment, (tokens, weights) in enumerate(row, 1):
            inputs = np.pad(tokens, (1, 0))[:-1]
            values = (inputs, tokens, weights, segment, np.arange(len(tokens)))
            for name, value in zip(names, values, strict=True):
                batch[f"decoder_{name}"][i, at : at + len(tokens)] = value
            at += len(tokens)
    return batch


# ---- The formulas.


def rms(x: Any, scale: Any) -> Any:
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale["scale"]


def block(x: Any, p: Any) -> Any:
    y, attention = rms(x, p["pre_self_attention_layer_norm"]), p["self_attention"]
    heads = []
    for h in range(HEADS):
        dims = slice(h * HEAD_DIM, (h + 1) * HEAD_DIM)
        q, k, v = (y @ attention[name]["kernel"][:, dims] for name in ("query", "key", "value"))
        powers = jnp.tril(jnp.exp(q @ k.T))
        heads.append(powers @ v / powers.sum(-1, keepdims=True))
    x = x + jnp.concatenate(heads, axis=-1) @ attention["out"]["kernel"]
    y = rms(x, p["pre_mlp_layer_norm"])
    return x + jnp.maximum(y @ p["mlp"]["wi"]["kernel"], 0) @ p["mlp"]["wo"]["kernel"]


def layer(tree: Any, index: int) -> Any:
    return jax.tree.map(lambda x: x[index], tree)


def reference(params: Any, *, weight: float, z_loss: float) -> Any:
    """The summed loss of all examples, and (sums of losses, of weights) of each prediction."""
    decoder, table = params["decoder"], params["token_embedder"]["embedding"]
    losses = [0.0] * (1 + DEPTH)
    weights_of = [0.0] * (1 + DEPTH)
    for tokens, weights in (example for row in examples() for example in row):
        inputs = table[np.pad(tokens, (1, 0))[:-1]]
        x = rms(block(inputs, layer(decoder["layers"], 0)), decoder["decoder_norm"])
        for k in range(min(len(tokens), 1 + DEPTH)):
            if k:
                p = layer(params["future"]["layers"], k - 1)
                x = x[: len(tokens) - k]
                both = [rms(inputs[k:], p["embedding_norm"]), rms(x, p["hidden_norm"])]
                x = jnp.concatenate(both, axis=-1) @ p["projection"]["kernel"]
                x = rms(block(x, p["block"]), p["norm"])
            logits = x @ decoder["logits_dense"]["kernel"]
            log_z = jnp.log(jnp.exp(logits).sum(-1))
            of_tokens = log_z - logits[np.arange(len(x)), tokens[k:]] + z_loss * log_z**2
            losses[k] += (weights[k:] * of_tokens).sum()
            weights_of[k] += weights[k:].sum()
    total = losses[0] + weight * sum(losses[1:]) / DEPTH
    return total, (losses, weights_of)


def test_loss_and_gradients_are_those_of_the_formulas():
    params, batch = random_params(), packed()
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        of_formulas = functools.partial(reference, weight=0.7, z_loss=0.01)
        (expected, (losses, weights)), grads = jax.jit(
            jax.value_and_grad(of_formulas, has_aux=True)
        )(wide)
        grads = jax.device_get(grads)
        losses, weights = ([float(x) for x in values] for values in (losses, weights))

    def loss(params: Any) -> Any:
        return OBJECTIVE.loss(MODEL.bind(params), batch, dropout_key=jax.random.key(0))

    (total, metrics), ours = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    for k, name in enumerate(["loss", "future_1/loss", "future_2/loss"]):
        np.testing.assert_allclose(metrics[name], (losses[k], weights[k]), rtol=1e-6)

    def check(path: Any, ours: Any, theirs: Any) -> None:
        norm = np.linalg.norm(theirs)
        assert norm > 1e-3, path
        assert np.linalg.norm(ours - theirs) <= 1e-5 * norm, path

    jax.tree_util.tree_map_with_path(check, ours, grads)


def test_evaluation_and_generation_do_not_run_it():
    params, batch = random_params(), packed()
    params["future"] = jax.tree.map(lambda x: np.full_like(x, np.nan), params["future"])
    metrics = jax.jit(make_eval_step(MODEL, OBJECTIVE))(params, batch)
    plain = CausalLm(z_loss=0.01)
    expected = jax.jit(make_eval_step(MODEL, plain))(params, batch)
    assert metrics.keys() == expected.keys()
    assert np.isfinite(metrics["loss"][0])
    np.testing.assert_array_equal(metrics["loss"], expected["loss"])
    prompts = {"decoder_prompt_tokens": np.array([[3, 4]]), "decoder_prompt_lengths": np.array([2])}
    generator = Generator(MODEL, Sampling(max_new_tokens=2), eos_ids=(0,))
    assert np.isfinite(generator(params, prompts).token_log_probs).all()


def test_a_model_without_modules_is_refused():
    params = random_params()
    del params["future"]
    module = ModelDef(dataclasses.replace(CONFIG, future_depth=0)).bind(params)
    with pytest.raises(
        UserError, match="needs a DecoderOnlyConfig with future_depth of at least 1"
    ):
        OBJECTIVE.loss(module, packed(), dropout_key=jax.random.key(0))
    with pytest.raises(UserError, match="future_depth is -1; give an integer of at least 1"):
        dataclasses.replace(CONFIG, future_depth=-1)
    with pytest.raises(UserError, match=r"MultiTokenLm\.future_weight is -1; give a number"):
        MultiTokenLm(future_weight=-1)
