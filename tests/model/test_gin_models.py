"""Every shipped model file builds a model of the published number of parameters."""

from __future__ import annotations

import pytest

from t5x_like.models.base import ModelDef

from . import counts_gpt, counts_llama, test_counts_moe
from .conftest import REPOSITORY

# Hugging Face model cards and configurations; UL2: "20B".
PUBLISHED = {
    "t5_1_0/small": 60_506_624,
    "t5_1_0/base": 222_903_552,
    "t5_1_0/large": 737_668_096,
    "t5_1_0/3b": 2_851_598_336,
    "t5_1_0/11b": 11_307_321_344,
    "t5_1_1/small": 76_961_152,
    "t5_1_1/base": 247_577_856,
    "t5_1_1/large": 783_150_080,
    "t5_1_1/xl": 2_849_757_184,
    "t5_1_1/xxl": 11_135_332_352,
    "flan_t5/small": 76_961_152,
    "flan_t5/base": 247_577_856,
    "flan_t5/large": 783_150_080,
    "flan_t5/xl": 2_849_757_184,
    "flan_t5/xxl": 11_135_332_352,
    "mt5/small": 300_176_768,
    "mt5/base": 582_401_280,
    "mt5/large": 1_229_581_312,
    "mt5/xl": 3_742_619_648,
    "mt5/xxl": 12_921_057_280,
    "umt5/small": 306_601_984,
    "umt5/base": 592_043_520,
    "umt5/xl": 3_768_356_864,
    "umt5/xxl": 12_972_531_712,
    "byt5/small": 299_637_760,
    "byt5/base": 581_653_248,
    "byt5/large": 1_228_183_552,
    "byt5/xl": 3_737_801_728,
    "byt5/xxl": 12_906_899_328,
    "ul2/20b": 19_591_209_984,
}
# Sizes of our own, for two CPU cores and for benchmarks.
OWN = {"t5_1_1/tiny", "gpt2/tiny", "gpt2/1_3b"}
# Families whose sizes other tests count: test_counts_*, tests/encoder_only.
COUNTED_ELSEWHERE = {
    *(name.partition("/")[0] for name in counts_gpt.PUBLISHED),
    *counts_llama.PUBLISHED,
    *test_counts_moe.FAMILIES,
    *("bert", "roberta", "deepseek_v2", "deepseek_v3"),
}


def test_the_lists_above_are_complete():
    shipped = {
        str(path.relative_to(REPOSITORY / "gin/models").with_suffix(""))
        for path in (REPOSITORY / "gin/models").rglob("*.gin")
        if path.name != "base_config.gin"
    }
    elsewhere = {name for name in shipped if name.partition("/")[0] in COUNTED_ELSEWHERE}
    assert shipped - elsewhere == (PUBLISHED.keys() | OWN) - elsewhere


@pytest.mark.parametrize("name", PUBLISHED)
def test_number_of_parameters(resolve, name):
    assert ModelDef(resolve(name)).num_params == PUBLISHED[name]


@pytest.mark.parametrize("name", sorted(OWN))
def test_own_sizes_build(resolve, name):
    model = ModelDef(resolve(name))
    assert model.num_params < (2e7 if name.endswith("tiny") else 1.4e9)


@pytest.mark.parametrize("name", ["t5_1_1/tiny", "t5_1_0/small", "gpt2/tiny", "flan_t5/small"])
def test_macros_reach_the_model(resolve, name):
    config = resolve(
        name, "DROPOUT_RATE = 0.3", "DTYPE = 'bfloat16'", "REMAT = 'full'", "VOCAB_SIZE = 77"
    )
    assert config.block.dropout_rate == 0.3
    assert (config.dtype, config.remat, config.vocab_size) == ("bfloat16", "full", 77)
