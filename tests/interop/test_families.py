"""What holds for every family of Hugging Face: complete tables, and configs both ways."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import gin
import pytest
from flax import traverse_util

from t5x_like.config import write_gin
from t5x_like.errors import UserError
from t5x_like.interop.hugging_face import registry
from t5x_like.interop.hugging_face.adapter import ConfigJson, transfers
from t5x_like.interop.weights import slots
from t5x_like.layers.moe.routers import SigmoidRouter, TopKRouter
from t5x_like.models.base import ModelDef
from t5x_like.models.decoder_only import DecoderOnlyConfig

REPOSITORY = Path(__file__).parents[2]
# Directory of gin/models -> the architecture in which its models are written. A model that came
# with a config.json keeps the architecture of that.
WRITTEN_AS = {
    "bert": "BertForPreTraining",
    "byt5": "T5ForConditionalGeneration",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "falcon": "FalconForCausalLM",
    "flan_t5": "T5ForConditionalGeneration",
    "gemma1": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "gpt1": "OpenAIGPTLMHeadModel",
    "gpt2": "GPT2LMHeadModel",
    "gpt_j": "GPTJForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
    "llama1": "LlamaForCausalLM",
    "llama2": "LlamaForCausalLM",
    "llama3": "LlamaForCausalLM",
    "llama3_1": "LlamaForCausalLM",
    "llama3_2": "LlamaForCausalLM",
    "longt5": "LongT5ForConditionalGeneration",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "mt5": "T5ForConditionalGeneration",
    "phi3": "MistralForCausalLM",
    "qwen1_5": "Qwen2ForCausalLM",
    "qwen2_5": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "roberta": "RobertaForMaskedLM",
    "switch": "SwitchTransformersForConditionalGeneration",
    "t5_1_0": "T5ForConditionalGeneration",
    "t5_1_1": "T5ForConditionalGeneration",
    "ul2": "T5ForConditionalGeneration",
    "umt5": "UMT5ForConditionalGeneration",
    "yi": "LlamaForCausalLM",
}
# transformers has no class that computes these.
NOT_THERE = {"chinchilla", "gemini_like", "glam", "gopher", "gpt3", "lamda", "palm"}
# Nor, of a family that is there, this size: a Switch with gated MLPs.
GATED_SWITCH = REPOSITORY / "gin/models/switch/xxl.gin"
MODELS = {
    path.name: [f for f in sorted(path.glob("*.gin")) if f.name != "base_config.gin"]
    for path in (REPOSITORY / "gin/models").iterdir()
}


@pytest.fixture(autouse=True)
def no_gin_left(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    yield
    gin.clear_config()


def test_the_list_above_is_complete():
    assert MODELS.keys() == WRITTEN_AS.keys() | NOT_THERE


def test_architectures_are_read_by_one_family():
    counts = Counter(a for family in registry.FAMILIES for a in family.architectures)
    assert set(counts.values()) == {1}


@pytest.mark.parametrize("name", WRITTEN_AS)
def test_every_size_is_written_and_read(name):
    """Every parameter and every layer of it is in the table once, every tensor too."""
    for file in (file for file in MODELS[name] if file != GATED_SWITCH):
        config = write_gin.build_model(file)
        family, config_json = registry.their_config(config)
        if file == MODELS[name][0]:
            assert config_json["architectures"] == [WRITTEN_AS[name]]
        table = transfers(family.entries(config), config)
        info = traverse_util.flatten_dict(ModelDef(config).param_info, sep="/")
        rows = Counter(slot for t in table for slot in t.ours)
        assert rows == Counter(slot for n, i in info.items() for slot in slots(n, i))
        tensors = Counter(n for t in table for n in t.theirs)
        assert set(tensors.values()) == {1}
        assert all(len(t.theirs_shapes(info)) == len(t.theirs) for t in table)
        again = family.from_config(ConfigJson(config_json, frozenset(tensors)))
        assert not list(registry.differences(again, config))


@pytest.mark.parametrize("name", [*sorted(NOT_THERE), "switch/xxl"])
def test_what_no_class_computes_is_refused(name):
    file = GATED_SWITCH if name not in NOT_THERE else MODELS[name][0]
    with pytest.raises(UserError, match="No architecture of Hugging Face that is known here"):
        registry.their_config(write_gin.build_model(file))


def test_the_family_of_the_carried_config_json_is_kept():
    config = write_gin.build_model("gin/models/phi3/mini_4k.gin")
    family = registry.find_family({"model_type": "phi3"})
    carried = family.to_config(config) | {"bos_token_id": 1, "pad_token_id": 32000}
    found, written = registry.their_config(config, carried=carried)
    assert found is family
    assert written == carried


def test_experts_that_no_family_has_are_refused():
    block = write_gin.build_model("gin/models/mixtral/8x7b.gin").block
    sizes = {"vocab_size": 8, "num_layers": 2}

    def model(**fields):
        return DecoderOnlyConfig(
            block=dataclasses.replace(block, mlp=dataclasses.replace(block.mlp, **fields)), **sizes
        )

    shared = {"shared_expert": block.mlp.expert}
    for config, match in (
        (model(router=SigmoidRouter(k=2)), r"mixtures of 8 experts; keep it in the format"),
        (model(router=TopKRouter(k=2)), r"mixtures of 8 experts \(nearest is Mixtral: .*scoring"),
        (model(**shared), r"nearest is Mixtral: block.mlp.shared_expert.* keep it in the format"),
        (DecoderOnlyConfig(block=block, leading_blocks=(block,), **sizes), r"1 leading_blocks"),
    ):
        with pytest.raises(UserError, match=match):
            registry.their_config(config)


def test_how_experts_are_run_and_balanced_is_no_difference():
    """A Switch that is trained with a capacity takes weights of one that has none."""
    config = write_gin.build_model("gin/models/switch/base_8.gin")
    _, written = registry.their_config(config)
    _, read = registry.our_config(written)
    assert read.block[1].mlp.dispatcher.kind == "dropless"
    assert read.block[1].mlp.router.jitter == config.block[1].mlp.router.jitter == 0.01
    assert not list(registry.differences(config, read))
    fewer = dataclasses.replace(read.block[1].mlp, num_experts=4)
    other = dataclasses.replace(read.block[1], mlp=fewer)
    changed = dataclasses.replace(read, block=(read.block[0], other))
    assert list(registry.differences(config, changed)) == ["block[1].mlp.num_experts is 8, there 4"]
