"""Cost of experts over dense layers of the same active FLOPs, as JSON.

    python benchmarks/moe.py [--tokens=16384] [--embed=256] [--mlp=512] [--repeats=5]

One expert a token, so that its work is that of the dense layer whatever the number of experts.
`model` is the gradient of a decoder of two layers over rows of 512 tokens, `layer` that of one
feed-forward layer by itself, `optimizer` one AdamW update of its parameters, which are as many
times more as there are experts. Tokens are spread evenly (`force_balance`).
Times are the least of several runs, in turn, so that load hits all alike: CPU seconds of the
process on a CPU, which other processes change little, and wall seconds elsewhere.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5x_like.config.host_memory import keep_freed_memory
from t5x_like.layers.attention import AttentionConfig
from t5x_like.layers.mlp import MlpConfig
from t5x_like.layers.moe.layer import MoeConfig
from t5x_like.layers.moe.routers import TopKRouter
from t5x_like.models.base import ModelDef
from t5x_like.models.block import BlockConfig
from t5x_like.models.decoder_only import DecoderOnlyConfig
from t5x_like.objectives.causal_lm import CausalLm
from t5x_like.training.optimizers.adamw import AdamWConfig

EXPERTS = (8, 16, 32, 64, 128)
VOCAB, ROW = 4096, 512
PLAIN: dict[str, Any] = {"dropout_rate": 0.0, "dropout_key": None, "broadcast_dims": ()}
Runs = dict[str, Callable[[], Any]]


class _Layer:
    vocab_size, dtype = 0, "float32"

    def __init__(self, config: Any, embed_dim: int) -> None:
        self.config, self.embed_dim = config, embed_dim

    def build(self) -> Any:
        return self.config.build(embed_dim=self.embed_dim, dtype=jnp.dtype("float32"))


def model_gradient(config: Any, x: jax.Array) -> Callable[[], Any]:
    """Runs the forward and backward pass of a decoder, on as many tokens as `x` has."""
    heads = AttentionConfig(num_heads=4, head_dim=x.shape[-1] // 4)
    block = BlockConfig(embed_dim=x.shape[-1], attention=heads, mlp=config)
    decoder = DecoderOnlyConfig(vocab_size=VOCAB, num_layers=2, block=block, dtype="float32")
    model = ModelDef(decoder)
    params = jax.jit(model.init)(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(1, VOCAB, (x.shape[1] // ROW, ROW))
    batch = {
        "decoder_input_tokens": tokens,
        "decoder_target_tokens": tokens,
        "decoder_loss_weights": np.ones_like(tokens, np.float32),
    }

    @jax.jit
    @jax.grad
    def gradient(params: Any) -> Any:
        return CausalLm().loss(model.bind(params), batch, dropout_key=None)[0]

    return lambda: jax.block_until_ready(gradient(params))


def parts(config: Any, x: jax.Array) -> Runs:
    """Functions that run forward and backward passes, and an update of the optimizer."""
    model = ModelDef(_Layer(config, x.shape[-1]))
    params = jax.jit(model.init)(jax.random.key(0))
    optimizer = AdamWConfig().build(model.param_info)

    @jax.jit
    @jax.grad
    def gradient(params: Any) -> Any:
        out = model.bind(params)(x, **PLAIN)
        return jnp.sum((out if isinstance(config, MlpConfig) else out[0]) ** 2)

    def update(grads: Any, state: Any, params: Any) -> Any:
        steps, state = optimizer.update(grads, state, params, learning_rate=jnp.float32(1e-3))
        return jax.tree.map(jnp.add, params, steps), state

    jitted = jax.jit(update, donate_argnums=(1, 2))
    held = [jax.tree.map(jnp.copy, params), optimizer.init(params)]
    grads = jax.tree.map(jnp.zeros_like, params)

    def step() -> None:
        held[:] = jax.block_until_ready(jitted(grads, held[1], held[0]))

    return {
        "model": model_gradient(config, x),
        "layer": lambda: jax.block_until_ready(gradient(params)),
        "optimizer": step,
    }


def measure(run: Callable[[], Any]) -> float:
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    start = clock()
    run()
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("tokens", 16384), ("embed", 256), ("mlp", 512), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    keep_freed_memory()
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, args.tokens, args.embed)), jnp.float32)
    mlp = MlpConfig(mlp_dim=args.mlp)
    router = TopKRouter(k=1, force_balance=True)
    models = {"dense": parts(mlp, x)}
    for n in EXPERTS:
        models[str(n)] = parts(MoeConfig(num_experts=n, expert=mlp, router=router), x)
    best = {name: dict.fromkeys(runs, float("inf")) for name, runs in models.items()}
    for repeat in range(args.repeats + 1):
        for name, runs in models.items():
            for part, run in runs.items():
                seconds = measure(run)
                if repeat:  # the first one compiles
                    best[name][part] = min(best[name][part], seconds)
    over_dense = {
        part: {n: round(times[part] / best["dense"][part], 3) for n, times in best.items()}
        for part in ("model", "layer")
    }
    result = {
        "device": jax.devices()[0].device_kind,
        **vars(args),
        "seconds": best,
        "over_dense": over_dense,
        "128_over_8": {part: round(n["128"] / n["8"], 3) for part, n in over_dense.items()},
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
