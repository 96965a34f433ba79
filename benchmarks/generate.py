"""Tokens per second of greedy generation, ours against transformers' `generate`, in one run.

    python benchmarks/generate.py [--rounds 3] [--new 128] [--batch 16] [--no-flatness]

The same random float32 weights on the same CPU: T5 1.1 small (64 input tokens) and a Llama of 60M
parameters (prompts of 64 tokens), no end token. Each side runs in a process of its own, in turn;
compilation and the first call are not counted, encoding and prefill are. `flatness` is our time a
token for the generated lengths of one compiled program, whose cache has room for the longest:
the cost of the first token, prompt included, is taken off. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

VOCAB, PROMPT = 32128, 64
THEIR_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5_1_1_small": (
        "T5ForConditionalGeneration",
        {
            "d_model": 512,
            "d_kv": 64,
            "d_ff": 1024,
            "num_layers": 8,
            "num_heads": 6,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
            "decoder_start_token_id": 0,
        },
    ),
    "llama_60m": (
        "LlamaForCausalLM",
        {
            "hidden_size": 512,
            "intermediate_size": 1376,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
        },
    ),
}
LENGTHS = (64, 128, 256, 512)  # of the flatness runs


def prompts(batch: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, VOCAB, (batch, PROMPT)).astype(np.int32)


def save_theirs(name: str, directory: Path) -> None:
    """Random weights, of the size that their initialisation gives."""
    import torch
    import transformers

    head, fields = THEIR_CONFIGS[name]
    kind = getattr(transformers, head)
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    kind(kind.config_class(vocab_size=VOCAB, **ids, **fields)).save_pretrained(directory)


def their_run(name: str, directory: Path, batch: int, new: int) -> Callable[[], np.ndarray]:
    import torch
    import transformers

    model = getattr(transformers, THEIR_CONFIGS[name][0]).from_pretrained(directory).eval()
    ids = torch.from_numpy(prompts(batch)).long()

    def run() -> np.ndarray:
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False
            )
        tokens: np.ndarray = out[:, -new:].numpy()
        return tokens

    return run


def our_run(name: str, directory: Path, batch: int, new: int) -> Callable[..., np.ndarray]:
    from t5x_like.decoding.generate import Generator
    from t5x_like.decoding.sampling import Sampling
    from t5x_like.interop.hugging_face.checkpoint import HuggingFaceCheckpoint, load_params
    from t5x_like.models.base import ModelDef

    model = ModelDef(HuggingFaceCheckpoint(directory).config)
    import jax

    params = jax.device_put(load_params(directory, model.param_info))
    generator = Generator(model, Sampling(max_new_tokens=new), eos_ids=())
    if name.startswith("t5"):
        inputs = {"encoder_input_tokens": prompts(batch)}
    else:
        inputs = {
            "decoder_prompt_tokens": prompts(batch),
            "decoder_prompt_lengths": np.full(batch, PROMPT),
        }

    def run(limit: int | None = None) -> np.ndarray:
        limits = None if limit is None else np.full(batch, limit)
        return np.asarray(generator(params, inputs, max_new_tokens=limits).tokens[:, 0])

    return run


def serve(pipe: Connection, side: str, *arguments: Any) -> None:
    """In a process of its own: runs when told to, and answers (seconds, tokens)."""
    run = {"ours": our_run, "theirs": their_run}[side](*arguments)
    run()
    pipe.send("ready")
    while (message := pipe.recv()) is not None:
        begin = time.perf_counter()
        tokens = run(*message)
        pipe.send((time.perf_counter() - begin, tokens))


class Side:
    def __init__(self, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, *arguments))
        self._process.start()
        theirs.close()
        self._pipe.recv()

    def __call__(self, *message: Any) -> tuple[float, np.ndarray]:
        self._pipe.send(message)
        answer: tuple[float, np.ndarray] = self._pipe.recv()
        return answer

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()


def compare(name: str, directory: Path, *, rounds: int, batch: int, new: int) -> dict[str, Any]:
    sides = {s: Side(s, name, directory, batch, new) for s in ("ours", "theirs")}
    seconds: dict[str, list[float]] = {s: [] for s in sides}
    tokens = {}
    for _ in range(rounds):
        for side, run in sides.items():
            elapsed, tokens[side] = run()
            seconds[side].append(elapsed)
    for run in sides.values():
        run.close()
    rates = {s: batch * new / statistics.median(x) for s, x in seconds.items()}
    same = np.mean(np.cumprod(tokens["ours"] == tokens["theirs"], axis=1))
    return {
        "tokens_per_second": {s: round(rate, 1) for s, rate in rates.items()},
        "ratio": round(rates["ours"] / rates["theirs"], 2),
        "seconds": {s: [round(t, 3) for t in x] for s, x in seconds.items()},
        "equal_tokens_before_the_first_difference": round(float(same), 3),
    }


def flatness(name: str, directory: Path, *, rounds: int, batch: int) -> dict[str, float]:
    run = Side("ours", name, directory, batch, max(LENGTHS))
    first = min(run(1)[0] for _ in range(rounds))
    costs = {
        str(n): 1e3 * (min(run(n)[0] for _ in range(rounds)) - first) / (n - 1) for n in LENGTHS
    }
    run.close()
    return {n: round(cost, 2) for n, cost in costs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--models", nargs="+", default=list(THEIR_CONFIGS), choices=THEIR_CONFIGS)
    parser.add_argument("--no-flatness", action="store_true")
    args = parser.parse_args()
    report: dict[str, Any] = {"batch": args.batch, "prompt": PROMPT, "new": args.new}
    for name in args.models:
        with tempfile.TemporaryDirectory() as directory:
            where = Path(directory)
            save_theirs(name, where)
            sizes = {"rounds": args.rounds, "batch": args.batch}
            report[name] = compare(name, where, new=args.new, **sizes)
            if not args.no_flatness:
                report[name]["milliseconds_a_step_by_length"] = flatness(name, where, **sizes)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
