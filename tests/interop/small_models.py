"""Hugging Face directories of random weights, made without transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from flax import traverse_util
from safetensors.numpy import save_file

from t5x_like.interop.hugging_face import registry
from t5x_like.interop.hugging_face.adapter import transfers
from t5x_like.interop.hugging_face.tensor_files import INDEX
from t5x_like.models.base import ModelDef

T5 = {
    "architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "vocab_size": 64,
    "d_model": 16, "d_kv": 4, "d_ff": 24, "num_heads": 4, "num_layers": 3, "num_decoder_layers": 2,
    "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "n_positions": 512,
    "eos_token_id": 1, "pad_token_id": 0, "decoder_start_token_id": 0,
}  # fmt: skip
GEMMA2 = {
    "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "vocab_size": 64,
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "sliding_window": 8,
}  # fmt: skip
GPT2 = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 64, "n_embd": 16,
    "n_layer": 3, "n_head": 4, "n_positions": 32,
}  # fmt: skip


def random_tensors(config: dict[str, Any], *, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """All tensors that the family's table names, of the right shapes."""
    family, ours = registry.our_config(config)
    info = traverse_util.flatten_dict(ModelDef(ours).param_info, sep="/")
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(size=shape).astype(dtype)
        for t in transfers(family.entries(ours), ours)
        for name, shape in zip(t.theirs, t.theirs_shapes(info), strict=True)
    }


def write_directory(
    directory: Path,
    config: dict[str, Any],
    tensors: dict[str, np.ndarray],
    *,
    shards: int = 1,
) -> Path:
    """config.json, some tokenizer files, and one file of tensors or several with their index."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text('{"a tokenizer": 1}')
    (directory / "spiece.model").write_bytes(b"\x00\xff model")
    (directory / "training_args.bin").write_bytes(b"no tokenizer, not carried")
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return directory
    weight_map = {}
    for i, names in enumerate(np.array_split(sorted(tensors), shards), start=1):
        file = f"model-{i:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in names}, directory / file, {"format": "pt"})
        weight_map |= {str(name): file for name in names}
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def as_bfloat16(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()}
