"""Greedy and beam search give the tokens of transformers' `generate`, from random weights."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from t5x_like.decoding.beam_search import BeamSearch
from t5x_like.decoding.generate import Generator
from t5x_like.decoding.sampling import Sampling
from t5x_like.interop.hugging_face.checkpoint import HuggingFaceCheckpoint, load_params
from t5x_like.models.base import ModelDef

torch = pytest.importorskip("torch", reason="the oracle is PyTorch's")
transformers = pytest.importorskip("transformers", reason="the oracle is Hugging Face's")

VOCAB, EOS, NEW, BATCH = 83, 2, 12, 5
SMALL = {"vocab_size": VOCAB, "pad_token_id": 1, "eos_token_id": EOS, "bos_token_id": None}
CONFIGS: dict[str, dict[str, Any]] = {
    "T5": {
        "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
        "decoder_start_token_id": 0,
    },
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40},
    "Llama": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 40,
    },
    "Mixtral": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_local_experts": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 40,
    },
}  # fmt: skip
HEADS = {
    "T5": "T5ForConditionalGeneration",
    "GPT2": "GPT2LMHeadModel",
    "Llama": "LlamaForCausalLM",
    "Mixtral": "MixtralForCausalLM",
}
LENGTHS = np.array([7, 1, 4, 9, 5])


def random_model(family: str, seed: int) -> Any:
    """With weights large enough that prompts matter, and end tokens that do come."""
    config = getattr(transformers, f"{family}Config")(**SMALL, **CONFIGS[family])
    model = getattr(transformers, HEADS[family])._from_config(config, attn_implementation="eager")
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = name.endswith("weight") and ("norm" in name or "ln_" in name)
            # A tied table must not make every token its own successor.
            scale = 0.1 if norm or "wte" in name else 0.5
            parameter.copy_(norm + scale * torch.randn_like(parameter))
    return model.eval()


@functools.cache
def generator(config: Any, decoding: Any, eos_ids: tuple[int, ...]) -> Generator:
    """Compiled once for all seeds."""
    return Generator(ModelDef(config), decoding, eos_ids=eos_ids)


class Pair:
    """The same weights on both sides, and ragged prompts."""

    def __init__(self, family: str, seed: int, directory: Path) -> None:
        self.family, self.theirs = family, random_model(family, seed)
        self.theirs.save_pretrained(directory)
        self.model = ModelDef(HuggingFaceCheckpoint(directory).config)
        self.params = load_params(directory, self.model.param_info)
        rng = np.random.default_rng(seed)
        self.tokens = rng.integers(3, VOCAB, (BATCH, LENGTHS.max())).astype(np.int32)

    def ours(
        self, decoding: Any, eos_ids: tuple[int, ...] = (EOS,), lengths: np.ndarray = LENGTHS
    ) -> Any:
        tokens = self.tokens * (np.arange(self.tokens.shape[1]) < lengths[:, None])
        if self.family == "T5":
            batch = {"encoder_input_tokens": tokens}
        else:
            batch = {"decoder_prompt_tokens": tokens, "decoder_prompt_lengths": lengths}
        return generator(self.model.config, decoding, eos_ids)(self.params, batch)

    def generate(
        self,
        eos_ids: tuple[int, ...] = (EOS,),
        lengths: np.ndarray = LENGTHS,
        **arguments: Any,
    ) -> Any:
        """Tokens after the prompt [BATCH, returned, NEW], and (of a beam search) scores."""
        width = self.tokens.shape[1]
        ids = torch.from_numpy(self.tokens).long()
        mask = (torch.arange(width) < torch.from_numpy(lengths)[:, None]).long()
        prompt = 1
        if self.family != "T5":  # pads on the left
            prompt = width
            ids, mask = (
                torch.stack([row.roll(int(width - n)) for row, n in zip(x, lengths, strict=True)])
                for x in (ids, mask)
            )
        with torch.no_grad():
            out = self.theirs.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=NEW,
                eos_token_id=list(eos_ids),
                do_sample=False,
                return_dict_in_generate=True,
                output_scores=True,
                **arguments,
            )
        tokens = out.sequences[:, prompt:].numpy()
        tokens = np.pad(tokens, ((0, 0), (0, NEW - tokens.shape[1])))
        ended = np.cumsum(np.isin(tokens, eos_ids), axis=1) - np.isin(tokens, eos_ids) > 0
        tokens = np.where(ended, 0, tokens)
        return tokens.reshape(BATCH, -1, NEW), getattr(out, "sequences_scores", None)


DENSE = [(f, s) for f in CONFIGS if f != "Mixtral" for s in (0, 1, 2)]


@pytest.fixture(scope="module", params=[*DENSE, ("Mixtral", 0)], ids=str)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(*request.param, tmp_path_factory.mktemp("model"))


def test_greedy(pair: Pair):
    tokens, _ = pair.generate()
    generated = pair.ours(Sampling(max_new_tokens=NEW))
    np.testing.assert_array_equal(generated.tokens, tokens)
    assert len(np.unique(tokens)) > 8  # not one token over and over


@pytest.mark.parametrize("pair", DENSE, indirect=True, ids=str)
def test_repetition_penalty(pair: Pair):
    # Theirs takes the padding of a prompt for a token that was seen.
    lengths = np.full(BATCH, LENGTHS.max())
    tokens, _ = pair.generate(lengths=lengths, repetition_penalty=1.7)
    decoding = Sampling(max_new_tokens=NEW, repetition_penalty=1.7)
    generated = pair.ours(decoding, lengths=lengths)
    np.testing.assert_array_equal(generated.tokens, tokens)


# Penalty and end tokens; with several of these the search must look at more candidates.
SEARCHES = {
    "T5": (1.0, (EOS,)),
    "GPT2": (0.5, (EOS,)),
    "Llama": (2.0, (EOS, 5, 7, 11, 30)),
    "Mixtral": (1.0, (EOS,)),
}


def test_beam_search(pair: Pair):
    alpha, eos_ids = SEARCHES[pair.family]
    tokens, scores = pair.generate(
        eos_ids, num_beams=4, num_return_sequences=4, length_penalty=alpha
    )
    decoding = BeamSearch(
        max_new_tokens=NEW, num_beams=4, alpha=alpha, length_penalty="power", num_returned=4
    )
    generated = pair.ours(decoding, eos_ids)
    np.testing.assert_array_equal(generated.tokens, tokens)
    np.testing.assert_allclose(generated.scores.ravel(), scores, rtol=1e-4, atol=1e-5)
