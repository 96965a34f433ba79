"""config.json of Llama's and Gemma's kin: as published, as transformers 5 writes it, and refused.

The configurations here are copied from the repositories on Hugging Face that are named, without
what our models do not have (token ids, caches, versions).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import gin
import pytest

from t5x_like.errors import UserError
from t5x_like.interop.hugging_face import registry
from t5x_like.layers.attention import AttentionConfig
from t5x_like.layers.mlp import MlpConfig
from t5x_like.layers.positions import AlibiConfig
from t5x_like.layers.rope import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeConfig,
    YarnScaling,
)
from t5x_like.models.block import BlockConfig
from t5x_like.models.decoder_only import DecoderOnlyConfig

REPOSITORY = Path(__file__).parents[2]
QWEN = {"use_sliding_window": False, "sliding_window": 32768, "initializer_range": 0.02}
PHI3 = {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096}
GEMMA2 = {
    "attention_bias": False, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256, "rope_theta": 10000.0, "sliding_window": 4096,
    "sliding_window_size": 4096,
}  # fmt: skip
GEMMA3 = {
    "attention_bias": False, "attn_logit_softcapping": None, "final_logit_softcapping": None,
    "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256,
    "rope_local_base_freq": 10000.0, "rope_theta": 1000000.0,
}  # fmt: skip


def json(
    model: str, shape: tuple[int, ...], epsilon: float, vocab: int, tied: bool | None, **more: Any
) -> dict[str, Any]:
    """config.json; `shape` is (width, layers, heads, key and value heads, MLP width)."""
    hidden, layers, heads, kv_heads, mlp = shape
    return {
        "architectures": [f"{model}ForCausalLM"],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "rms_norm_eps": epsilon,
        "vocab_size": vocab,
        **({} if tied is None else {"tie_word_embeddings": tied}),
        **({} if model.startswith("Gemma") else {"hidden_act": "silu"}),
        **more,
    }


PUBLISHED = {
    # huggyllama/llama-65b has neither rope_theta nor num_key_value_heads.
    "llama1/65b": json("Llama", (8192, 80, 64, 64, 22016), 1e-5, 32000, False),
    "llama3_1/405b": json(
        "Llama", (16384, 126, 128, 8, 53248), 1e-5, 128256, False,
        rope_theta=500000.0, attention_bias=False, mlp_bias=False, max_position_embeddings=131072,
        rope_scaling={
            "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        },
    ),
    "mistral/7b_v0_1": json(
        "Mistral", (4096, 32, 32, 8, 14336), 1e-5, 32000, False,
        rope_theta=10000.0, sliding_window=4096,
    ),
    "mistral/nemo_12b": json(
        "Mistral", (5120, 40, 32, 8, 14336), 1e-5, 131072, False,
        head_dim=128, rope_theta=1000000.0, sliding_window=None,
    ),
    "mistral/small_24b": json(
        "Mistral", (5120, 40, 32, 8, 32768), 1e-5, 131072, False,
        head_dim=128, rope_theta=100000000.0, sliding_window=None,
    ),
    "mistral/large_123b": json(
        "Mistral", (12288, 88, 96, 8, 28672), 1e-5, 32768, False,
        rope_theta=1000000.0, sliding_window=None,
    ),
    "yi/6b": json(
        "Llama", (4096, 32, 32, 4, 11008), 1e-5, 64000, False,
        rope_theta=5000000.0, rope_scaling=None, pretraining_tp=1,
    ),
    "yi/1_5_9b": json(
        "Llama", (4096, 48, 32, 4, 11008), 1e-6, 64000, False,
        attention_bias=False, rope_theta=5000000.0, rope_scaling=None,
    ),
    "yi/34b": json(
        "Llama", (7168, 60, 56, 8, 20480), 1e-5, 64000, False,
        rope_theta=5000000.0, rope_scaling=None,
    ),
    "qwen1_5/0_5b": json(
        "Qwen2", (1024, 24, 16, 16, 2816), 1e-6, 151936, True,
        rope_theta=1000000.0, max_window_layers=21, **QWEN,
    ),
    "qwen1_5/4b": json(
        "Qwen2", (2560, 40, 20, 20, 6912), 1e-6, 151936, False,
        rope_theta=5000000.0, max_window_layers=21, **QWEN,
    ),
    "qwen1_5/110b": json(
        "Qwen2", (8192, 80, 64, 8, 49152), 1e-6, 152064, False,
        rope_theta=1000000.0, max_window_layers=70, **QWEN,
    ),
    "qwen2_5/32b": json(
        "Qwen2", (5120, 64, 40, 8, 27648), 1e-5, 152064, False,
        rope_theta=1000000.0, max_window_layers=64, **QWEN,
    ),
    "phi3/medium_4k": json(
        "Phi3", (5120, 40, 40, 10, 17920), 1e-5, 32064, False,
        rope_theta=10000.0, rope_scaling=None, sliding_window=2047, **PHI3,
    ),
    "gemma2/9b": json("Gemma2", (3584, 42, 16, 8, 14336), 1e-6, 256000, None, **GEMMA2),
    "gemma3/270m": json(
        "Gemma3", (640, 18, 4, 1, 2048), 1e-6, 262144, None, sliding_window=512,
        rope_scaling=None, _sliding_window_pattern=6,
        layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 3, **GEMMA3,
    ),
    "gemma3/12b": json(
        "Gemma3", (3840, 48, 16, 8, 15360), 1e-6, 262208, None, sliding_window=1024,
        rope_scaling={"factor": 8.0, "rope_type": "linear"}, sliding_window_pattern=6, **GEMMA3,
    ),
    # google/gemma-3-4b-pt, the multimodal one, which says of its text model what is not usual.
    "gemma3/4b": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
            "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "vision_config": {"model_type": "siglip_vision_model"},
    },
}  # fmt: skip


@gin.configurable
def published_llama(config=gin.REQUIRED):
    return config


@pytest.fixture
def resolve(monkeypatch):
    """name -> the model configuration that the gin file of that name defines."""
    monkeypatch.chdir(REPOSITORY)

    def resolve(name: str):
        with gin.unlock_config():
            gin.clear_config()
            gin.parse_config_files_and_bindings(
                [f"gin/models/{name}.gin"], ["published_llama.config = %MODEL"]
            )
        return published_llama()

    yield resolve
    gin.clear_config()


@pytest.mark.parametrize("name", PUBLISHED)
def test_gin_file_is_the_published_configuration(resolve, name):
    assert registry.our_config(PUBLISHED[name])[1] == resolve(name)


FAMILIES = [
    "llama1", "llama2", "llama3", "llama3_1", "llama3_2", "mistral", "yi", "qwen1_5", "qwen2_5",
    "qwen3", "phi3", "gemma1", "gemma2", "gemma3",
]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_what_we_write_says_the_same_to_us_and_to_transformers(resolve, family):
    transformers = pytest.importorskip("transformers", reason="it says what the files mean")
    for path in sorted((REPOSITORY / "gin/models" / family).glob("*.gin")):
        if path.name == "base_config.gin":
            continue
        config = resolve(f"{family}/{path.stem}")
        _, written = registry.their_config(config)
        assert registry.our_config(written)[1] == config
        model_class = getattr(transformers, written["architectures"][0])
        theirs = model_class.config_class(**written).to_dict()
        # As transformers 5 writes it: positions in `rope_parameters`, nothing at the top level.
        assert not {"rope_theta", "rope_scaling"} & theirs.keys()
        theirs["architectures"] = written["architectures"]
        assert registry.our_config(theirs)[1] == config


def decoder(positions: Any, **attention: Any) -> DecoderOnlyConfig:
    return DecoderOnlyConfig(
        vocab_size=64,
        num_layers=2,
        block=BlockConfig(
            embed_dim=32,
            attention=AttentionConfig(
                num_heads=4,
                head_dim=8,
                logit_scale="rsqrt_head_dim",
                positions=positions,
                **attention,
            ),
            mlp=MlpConfig(mlp_dim=48, activations=("silu", "linear")),
        ),
    )


SCALINGS = [
    LinearScaling(factor=4.0),
    DynamicScaling(factor=2.0, original_length=24),
    Llama3Scaling(
        factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_length=16
    ),
    YarnScaling(factor=4.0, original_length=16),
    YarnScaling(
        factor=4.0, original_length=16, beta_fast=16.0, beta_slow=2.0, attention_factor=1.5
    ),
    LongRopeScaling(
        short_factors=(1.0, 1.1, 1.2, 1.3),
        long_factors=(1.0, 2.0, 3.0, 4.0),
        original_length=16,
        max_length=64,
    ),
    LongRopeScaling(
        short_factors=(1.0, 1.1, 1.2, 1.3),
        long_factors=(1.0, 2.0, 3.0, 4.0),
        original_length=16,
        max_length=64,
        attention_factor=1.25,
    ),
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: type(s).__name__)
def test_scalings_are_read_in_both_forms(scaling):
    transformers = pytest.importorskip("transformers", reason="it writes the other form")
    config = decoder(RopeConfig(theta=5000.0, scaling=scaling))
    _, written = registry.their_config(config)
    theirs = transformers.LlamaConfig(**written).to_dict() | {"architectures": ["LlamaForCausalLM"]}
    assert theirs["rope_parameters"]["rope_theta"] == 5000.0 and "rope_theta" not in theirs
    block = dataclasses.replace(config.block, broadcast_dropout=False, init_stddev=0.02)
    assert registry.our_config(written)[1].block == block
    assert registry.our_config(theirs)[1].block == block


@pytest.mark.parametrize(
    "positions", [{"rope_theta": 1e4}, {"rope_parameters": {"rope_theta": 1e4}}]
)
@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_what_the_config_json_had_besides_stays(positions, theta):
    transformers = pytest.importorskip("transformers", reason="it says what the file means")
    more = {"model_type": "llama", "eos_token_id": 7, "max_position_embeddings": 99}
    carried = json("Llama", (32, 2, 4, 4, 48), 1e-6, 64, False, **positions, **more)
    config = decoder(RopeConfig(theta=theta))
    _, written = registry.their_config(config, carried=carried)
    assert written.items() >= more.items()
    assert registry.our_config(written)[1].block.attention == config.block.attention
    assert transformers.LlamaConfig(**written).rope_parameters["rope_theta"] == theta
    # transformers 4 has no other name for it.
    assert written["rope_theta"] == theta


def test_scaled_local_layers_of_gemma3():
    """The published form has no word for them; that of transformers 5 has."""
    transformers = pytest.importorskip("transformers", reason="it says what the file means")
    linear = {"rope_type": "linear", "rope_theta": 1e3, "factor": 2.0}
    positions = {"sliding_attention": linear, "full_attention": {**linear, "rope_theta": 1e5}}
    theirs = transformers.Gemma3TextConfig(rope_parameters=positions)
    read = {**theirs.to_dict(), "architectures": ["Gemma3ForCausalLM"]}
    config = registry.our_config(read)[1]
    assert [config.block[i].attention.positions for i in (0, 5)] == [
        RopeConfig(theta=theta, scaling=LinearScaling(factor=2.0)) for theta in (1e3, 1e5)
    ]
    _, written = registry.their_config(config)
    assert transformers.Gemma3TextConfig(**written).rope_parameters == theirs.rope_parameters


TINY = json("Llama", (32, 2, 4, 2, 48), 1e-6, 64, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"rope_type": "llama2"}}, "'llama2' is not supported.*'llama3'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "facter": 3.0}}, "'facter'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False,
                           "original_max_position_embeddings": 8}}, "truncate"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_act": "silo"}, "activation 'silo'"),
        ({"architectures": ["MistralForCausalLM"], "model_type": "mistral",
          "layer_types": ["full_attention"] * 2}, "layer_types"),
        ({"architectures": ["Gemma3ForCausalLM"], "use_bidirectional_attention": True},
         "bidirectional"),
        ({"architectures": ["Phi3ForCausalLM"],
          "rope_scaling": {"type": "linear", "factor": 2.0}}, "longrope"),
        ({"architectures": ["LlamaForCausaLM"]}, "not known.*LlamaForCausalLM"),
    ],
)  # fmt: skip
def test_refused_to_read(change, message):
    with pytest.raises(UserError, match=message):
        registry.our_config({**TINY, **change})


def test_a_missing_key_is_named():
    config = {key: value for key, value in TINY.items() if key != "intermediate_size"}
    with pytest.raises(UserError, match="'intermediate_size'"):
        registry.our_config(config)


@pytest.mark.parametrize(
    "config",
    [
        decoder(None),
        decoder(AlibiConfig()),
        decoder(RopeConfig(interleaved=True)),
        decoder(RopeConfig(), sinks=True),
        decoder(RopeConfig(), global_block_size=4, window=4),
        decoder(RopeConfig(), softcap=5.0),
    ],
)
def test_refused_to_write(config):
    with pytest.raises(UserError, match="No architecture"):
        registry.their_config(config)
