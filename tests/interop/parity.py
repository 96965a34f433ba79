"""Parity of a family with transformers: the same weights give the same logits and gradients.

`check_parity(model, tmp_path)` saves a transformers model with random weights, converts it, runs
it here, converts it back and loads it there again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import torch
from flax import traverse_util

from t5x_like.interop.convert import from_hugging_face, to_hugging_face
from t5x_like.interop.hugging_face.adapter import transfers
from t5x_like.interop.hugging_face.checkpoint import HuggingFaceCheckpoint, load_params
from t5x_like.interop.initial import load_initial_params
from t5x_like.models.base import ModelDef
from t5x_like.models.decoder_only import DecoderOnlyConfig
from t5x_like.models.encoder_decoder import EncoderDecoderConfig

# Of the largest absolute logit: the noise of float32 through a few layers.
LOGITS_TOLERANCE = 2e-5
# Relative L2 distance of the gradient of one tensor.
GRADIENT_TOLERANCE = 1e-4


class Example(NamedTuple):
    """One example: token ids of the encoder (empty if there is none) and of the decoder."""

    source: np.ndarray
    target: np.ndarray


def randomise(model: Any, *, scale: float = 0.15) -> Any:
    """Random weights everywhere, biases and norms (about 1) too; no dropout, float32."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = any(part in name.lower() for part in ("norm", ".ln_"))
            centre = 1.0 if is_norm and name.endswith("weight") else 0.0
            parameter.copy_(centre + scale * torch.randn_like(parameter))
    return model.float().eval()


def check_parity(
    model: Any,
    tmp_path: Path,
    *,
    lengths: tuple[int, ...] = (20, 13, 5),
    gradients: bool = False,
    gradient_floor: float = 0.0,
    packed: bool = True,
    unused: tuple[str, ...] = (),
) -> Any:
    """Checks a causal LM or an encoder-decoder of transformers with random weights.

    * logits within `LOGITS_TOLERANCE` of the logit scale, on padded rows and (`packed`) on a row
      of packed examples against theirs one at a time;
    * theirs -> ours -> theirs is bit-identical, and transformers gets the same logits from it;
    * `gradients`: of a weighted sum of the logits, for every tensor of the table of names, within
      `GRADIENT_TOLERANCE`, relative to its norm or to `gradient_floor` times the largest norm
      (for tensors whose gradient vanishes, such as a bias of attention keys).

    Args:
      model: its weights are drawn anew, see `randomise`.
      lengths: of the examples; longer than any window of the model.
      unused: names of their tensors that may differ after the way back, or be gone.

    Returns:
      Our model config.
    """
    randomise(model)
    hf, own, back = (tmp_path / name for name in ("hf", "own", "back"))
    model.save_pretrained(hf)
    config = dataclasses.replace(from_hugging_face(hf, own).config, dtype="float32")
    ours = ModelDef(config)
    params = load_initial_params(own, ours.param_info)
    jax.tree.map(np.testing.assert_array_equal, params, load_params(hf, ours.param_info))
    examples = make_examples(config, lengths)
    batch = padded(examples)
    expected = [their_logits(model, example) for example in examples]
    apply = jax.jit(lambda params, batch: ours.bind(params)(batch))
    compare_logits(apply(params, batch), expected, rows=range(len(examples)))
    if packed:
        logits = np.asarray(apply(params, pack(examples)))[0]
        ends = np.cumsum([len(e.target) for e in examples])
        compare_logits(np.split(logits, ends)[:-1], expected, rows=range(len(examples)))
    if gradients:
        compare_gradients(model, ours, params, examples, hf, floor=gradient_floor)
    to_hugging_face(own, back)
    check_same_tensors(hf, back, unused=unused)
    kind = model.config._attn_implementation  # The default may be another than the model's.
    again = type(model).from_pretrained(back, attn_implementation=kind).float().eval()
    for example, logits in zip(examples, expected, strict=True):
        # The weights are equal to the bit; torch's sums depend on where these lie in memory.
        np.testing.assert_allclose(
            their_logits(again, example), logits, rtol=0, atol=1e-6 * np.abs(logits).max()
        )
    return config


# ---- Examples and batches.


def make_examples(config: Any, lengths: tuple[int, ...]) -> list[Example]:
    """Random token ids, none of them 0; sources are of the lengths the other way round, doubled."""
    rng = np.random.default_rng(0)
    decoder_only = isinstance(config, DecoderOnlyConfig)
    assert decoder_only or isinstance(config, EncoderDecoderConfig)
    return [
        Example(
            source=draw(rng, config.vocab_size, 0 if decoder_only else 2 * source),
            target=draw(rng, config.vocab_size, target),
        )
        for source, target in zip(lengths[1:] + lengths[:1], lengths, strict=True)
    ]


def draw(rng: np.random.Generator, vocab_size: int, length: int) -> np.ndarray:
    return rng.integers(1, vocab_size, length).astype(np.int32)


def shifted(tokens: np.ndarray) -> np.ndarray:
    """What an encoder-decoder's decoder reads: 0, then the tokens."""
    return np.concatenate([[0], tokens[:-1]]).astype(np.int32)


def padded(examples: list[Example]) -> dict[str, np.ndarray]:
    """One example a row, padded with 0 at the end."""

    def rows(arrays: list[np.ndarray]) -> np.ndarray:
        length = max(map(len, arrays))
        return np.stack([np.pad(a, (0, length - len(a))) for a in arrays])

    targets = rows([e.target for e in examples])
    if not examples[0].source.size:
        return {"decoder_input_tokens": targets, "decoder_target_tokens": targets}
    return {
        "encoder_input_tokens": rows([e.source for e in examples]),
        "decoder_input_tokens": rows([shifted(e.target) for e in examples]),
        "decoder_target_tokens": targets,
    }


