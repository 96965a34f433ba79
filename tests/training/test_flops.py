"""The FLOP rule against what the forward pass's own jaxpr multiplies."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from t5x_like.config import gin_config
from t5x_like.models.base import ModelDef
from t5x_like.training import flops
from t5x_like.training.run import TrainRun, build


def matmul_flops(jaxpr: jax.extend.core.Jaxpr) -> float:
    """Counts 2*m*k*n of every dot_general, scans multiplied out."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += (
                2.0
                * math.prod(equation.outvars[0].aval.shape)
                * math.prod(shape[d] for d in contracted)
            )
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for inner in jaxprs_in_params(equation.params):
            total += times * matmul_flops(inner)
    return total


@pytest.mark.parametrize(
    ("model", "lengths"),
    [
        ("t5_1_1/small", {"inputs": 512, "targets": 114}),
        ("t5_1_0/small", {"inputs": 64, "targets": 32}),
        ("gpt2/small", {"targets": 128}),
    ],
)
def test_rule_equals_the_matmuls_of_the_forward_pass(model, lengths):
    objective = "causal_lm" if "inputs" not in lengths else "seq2seq"
    run = gin_config.parse(
        [
            f"gin/models/{model}.gin",
            f"gin/objectives/{objective}.gin",
            "gin/optimizers/adafactor.gin",
            "gin/parallel/data.gin",
            "gin/runs/pretrain.gin",
        ],
        [
            "MODEL_DIR='x'",
            "MIXTURE_OR_TASK_NAME='x'",
            f"TASK_FEATURE_LENGTHS={lengths}",
            "TRAIN_STEPS=1",
            "BATCH_SIZE=8",
            "DROPOUT_RATE=0.0",
            "DTYPE='float32'",
        ],
    ).build(TrainRun)
    built = build(run)
    shapes = {name: leaf.shape for name, leaf in built.abstract_batch.items()}
    batch = {n: jax.ShapeDtypeStruct(s, jnp.int32) for n, s in shapes.items()}
    params = built.abstract_state.params
    traced = jax.make_jaxpr(lambda p, b: built.model_def.bind(p)(b))(params, batch)
    full = matmul_flops(traced.jaxpr)
    causal = causal_half(built.model_def, shapes)
    assert flops.forward_flops(built.model_def, shapes) == pytest.approx(full - causal, rel=1e-9)


def causal_half(model_def: ModelDef, shapes: dict[str, tuple[int, ...]]) -> float:
    """The half of the decoder's self-attention that causality leaves out."""
    kernel = model_def.param_info["decoder"]["layers"]["self_attention"]["query"]["kernel"]
    batch, length = shapes["decoder_input_tokens"]
    return 0.5 * 4.0 * batch * length**2 * kernel.shape[0] * kernel.shape[-1]


def test_measured_peak_is_the_speed_of_a_matmul():
    peak = flops.matmul_peak(jnp.dtype(np.float32), size=256, seconds=0.05)
    assert 1e8 < peak < 1e15
