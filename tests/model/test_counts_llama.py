"""Every published size of Llama's and Gemma's kin has the published number of parameters.

Counted from abstract shapes: no memory is taken.
"""

from __future__ import annotations

import pytest

from t5x_like.interop.hugging_face import registry
from t5x_like.models.base import ModelDef

from .conftest import REPOSITORY
from .counts_llama import PUBLISHED, VISION_TOWER

MODELS = REPOSITORY / "gin/models"
SIZES = [f"{family}/{size}" for family, sizes in PUBLISHED.items() for size in sizes]


@pytest.mark.parametrize("family", PUBLISHED)
def test_counts(resolve, family):
    ours = {size: ModelDef(resolve(f"{family}/{size}")).num_params for size in PUBLISHED[family]}
    assert ours == PUBLISHED[family]


def test_the_table_is_complete():
    shipped = {
        f"{family}/{path.stem}"
        for family in PUBLISHED
        for path in (MODELS / family).glob("*.gin")
        if path.name != "base_config.gin"
    }
    assert shipped == set(SIZES)


# The size of each family that has the most that others have not.
WRITTEN = [
    "llama2/70b", "llama3_1/405b", "llama3_2/1b", "mistral/7b_v0_1", "yi/34b", "qwen1_5/0_5b",
    "qwen2_5/72b", "qwen3/0_6b", "phi3/mini_128k", "phi3/medium_4k", "gemma1/2b", "gemma2/27b",
    "gemma3/270m", "gemma3/4b",
]  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
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


def test_the_part_of_gemma3_that_is_not_text():
    torch = pytest.importorskip("torch", reason="Hugging Face's models are PyTorch's")
    transformers = pytest.importorskip("transformers", reason="it is what we compare with")
    vision = {  # vision_config of google/gemma-3-4b-pt.
        "hidden_size": 1152, "image_size": 896, "intermediate_size": 4304,
        "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14,
        "vision_use_head": False,
    }  # fmt: skip
    with torch.device("meta"):
        tower = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**vision))
    assert tower.num_parameters() == VISION_TOWER
