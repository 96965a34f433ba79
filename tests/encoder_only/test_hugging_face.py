"""BERT and RoBERTa against transformers: logits, gradients, both ways of conversion, counts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the oracle is PyTorch's")
transformers = pytest.importorskip("transformers", reason="the oracle is Hugging Face's")

from flax import traverse_util  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402

from t5x_like.errors import UserError  # noqa: E402
from t5x_like.interop.convert import from_hugging_face, to_hugging_face  # noqa: E402
from t5x_like.interop.hugging_face import registry  # noqa: E402
from t5x_like.interop.hugging_face.adapter import transfers  # noqa: E402
from t5x_like.interop.hugging_face.checkpoint import load_params  # noqa: E402
from t5x_like.interop.initial import load_initial_params  # noqa: E402
from t5x_like.models.base import ModelDef  # noqa: E402
from tests.interop import parity  # noqa: E402
from tests.model.conftest import resolve  # noqa: E402

__all__ = ["resolve"]  # the fixture

SHAPE: dict[str, Any] = {
    "vocab_size": 67, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 48,
}  # fmt: skip
ROBERTA = {**SHAPE, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
# Name -> (class, its config.json).
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "pretraining": ("BertForPreTraining", SHAPE),
    "pretraining_of_four_labels": ("BertForPreTraining", {**SHAPE, "num_labels": 4}),
    "masked_lm": ("BertForMaskedLM", {**SHAPE, "hidden_act": "gelu_new", "type_vocab_size": 3}),
    "classification": ("BertForSequenceClassification", {**SHAPE, "num_labels": 5}),
    "two_classes": ("BertForSequenceClassification", {**SHAPE, "hidden_act": "relu"}),
    "roberta": ("RobertaForMaskedLM", ROBERTA),
    "roberta_classification": ("RobertaForSequenceClassification", {**ROBERTA, "num_labels": 3}),
}  # fmt: skip
LENGTHS = (20, 13, 5)


def make(name: str) -> Any:
    class_name, values = MODELS[name]
    model_class = getattr(transformers, class_name)
    config = model_class.config_class(**values)
    torch.manual_seed(0)
    return parity.randomise(model_class._from_config(config, attn_implementation="eager"))


@dataclasses.dataclass(frozen=True)
class Example:
    tokens: np.ndarray
    types: np.ndarray


def examples_of(model: Any) -> list[Example]:
    """Random tokens; RoBERTa's begin with its <s>, which is 0, and lack its padding, 1."""
    rng = np.random.default_rng(0)
    config = model.config
    found = []
    for length in LENGTHS:
        tokens = rng.integers(2, config.vocab_size, length)
        if config.model_type == "roberta":
            tokens[0] = 0
        found.append(Example(tokens, np.sort(rng.integers(0, config.type_vocab_size, length))))
    return found


def padded(examples: list[Example]) -> dict[str, np.ndarray]:
    """One example a row; the padding has token types too."""
    length = max(LENGTHS)
    sizes = np.array([len(e.tokens) for e in examples])[:, None]
    batch = {
        "encoder_input_tokens": [np.pad(e.tokens, (0, length - len(e.tokens))) for e in examples],
        "encoder_token_types": [
            np.pad(e.types, (0, length - len(e.types)), mode="edge") for e in examples
        ],
        "encoder_segment_ids": np.arange(length) < sizes,
    }
    return {name: np.asarray(array).astype(np.int32) for name, array in batch.items()}


def packed(examples: list[Example]) -> dict[str, np.ndarray]:
    """All examples in one row, and three tokens of padding."""
    sizes = [len(e.tokens) for e in examples]
    batch = {
        "encoder_input_tokens": [e.tokens for e in examples],
        "encoder_token_types": [e.types for e in examples],
        "encoder_segment_ids": [np.full(size, i + 1) for i, size in enumerate(sizes)],
        "encoder_positions": [np.arange(size) for size in sizes],
    }
    rows = {name: np.pad(np.concatenate(a), (0, 3))[None] for name, a in batch.items()}
    rows["encoder_sequence_starts"] = np.cumsum([0, *sizes[:-1]])[None]
    return {name: array.astype(np.int32) for name, array in rows.items()}


def their_heads(model: Any, example: Example) -> tuple[Any, Any]:
    """(logits for tokens [length, vocab], logits for the sequence [classes]) or None, of one."""
    tensors = [
        torch.tensor(array[None], dtype=torch.int64) for array in (example.tokens, example.types)
    ]
    out = model(input_ids=tensors[0], token_type_ids=tensors[1])
    if type(model).__name__ == "BertForPreTraining":
        return out.prediction_logits[0], out.seq_relationship_logits[0]
    if type(model).__name__.endswith("MaskedLM"):
        return out.logits[0], None
    return None, out.logits[0]