def pack(examples: list[Example]) -> dict[str, np.ndarray]:
    """All examples in one row, and three tokens of padding."""

    def row(arrays: list[np.ndarray]) -> np.ndarray:
        return np.pad(np.concatenate(arrays), (0, 3))[None].astype(np.int32)

    def side(name: str, arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
        segments = [np.full(len(a), i + 1) for i, a in enumerate(arrays)]
        positions = [np.arange(len(a)) for a in arrays]
        return {f"{name}_segment_ids": row(segments), f"{name}_positions": row(positions)}

    targets = [e.target for e in examples]
    sources = [e.source for e in examples]
    has_encoder = bool(sources[0].size)
    inputs = [shifted(t) for t in targets] if has_encoder else targets
    batch = {
        "decoder_input_tokens": row(inputs),
        "decoder_target_tokens": row(targets),
        **side("decoder", targets),
    }
    if has_encoder:
        batch |= {"encoder_input_tokens": row(sources), **side("encoder", sources)}
    return batch


# ---- Comparisons.


def their_inputs(example: Example) -> dict[str, Any]:
    """Arguments of their model for one example, without padding."""
    target = torch.tensor(example.target[None], dtype=torch.int64)
    if not example.source.size:
        return {"input_ids": target, "use_cache": False}
    return {
        "input_ids": torch.tensor(example.source[None], dtype=torch.int64),
        "decoder_input_ids": torch.tensor(shifted(example.target)[None], dtype=torch.int64),
        "use_cache": False,
    }


def their_logits(model: Any, example: Example) -> np.ndarray:
    """[length, vocab]"""
    with torch.no_grad():
        return model(**their_inputs(example)).logits[0].numpy()


def compare_logits(actual: Any, expected: list[np.ndarray], *, rows: Any) -> None:
    scale = max(np.abs(e).max() for e in expected)
    for row, theirs in zip(rows, expected, strict=True):
        error = np.abs(np.asarray(actual[row])[: len(theirs)] - theirs).max()
        assert error <= LOGITS_TOLERANCE * scale, f"row {row}: {error} of {scale}"


def compare_gradients(
    model: Any,
    ours: ModelDef,
    params: Any,
    examples: list[Example],
    hf: Path,
    *,
    floor: float = 0.0,
) -> None:
    """Gradients of a randomly weighted sum of all logits, through the table of names."""
    rng = np.random.default_rng(1)
    batch = padded(examples)
    shape = (*batch["decoder_target_tokens"].shape, ours.config.vocab_size)
    weights = rng.normal(size=shape).astype(np.float32)
    weights *= (batch["decoder_target_tokens"] > 0)[..., None]
    model.zero_grad()
    for example, weight in zip(examples, weights, strict=True):
        logits = model(**their_inputs(example)).logits[0]
        (logits * torch.tensor(weight[: len(logits)])).sum().backward()
    grads = jax.jit(jax.grad(lambda p: jnp.sum(ours.bind(p)(batch) * weights)))(params)
    grads = {n: np.asarray(g) for n, g in traverse_util.flatten_dict(grads, sep="/").items()}
    theirs = dict(their_gradients(model))
    state = {
        n for n, i in traverse_util.flatten_dict(ours.param_info, sep="/").items() if not i.trained
    }
    checkpoint = HuggingFaceCheckpoint(hf)
    pairs = {}
    for t in transfers(checkpoint.family.entries(ours.config), ours.config):
        if {slot.name for slot in t.ours} <= state:
            continue
        values = [grads[s.name] if s.row is None else grads[s.name][s.row] for s in t.ours]
        for name, value in zip(t.theirs, t.to_theirs(*values), strict=True):
            known = next((n for n in (name, *t.aliases) if n in theirs), name)
            pairs[name] = (value, theirs[known])
    largest = max(np.linalg.norm(expected) for _, expected in pairs.values())
    for name, (value, expected) in pairs.items():
        scale = max(np.linalg.norm(expected), floor * largest)
        assert np.linalg.norm(value - expected) <= GRADIENT_TOLERANCE * scale, name


def their_gradients(model: Any) -> Iterator[tuple[str, np.ndarray]]:
    """By the names in files, where the experts of a layer are not stacked."""
    for name, parameter in model.named_parameters():
        # Nothing went through an expert that no token has chosen.
        untouched = np.zeros(parameter.shape, np.float32)
        grad = untouched if parameter.grad is None else parameter.grad.numpy()
        prefix, _, last = name.rpartition(".")
        if prefix.endswith(".experts") and last in ("gate_up_proj", "down_proj"):
            parts = last.replace("gate_up_proj", "gate_proj up_proj").split()
            for expert, of_expert in enumerate(grad):
                for part, value in zip(parts, np.split(of_expert, len(parts)), strict=True):
                    yield f"{prefix}.{expert}.{part}.weight", value
        else:
            yield name, grad


def read_tensors(directory: Path) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= safetensors.numpy.load_file(file)
    return tensors


def check_same_tensors(a: Path, b: Path, *, unused: tuple[str, ...] = ()) -> None:
    """The same names, dtypes and bits."""
    one, other = read_tensors(a), read_tensors(b)
    assert one.keys() - set(unused) == other.keys() - set(unused)
    for name in one.keys() & other.keys() - set(unused):
        assert one[name].dtype == other[name].dtype, name
        assert one[name].tobytes() == other[name].tobytes(), name
