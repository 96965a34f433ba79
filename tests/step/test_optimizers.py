"""Optimizers by themselves: against optax, stacked against unrolled, and every setting."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5x_like.errors import UserError
from t5x_like.models.base import ParamInfo
from t5x_like.training.optimizers.adafactor import AdafactorConfig
from t5x_like.training.optimizers.adamw import AdamWConfig
from t5x_like.training.optimizers.base import OptimizerConfig, ParameterGroup
from t5x_like.training.optimizers.lion import LionConfig
from t5x_like.training.optimizers.muon import MuonConfig

RATE = 0.01
NUM_LAYERS = 3
# One layer's parameters: name -> (shape, logical axes).
LAYER = {
    "wide": ((16, 24), ("embed", "mlp")),
    "tall": ((24, 16), ("mlp", "embed")),
    "square": ((16, 16), ("heads", "embed")),
    "thin": ((16, 4), ("embed", "heads")),
    "relpos": ((8, 16), ("heads", "relpos_buckets")),
    "scale": ((16,), ("embed",)),
}
ADAFACTOR = AdafactorConfig(min_dim_size_to_factor=8)
CONFIGS = {
    "adafactor": ADAFACTOR,
    "adafactor_all": dataclasses.replace(
        ADAFACTOR, momentum=0.9, weight_decay=0.01, weight_decay_lr_exponent=2.0
    ),
    "adamw": AdamWConfig(),
    "lion": LionConfig(),
    "muon": MuonConfig(),
}


def infos(stacked: bool) -> dict[str, Any]:
    """The parameters of all layers, in stacked arrays or one dict a layer."""
    f32 = jnp.dtype("float32")
    if stacked:
        return {
            name: ParamInfo((NUM_LAYERS, *shape), f32, ("layers", *axes))
            for name, (shape, axes) in LAYER.items()
        }
    layer = {name: ParamInfo(shape, f32, axes) for name, (shape, axes) in LAYER.items()}
    return {f"layer_{i}": layer for i in range(NUM_LAYERS)}


def draw(seed: int) -> dict[str, Any]:
    """Stacked values; the layers differ in size, so that a shared statistic would show."""
    rng = np.random.default_rng(seed)
    size = 10.0 ** np.arange(NUM_LAYERS)
    return {
        name: jnp.asarray(
            rng.normal(size=(NUM_LAYERS, *shape)) * size.reshape(-1, *[1] * len(shape)),
            jnp.float32,
        )
        for name, (shape, _) in LAYER.items()
    }


def unroll(stacked: dict[str, Any]) -> dict[str, Any]:
    return {f"layer_{i}": {n: a[i] for n, a in stacked.items()} for i in range(NUM_LAYERS)}


def run(config: OptimizerConfig, param_info: Any, params: Any, gradients: list[Any]) -> Any:
    """Returns parameters and optimizer state after these gradients."""
    optimizer = config.build(param_info)

    def update(params, state, grads):
        trained, frozen = optimizer.split(params)
        updates, state = optimizer.update(
            optimizer.split(grads)[0], state, trained, learning_rate=jnp.float32(RATE)
        )
        return optimizer.merge(optax.apply_updates(trained, updates), frozen), state

    state = optimizer.init(optimizer.split(params)[0])
    compiled = jax.jit(update).lower(params, state, gradients[0]).compile()
    for grads in gradients:
        params, state = compiled(params, state, grads)
    return params, state


@pytest.fixture(scope="module")
def gradients() -> list[Any]:
    return [draw(seed) for seed in range(1, 5)]


def run_stacked(config: OptimizerConfig, gradients: list[Any]) -> Any:
    return run(config, infos(True), draw(0), gradients)


@pytest.mark.parametrize("name", CONFIGS)
def test_stacked_like_unrolled(name, gradients):
    stacked, _ = run_stacked(CONFIGS[name], gradients)
    unrolled, _ = run(
        CONFIGS[name], infos(False), unroll(draw(0)), [unroll(grads) for grads in gradients]
    )
    # Batched and single matrix products, of which Muon is made, may differ in the last bit.
    tolerance = 1e-6 if name == "muon" else 0.0
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * np.abs(e).max()),
        unroll(stacked),
        unrolled,
    )


@pytest.mark.parametrize(
    ("config", "reference"),
    [
        (
            AdamWConfig(weight_decay=0.2, b1=0.8, b2=0.9, eps=1e-6),
            optax.adamw(RATE, b1=0.8, b2=0.9, eps=1e-6, weight_decay=0.2),
        ),
        (
            LionConfig(weight_decay=0.2, b1=0.8, b2=0.9),
            optax.lion(RATE, b1=0.8, b2=0.9, weight_decay=0.2),
        ),
        (
            AdamWConfig(weight_decay=0.1, clip_global_norm=1.0),
            optax.chain(
                optax.clip_by_global_norm(1.0), optax.adamw(RATE, b2=0.95, weight_decay=0.1)
            ),
        ),
    ],
)
def test_like_optax(config, reference, gradients):
    actual, _ = run_stacked(config, gradients)
    expected = draw(0)
    state = reference.init(expected)
    for grads in gradients:
        updates, state = reference.update(grads, state, expected)
        expected = optax.apply_updates(expected, updates)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5), actual, expected)


def test_muon_orthogonalises_matrices_layer_by_layer(gradients):
    config = MuonConfig(weight_decay=0.0)
    params, state = run_stacked(config, gradients[:1])
    for name in ("wide", "tall", "square", "thin"):
        for layer in range(NUM_LAYERS):
            step = np.asarray(params[name] - draw(0)[name])[layer] / RATE
            values = np.linalg.svd(step, compute_uv=False) / max(step.shape) ** 0.5
            # Five Newton-Schulz steps bring the singular values near 1; 0.2 is update_rms.
            assert values.min() > 0.5 * 0.2 and values.max() < 1.5 * 0.2
    assert set(state["muon"].mu) == {"wide", "tall", "square", "thin"}
    assert set(state["adamw"].mu) == {"relpos", "scale"}


def test_adafactor_factors_by_the_shape_of_one_layer():
    optimizer = ADAFACTOR.build(infos(True))
    state = optimizer.init(draw(0))
    shapes = {
        moment: {name: array.shape[1:] for name, array in getattr(state, moment).items()}
        for moment in ("v_row", "v_col", "v", "m")
    }
    assert shapes == {
        # v_row is the mean over the largest dim; of equal ones the later is the larger.
        "v_row": {"wide": (16, 1), "tall": (1, 16), "square": (16, 1), "relpos": (8, 1)},
        "v_col": {"wide": (1, 24), "tall": (24, 1), "square": (1, 16), "relpos": (1, 16)},
        "v": {"thin": (16, 4), "scale": (16,)},
        "m": {},
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_state_has_the_axes_of_its_parameters(name):
    optimizer = CONFIGS[name].build(infos(True))
    axes = optimizer.state_logical_axes()
    state = optimizer.init(draw(0))
    by_path = zip(
        jax.tree_util.tree_leaves_with_path(state),
        jax.tree.leaves(axes),
        strict=True,
    )
    for (path, leaf), names in by_path:
        parameter = path[-1].key if hasattr(path[-1], "key") else None
        whole = LAYER[parameter][1] if parameter else ()
        expected = ("layers", *whole) if parameter else (None,) * leaf.ndim
        kept = [axis if size > 1 else None for axis, size in zip(expected, leaf.shape, strict=True)]
        assert tuple(names) == tuple(kept), path


def group(pattern: str, **fields: Any) -> ParameterGroup:
    return ParameterGroup(pattern=pattern, **fields)


def test_first_matching_group_holds(gradients):
    groups = [
        group("scale", weight_decay=0.0),
        group("(scale|wide)", learning_rate_scale=0.5),
        group("tall", frozen=True),
    ]
    base = AdamWConfig(weight_decay=0.3)
    plain, _ = run_stacked(base, gradients)
    undecayed, _ = run_stacked(dataclasses.replace(base, weight_decay=0.0), gradients)
    grouped, state = run_stacked(dataclasses.replace(base, groups=groups), gradients)
    np.testing.assert_allclose(grouped["scale"], undecayed["scale"], rtol=1e-6)
    np.testing.assert_array_equal(grouped["square"], plain["square"])
    np.testing.assert_array_equal(grouped["tall"], draw(0)["tall"])
    assert "tall" not in state.mu and "tall" not in state.nu
    # A first step at half the rate goes half as far, weight decay included.
    first = [
        run_stacked(c, gradients[:1])[0] for c in (base, dataclasses.replace(base, groups=groups))
    ]
    steps = [np.asarray(params["wide"] - draw(0)["wide"]) for params in first]
    np.testing.assert_allclose(steps[1], steps[0] / 2, rtol=1e-3, atol=1e-5)


def test_frozen_parameters_do_not_count_in_clipping(gradients):
    frozen = [group("(wide|tall|square|thin|relpos)", frozen=True)]
    config = LionConfig(clip_global_norm=1e-3, groups=frozen, weight_decay=0.0)
    _, state = run_stacked(config, gradients[:1])
    norm = optax.tree.norm(state.mu) / (1 - config.b2)
    np.testing.assert_allclose(norm, 1e-3, rtol=1e-5)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([group("scale/.*")], "'scale/.*' matches none of the 6 parameters: it must match a whole"),
        (
            [group("s.*", frozen=True), group("scale")],
            "'scale' matches only parameters that earlier groups take (such as scale): move it up",
        ),
        ([group(".*", frozen=True)], "freeze every parameter: nothing is trained"),
    ],
)
def test_group_errors(groups, message):
    with pytest.raises(UserError) as error:
        AdamWConfig(groups=groups).build(infos(True))
    assert message in str(error.value)


def test_bad_settings():
    with pytest.raises(UserError, match=r"pattern '\(' is no regular expression"):
        group("(")
    with pytest.raises(UserError, match=r"LionConfig.clip_global_norm is 0: give a positive norm"):
        LionConfig(clip_global_norm=0)
    with pytest.raises(UserError, match=r"AdafactorConfig.momentum is 1.5: give a number in"):
        AdafactorConfig(momentum=1.5)


COMMON = [
    {"weight_decay": 0.5},
    {"clip_global_norm": 1.0},
    {"groups": [group(".*", frozen=False, learning_rate_scale=2.0)]},
]
ADAM_FIELDS = [{"b1": 0.5}, {"b2": 0.5}, {"eps": 1.0}]
FIELDS = {
    "adafactor_all": [
        *COMMON,
        {"weight_decay_lr_exponent": 1.0},
        {"decay_rate_exponent": 0.5},
        {"momentum": None},
        {"clipping_threshold": 0.1},
        {"multiply_by_parameter_scale": False},
        {"min_parameter_scale": 2.0},
        {"epsilon": 1.0},
        {"factored": False},
        {"min_dim_size_to_factor": 4},
    ],
    "adamw": [*COMMON, *ADAM_FIELDS],
    "lion": [*COMMON, {"b1": 0.1}, {"b2": 0.5}],
    "muon": [
        *COMMON,
        *ADAM_FIELDS,
        {"momentum": 0.5},
        {"newton_schulz_steps": 1},
        {"update_rms": 1.0},
    ],
}


@pytest.mark.parametrize("name", FIELDS)
def test_no_field_is_dead(name, gradients):
    config = CONFIGS[name]
    assert {field for change in FIELDS[name] for field in change} == {
        field.name for field in dataclasses.fields(config)
    }
    base, _ = run_stacked(config, gradients[:3])
    for change in FIELDS[name]:
        changed, _ = run_stacked(dataclasses.replace(config, **change), gradients[:3])
        assert any(not np.array_equal(base[n], changed[n]) for n in base), change