def numpy_heads(model: Any, example: Example) -> list[np.ndarray | None]:
    with torch.no_grad():
        return [None if x is None else x.numpy() for x in their_heads(model, example)]


def compare_heads(heads: Any, expected: list[Any], *, is_packed: bool) -> None:
    tokens, classes = zip(*expected, strict=True)
    for ours, theirs in ((heads.tokens, tokens), (heads.classes, classes)):
        assert (ours is None) == (theirs[0] is None)
        if ours is None:
            continue
        ours = np.asarray(ours)
        if ours is not None and is_packed:
            ends = np.cumsum(LENGTHS)
            ours = np.split(ours[0], ends)[:-1] if theirs is tokens else ours[0]
        if theirs is classes:
            ours = [np.reshape(row, -1)[None] for row in ours]
            theirs = [row[None] for row in theirs]
        parity.compare_logits(ours, list(theirs), rows=range(len(LENGTHS)))


@pytest.mark.parametrize("name", MODELS)
def test_parity(name: str, tmp_path: Path) -> None:
    """Padded and packed logits; theirs -> ours -> theirs has the same bits and the same logits."""
    model = make(name)
    hf, own, back = (tmp_path / part for part in ("hf", "own", "back"))
    model.save_pretrained(hf)
    config = dataclasses.replace(from_hugging_face(hf, own).config, dtype="float32")
    ours = ModelDef(config)
    params = load_initial_params(own, ours.param_info)
    examples = examples_of(model)
    expected = [numpy_heads(model, example) for example in examples]
    apply = jax.jit(lambda params, batch: ours.bind(params).heads(batch))
    compare_heads(apply(params, padded(examples)), expected, is_packed=False)
    compare_heads(apply(params, packed(examples)), expected, is_packed=True)

    to_hugging_face(own, back)
    parity.check_same_tensors(hf, back)
    again = type(model).from_pretrained(back, attn_implementation="eager").float().eval()
    for example, logits in zip(examples, expected, strict=True):
        for one, other in zip(numpy_heads(again, example), logits, strict=True):
            if other is None:
                continue
            # The same bits; but how PyTorch adds up depends on where its memory lies.
            np.testing.assert_allclose(one, other, atol=1e-6 * np.abs(other).max())


@pytest.mark.parametrize("name", ["pretraining", "roberta_classification"])
def test_gradients(name: str, tmp_path: Path) -> None:
    """Of a weighted sum of all logits of both heads, for every tensor of the table of names.

    The bound of a tensor is relative to its gradient's norm, or to 1e-3 of the largest: the
    gradient of the keys' bias is 0.
    """
    model = make(name)
    model.save_pretrained(tmp_path)
    family, config = registry.our_config(
        model.config.to_dict() | {"architectures": [type(model).__name__]}
    )
    ours = ModelDef(dataclasses.replace(config, dtype="float32"))
    params = load_params(tmp_path, ours.param_info)
    examples = examples_of(model)
    batch = padded(examples)
    rng = np.random.default_rng(1)
    real = batch["encoder_segment_ids"][..., None]
    weights = [
        rng.normal(size=(*real.shape[:2], config.vocab_size)).astype(np.float32) * real,
        rng.normal(size=(len(LENGTHS), 1, config.num_classes or 1)).astype(np.float32),
    ]

    def loss(params: Any) -> Any:
        heads = ours.bind(params).heads(batch)
        return sum(jnp.sum(h * w) for h, w in zip(heads, weights, strict=True) if h is not None)

    model.zero_grad()
    for i, example in enumerate(examples):
        for head, weight in zip(their_heads(model, example), weights, strict=True):
            if head is not None:
                part = torch.tensor(weight[i][: len(example.tokens)]).reshape(-1, head.shape[-1])
                (head * part).sum().backward(retain_graph=True)
    theirs = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    grads = traverse_util.flatten_dict(jax.jit(jax.grad(loss))(params), sep="/")
    pairs = {}
    for t in transfers(family.entries(config), config):
        mine = [np.asarray(grads[s.name]) for s in t.ours]
        mine = [g if s.row is None else g[s.row] for g, s in zip(mine, t.ours, strict=True)]
        for theirs_name, value in zip(t.theirs, t.to_theirs(*mine), strict=True):
            pairs[theirs_name] = (value, theirs[theirs_name])
    assert pairs.keys() == theirs.keys()
    largest = max(np.linalg.norm(expected) for _, expected in pairs.values())
    for tensor, (value, expected) in pairs.items():
        bound = parity.GRADIENT_TOLERANCE * max(np.linalg.norm(expected), 1e-3 * largest)
        assert np.linalg.norm(value - expected) <= bound, tensor


