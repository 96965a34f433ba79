"""Every size with experts has the published number of parameters, and of active ones.

Counted from abstract shapes: no memory is taken, not for 1.6T parameters either.
"""

from __future__ import annotations

from decimal import Decimal

import pytest

from t5x_like.interop.hugging_face import registry
from t5x_like.models.base import ModelDef

from .conftest import REPOSITORY
from .counts_moe import EXACT, OWN, PUBLISHED, UNPUBLISHED, WITHOUT_TABLE

ROUNDED = PUBLISHED | WITHOUT_TABLE | OWN
FAMILIES = {name.partition("/")[0] for name in ROUNDED}


def test_the_tables_are_complete():
    shipped = {
        f"{family}/{path.stem}"
        for family in FAMILIES
        for path in (REPOSITORY / "gin/models" / family).glob("*.gin")
        if path.name != "base_config.gin"
    }
    assert shipped == ROUNDED.keys() | EXACT.keys() | set(UNPUBLISHED)


def agrees(count: int, published: str | None) -> bool:
    """Within one unit of the last digit of `published`, in billions, and at most 20% of it."""
    if published is None:
        return True
    number = Decimal(published)
    unit = Decimal(10) ** int(number.as_tuple().exponent)
    return abs(Decimal(count) / 10**9 - number) < min(unit, number / 5)


@pytest.mark.parametrize("name", ROUNDED)
def test_published_counts(resolve, name):
    model = ModelDef(resolve(name))
    left_out = 0
    if name in WITHOUT_TABLE:
        rows, width = model.param_info["token_embedder"]["embedding"].shape
        left_out = rows * width
    counts = (model.num_params - left_out, model.num_active_params - left_out)
    assert all(map(agrees, counts, ROUNDED[name])), counts


@pytest.mark.parametrize("name", EXACT)
def test_exact_counts(resolve, name):
    assert ModelDef(resolve(name)).num_params == EXACT[name]


def test_active_parameters_of_a_switch_are_those_of_its_dense_twin_and_its_routers(resolve):
    dense = ModelDef(resolve("t5_1_0/base"))
    assert dense.num_active_params == dense.num_params
    routers = 12 * 768 * 256  # In every other of 24 layers.
    assert ModelDef(resolve("switch/base_256")).num_active_params == dense.num_params + routers


@pytest.mark.parametrize("name", [n for n in (*EXACT, *UNPUBLISHED) if n != "switch/base_256"])
def test_hugging_face_counts_the_same(resolve, name):
    """Their model of the config.json that we write."""
    torch = pytest.importorskip("torch", reason="Hugging Face's models are PyTorch's")
    transformers = pytest.importorskip("transformers", reason="it is what we compare with")
    config = resolve(name)
    _, written = registry.their_config(config)
    model_class = getattr(transformers, written["architectures"][0])
    with torch.device("meta"):
        model = model_class(model_class.config_class(**written))
    assert model.num_parameters() == ModelDef(config).num_params
