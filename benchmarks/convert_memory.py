"""Peak host memory of `t5x_like convert`, on a synthetic Llama of several GB.

    python benchmarks/convert_memory.py [--gigabytes=3] [--dtype=bfloat16] [--dir=DIR]

Makes a Hugging Face directory of several shards, converts it to a checkpoint of ours and back,
each in a process of its own, and prints one JSON object: the peak resident memory of either, the
bytes of the largest tensor and of the largest stack of layers, and whether the bound of
1.2 x the largest tensor + 2 GB holds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from t5x_like.interop.hugging_face.tensor_files import (
    DTYPES,
    Spec,
    TensorFiles,
    TensorWriter,
)

WIDTH, MLP, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 2048, 8192, 32, 8, 64, 128256
# VmHWM (Linux): getrusage's figure would be that of this process where it was larger.
_CHILD = """
import re, sys
from t5x_like.cli.main import main
code = main(["convert", *sys.argv[1:]])
status = open("/proc/self/status").read()
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024, file=sys.stderr)
raise SystemExit(code)
"""


def layer_shapes(layer: int) -> dict[str, tuple[int, ...]]:
    prefix = f"model.layers.{layer}."
    query, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    return {
        prefix + "input_layernorm.weight": (WIDTH,),
        prefix + "self_attn.q_proj.weight": (query, WIDTH),
        prefix + "self_attn.k_proj.weight": (kv, WIDTH),
        prefix + "self_attn.v_proj.weight": (kv, WIDTH),
        prefix + "self_attn.o_proj.weight": (WIDTH, query),
        prefix + "post_attention_layernorm.weight": (WIDTH,),
        prefix + "mlp.gate_proj.weight": (MLP, WIDTH),
        prefix + "mlp.up_proj.weight": (MLP, WIDTH),
        prefix + "mlp.down_proj.weight": (WIDTH, MLP),
    }


def make_source(directory: Path, *, num_bytes: float, dtype: str) -> dict[str, int]:
    """Writes the directory; returns sizes in bytes."""
    itemsize = DTYPES[dtype].itemsize
    table = VOCAB * WIDTH * itemsize
    per_layer = sum(map(math.prod, layer_shapes(0).values())) * itemsize
    num_layers = max(2, round((num_bytes - 2 * table) / per_layer))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, WIDTH)}
    for layer in range(num_layers):
        shapes |= layer_shapes(layer)
    shapes |= {"model.norm.weight": (WIDTH,), "lm_head.weight": (VOCAB, WIDTH)}
    specs = {name: Spec(shape, dtype) for name, shape in shapes.items()}
    directory.mkdir()
    writer = TensorWriter(directory, specs, shard_bytes=10**9)
    rng = np.random.default_rng(0)
    for name, spec in specs.items():
        writer.write(name, rng.standard_normal(spec.shape, np.float32) * 0.02)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB,
        "hidden_size": WIDTH, "intermediate_size": MLP, "num_hidden_layers": num_layers,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "max_position_embeddings": 8192, "tie_word_embeddings": False,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    return {
        "total_bytes": sum(math.prod(s) for s in shapes.values()) * itemsize,
        "largest_tensor_bytes": table,
        "largest_stack_bytes": num_layers * MLP * WIDTH * itemsize,
    }


def convert(*flags: str) -> dict[str, float]:
    """Peak resident bytes and seconds of one conversion in a fresh process."""
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-c", _CHILD, *flags], stderr=subprocess.PIPE, text=True, check=False
    )
    if result.returncode:
        raise SystemExit(result.stderr)
    seconds = round(time.perf_counter() - start, 1)
    return {"peak_rss_bytes": int(result.stderr.split()[-1]), "seconds": seconds}


def same_tensors(a: Path, b: Path) -> bool:
    """Whether two directories hold the same tensors; one in memory at a time."""
    one, other = TensorFiles(a), TensorFiles(b)
    return one.specs == other.specs and all(
        other.equals(name, one.read(name)) for name in one.specs
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--to_dtype", choices=("float32", "bfloat16"), help="of our checkpoint")
    parser.add_argument("--dir", help="where to write (default: the system's temporary directory)")
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    dtype = {"float32": "F32", "bfloat16": "BF16"}[args.dtype]
    with tempfile.TemporaryDirectory(dir=args.dir) as name:
        root = Path(name)
        sizes = make_source(root / "hf", num_bytes=args.gigabytes * 1e9, dtype=dtype)
        own = [f"--dtype={args.to_dtype}"] if args.to_dtype else []
        there = convert(f"--from={root / 'hf'}", f"--to={root / 'own'}", *own)
        kept = f"--dtype={args.dtype}"
        back = convert(f"--from={root / 'own'}", f"--to={root / 'back'}", "--format=hf", kept)
        identical = same_tensors(root / "hf", root / "back")
    largest = sizes["largest_tensor_bytes"]
    if args.to_dtype == "float32" and args.dtype == "bfloat16":
        largest *= 2
    bound = 1.2 * largest + 2e9
    peak = max(there["peak_rss_bytes"], back["peak_rss_bytes"])
    report = {
        "dtype": args.dtype,
        **sizes,
        "to_own": there,
        "to_hugging_face": back,
        "bound_bytes": int(bound),
        "within_bound": peak < bound,
        "bit_identical_back": identical,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
