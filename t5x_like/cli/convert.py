"""`t5x_like convert`: checkpoints from and to Hugging Face and T5X."""

from __future__ import annotations

import argparse
import math
import os

_EPILOG = """\
kinds of checkpoint:
  own  MODEL_DIR or MODEL_DIR/checkpoints/<step> of t5x_like
  hf   a Hugging Face directory: config.json, safetensors (sharded or not), tokenizer files
  t5x  a T5X model directory or one checkpoint_<step>; read: legacy and Orbax, written: legacy

examples:
  t5x_like convert --from=/data/Llama-3.2-1B --to=/data/llama
  t5x_like train --gin_file=/data/llama/model.gin ... --gin.INITIAL_CHECKPOINT_PATH=/data/llama
  t5x_like convert --from=/data/run1 --to=/data/run1_hf --format=hf --dtype=bfloat16
  t5x_like convert --from=/data/t5x/checkpoint_1100000 --to=/data/t5 \\
    --model=gin/models/t5_1_1/small.gin
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `convert`."""
    parser.epilog = _EPILOG
    parser.add_argument(
        "--from",
        dest="source",
        required=True,
        type=os.path.expanduser,
        metavar="DIR",
        help="checkpoint of any kind, the latest step where there are several",
    )
    parser.add_argument(
        "--to",
        dest="target",
        required=True,
        type=os.path.expanduser,
        metavar="DIR",
        help="new directory; it is there only if all went well",
    )
    parser.add_argument(
        "--format", metavar="KIND", help="own, hf or t5x (default: own, if the source is not)"
    )
    parser.add_argument(
        "--dtype", metavar="DTYPE", help="float32 or bfloat16 (default: as in the source)"
    )
    parser.add_argument(
        "--model", metavar="FILE", help="gin file with the MODEL of a checkpoint that carries none"
    )
    parser.add_argument(
        "--scanned", action="store_true", help="with --format=t5x: T5X's layout of scanned layers"
    )


def run(args: argparse.Namespace) -> int:
    """Converts; returns 0. Raises UserError: see `interop.convert.convert`."""
    # Everything happens on the host; an accelerator may be busy with something else.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from t5x_like.interop.convert import convert

    weights = convert(
        args.source,
        args.target,
        format=args.format,
        dtype=args.dtype,
        model=args.model,
        scanned=args.scanned,
    )
    count = sum(math.prod(info.shape) for info in weights.param_info.values())
    print(f"{args.target}: {count:,} parameters, step {weights.step}")
    return 0