# Published checkpoints: names of their first releases, tensors of other heads.


def test_checkpoint_of_the_first_releases(tmp_path: Path) -> None:
    """bert-base-uncased says BertForMaskedLM, has all of pre-training, and names of TensorFlow."""
    model = make("pretraining")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): x
        for n, x in tensors.items()
    }
    old["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].copy()
    old["bert.embeddings.position_ids"] = np.arange(48)[None]
    save_file(old, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        (tmp_path / "config.json").read_text().replace("BertForPreTraining", "BertForMaskedLM")
    )
    weights = from_hugging_face(tmp_path, tmp_path / "own")
    assert weights.config.num_classes is None
    example = examples_of(model)[0]
    ours = ModelDef(dataclasses.replace(weights.config, dtype="float32"))
    params = load_initial_params(tmp_path / "own", ours.param_info)
    logits = ours.bind(params)(padded([example]))
    parity.compare_logits(logits, [numpy_heads(model, example)[0]], rows=[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_decoder": True}, "is_decoder True is not supported"),
        ({"position_embedding_type": "relative_key"}, "'relative_key' is not supported"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings False is not supported"),
        ({"hidden_act": "mish"}, "activation 'mish' is not supported"),
        ({"num_attention_heads": 5}, "hidden_size 32 is no multiple of num_attention_heads 5"),
    ],
)
def test_what_we_do_not_have_is_refused(change: dict[str, Any], message: str) -> None:
    given = {**SHAPE, "type_vocab_size": 2, "architectures": ["BertForMaskedLM"], **change}
    with pytest.raises(UserError, match=message):
        registry.our_config(given)


def test_head_of_roberta_has_its_own_activation() -> None:
    given = {**ROBERTA, "architectures": ["RobertaForMaskedLM"], "hidden_act": "relu"}
    with pytest.raises(UserError, match="'relu' with RoBERTa's masked-LM head"):
        registry.our_config(given)


# The shipped models.

# Numbers of parameters: of Hugging Face's class, and as published (BERT: Turc et al. 2019 and the
# README of google-research/bert; RoBERTa: Liu et al. 2019, section 5, and fairseq's README).
PUBLISHED = {
    "bert/tiny": ("BertForPreTraining", 4.4e6),
    "bert/mini": ("BertForPreTraining", 11.3e6),
    "bert/small": ("BertForPreTraining", 29.1e6),
    "bert/medium": ("BertForPreTraining", 41.7e6),
    "bert/base": ("BertForPreTraining", 110.1e6),
    "bert/large": ("BertForPreTraining", 340e6),
    "roberta/base": ("RobertaForMaskedLM", 125e6),
    "roberta/large": ("RobertaForMaskedLM", 355e6),
}
SIZES = {  # layers, width, heads
    "bert/tiny": (2, 128, 2),
    "bert/mini": (4, 256, 4),
    "bert/small": (4, 512, 8),
    "bert/medium": (8, 512, 8),
    "bert/base": (12, 768, 12),
    "bert/large": (24, 1024, 16),
    "roberta/base": (12, 768, 12),
    "roberta/large": (24, 1024, 16),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_of_published_sizes(resolve: Any, name: str) -> None:
    config = resolve(name)
    class_name, published = PUBLISHED[name]
    layers, width, heads = SIZES[name]
    values: dict[str, Any] = {
        "num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads,
        "intermediate_size": 4 * width,
    }  # fmt: skip
    if name.startswith("roberta"):
        values |= {
            "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5,
            "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
        }  # fmt: skip
    model_class = getattr(transformers, class_name)
    with torch.device("meta"):
        model = model_class(model_class.config_class(**values))
    ours = ModelDef(config)
    assert ours.num_params == sum(p.numel() for p in model.parameters())
    # The paper says 340M of a model that has 336M; the others are rounded to the digit.
    assert ours.num_params == pytest.approx(published, rel=0.012)
    family, said = registry.our_config(model.config.to_dict() | {"architectures": [class_name]})
    assert not list(registry.differences(config, said))
    assert family.name == name.split("/")[0].upper().replace("ROBERTA", "RoBERTa")
