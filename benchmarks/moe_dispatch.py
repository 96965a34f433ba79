"""Cost of dispatching: a layer of experts over a dense one of the same active FLOPs.

    python benchmarks/moe_dispatch.py [--tokens=4096] [--embed=256] [--mlp=1024]

One expert a token, so that its work is that of the dense layer whatever the number of experts.
Times are the best of several forward and backward passes, in turn, so that load hits all alike.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5x_like.layers.mlp import MlpConfig
from t5x_like.layers.moe.dispatch import DispatcherConfig
from t5x_like.layers.moe.layer import MoeConfig
from t5x_like.layers.moe.routers import TopKRouter
from t5x_like.models.base import ModelDef

DISPATCHERS = {
    "dropless": DispatcherConfig(),
    "capacity 1.25": DispatcherConfig(kind="capacity", capacity_factor=1.25),
}
PLAIN: dict[str, Any] = {"dropout_rate": 0.0, "dropout_key": None, "broadcast_dims": ()}


class _Layer:
    vocab_size, dtype = 0, "float32"

    def __init__(self, config: Any, embed_dim: int) -> None:
        self.config, self.embed_dim = config, embed_dim

    def build(self) -> Any:
        return self.config.build(embed_dim=self.embed_dim, dtype=jnp.dtype("float32"))


def gradient(config: Any, x: jax.Array) -> Callable[[], Any]:
    """Returns a function that runs one forward and backward pass."""
    model = ModelDef(_Layer(config, x.shape[-1]))
    params = jax.jit(model.init)(jax.random.key(0))

    @jax.jit
    @jax.grad
    def run(params: Any) -> Any:
        out = model.bind(params)(x, **PLAIN)
        return jnp.sum((out if isinstance(config, MlpConfig) else out[0]) ** 2)

    return lambda: jax.block_until_ready(run(params))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("tokens", 4096), ("embed", 256), ("mlp", 1024), ("repeats", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, args.tokens, args.embed)), jnp.float32)
    mlp = MlpConfig(mlp_dim=args.mlp)
    runs = {"dense": gradient(mlp, x)}
    for name, dispatcher in DISPATCHERS.items():
        for experts in (8, 32, 128):
            router = TopKRouter(k=1)
            moe = MoeConfig(num_experts=experts, expert=mlp, router=router, dispatcher=dispatcher)
            runs[f"{name}, {experts} experts"] = gradient(moe, x)
    best = dict.fromkeys(runs, float("inf"))
    for repeat in range(args.repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if repeat:  # the first one compiles
                best[name] = min(best[name], time.perf_counter() - start)
    for name, seconds in best.items():
        print(f"{name:28} {seconds * 1e3:8.1f} ms  {seconds / best['dense']:5.2f} x dense")


if __name__ == "__main__":
    main()
