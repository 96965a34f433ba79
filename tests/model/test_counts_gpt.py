"""Every published size of the GPT line has the published number of parameters.

Counted from abstract shapes: no memory is taken. Figures that are published rounded agree to
their last digit.
"""

from __future__ import annotations

import math

import pytest

from t5x_like.interop.hugging_face import gpt
from t5x_like.models.base import ModelDef
from t5x_like.training.flops import named_leaves

from .conftest import REPOSITORY
from .counts_gpt import OWN, PUBLISHED, Published

# How often each way of counting takes a parameter.
TIMES = {
    "all": lambda path: 1,
    "table_twice": lambda path: 2 if "token_embedder" in path else 1,
    "no_embeddings": lambda path: 0 if "token_embedder" in path or "logits_dense" in path else 1,
    "no_norms": lambda path: 0 if "norm" in path else 1,
}


def count(model: ModelDef, counted: str) -> int:
    return sum(
        math.prod(info.shape) * TIMES[counted](path)
        for path, info in named_leaves(model.param_info)
    )


def check(ours: int, published: Published) -> None:
    if published.rounding == "down":
        assert 0 <= ours - published.count < published.unit
    else:
        assert abs(ours - published.count) <= published.unit // 2


@pytest.mark.parametrize("name", PUBLISHED)
def test_count(resolve, name):
    published = PUBLISHED[name]
    check(count(ModelDef(resolve(name)), published.counted), published)


def test_the_table_is_complete():
    families = {name.partition("/")[0] for name in PUBLISHED}
    shipped = {
        f"{path.parent.name}/{path.stem}"
        for family in families
        for path in (REPOSITORY / "gin/models" / family).glob("*.gin")
        if path.name != "base_config.gin"
    }
    assert shipped == PUBLISHED.keys() | set(OWN)


# The largest of each family: its configuration, as we write it for Hugging Face, makes a model of
# theirs with as many parameters.
THEIRS = {
    "gpt1/117m": 0, "gpt2/xl": 1, "gpt_neox/20b": 2, "gpt_neox/pythia_12b": 2, "gpt_j/6b": 3,
    "falcon/rw_1b": 4, "falcon/7b": 4, "falcon/180b": 4,
}  # fmt: skip


@pytest.mark.parametrize("name", THEIRS)
def test_hugging_face_counts_the_same(resolve, name):
    torch = pytest.importorskip("torch", reason="Hugging Face's models are PyTorch's")
    transformers = pytest.importorskip("transformers", reason="it is what we compare with")
    config = resolve(name)
    written = gpt.FAMILIES[THEIRS[name]].to_config(config)
    model_class = getattr(transformers, written["architectures"][0])
    with torch.device("meta"):
        model = model_class(model_class.config_class(**written))
    assert model.num_parameters() == ModelDef(config).num_params


@pytest.mark.parametrize("name", ["longt5/local_xl", "longt5/tglobal_xl"])
def test_hugging_face_counts_the_same_longt5(resolve, name):
    torch = pytest.importorskip("torch", reason="Hugging Face's models are PyTorch's")
    transformers = pytest.importorskip("transformers", reason="it is what we compare with")
    config = resolve(name)
    block, encoder = config.block, config.encoder_block.attention
    theirs = transformers.LongT5Config(
        vocab_size=config.vocab_size,
        d_model=block.embed_dim,
        d_kv=block.attention.head_dim,
        d_ff=block.mlp.mlp_dim,
        num_layers=config.num_encoder_layers,
        num_decoder_layers=config.num_decoder_layers,
        num_heads=block.attention.num_heads,
        local_radius=encoder.window - 1,
        encoder_attention_type="transient-global" if encoder.global_block_size else "local",
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = transformers.LongT5ForConditionalGeneration(theirs)
    # transformers 5 ties this output kernel; the checkpoints, as T5 1.1's, have one of their own.
    output_kernel = config.vocab_size * block.embed_dim
    assert model.num_parameters() + output_kernel == ModelDef(config).num_params
