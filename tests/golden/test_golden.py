"""What shipped gin files stand for, as text: parameters, shardings, macros.

`pytest tests/golden --update-golden` rewrites the files; read their diff before committing it.
"""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

from t5x_like.config import gin_config
from t5x_like.models.base import ModelDef, ParamInfo
from t5x_like.parallel import logical
from t5x_like.parallel.mesh import MeshConfig
from t5x_like.training.flops import named_leaves
from t5x_like.training.run import TrainRun

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MESH = {"fsdp": 2, "tensor": 2}
RECIPES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("gin/recipes/*.gin"))
# One size a family; a model is completed to a run by what its kind of recipe includes.
SEQ2SEQ, LM = "gin/objectives/seq2seq.gin", "gin/objectives/causal_lm.gin"
MASKED_LM = "gin/objectives/masked_lm.gin"
MODELS = {
    **{
        f"gin/models/{name}.gin": SEQ2SEQ
        for name in (
            *("byt5/small", "flan_t5/base", "longt5/tglobal_base", "mt5/small", "t5_1_0/small"),
            *("switch/base_8", "t5_1_1/small", "ul2/20b", "umt5/small"),
        )
    },
    **{
        f"gin/models/{name}.gin": LM
        for name in (
            *("chinchilla/70b", "falcon/40b", "gemma1/2b", "gemma2/2b", "gemma3/1b", "gopher/44m"),
            *("deepseek_v2/lite", "deepseek_v3/v3"),
            *("gpt1/117m", "gpt2/1_3b", "gpt3/small", "gpt_j/6b", "gpt_neox/pythia_14m"),
            *("lamda/2b", "llama1/7b", "llama2/70b", "llama3/8b", "llama3_1/405b", "llama3_2/1b"),
            *("mistral/7b_v0_1", "palm/8b", "phi3/mini_128k", "qwen1_5/0_5b", "qwen2_5/0_5b"),
            *("gemini_like/small", "glam/0_1b_64e", "mixtral/8x7b", "qwen3_moe/30b_a3b"),
            *("qwen3/0_6b", "yi/6b"),
        )
    },
    **{f"gin/models/{name}.gin": MASKED_LM for name in ("bert/base", "roberta/base")},
}
# The published size of a vocabulary that the tensor axis below does not divide, rounded up.
VOCAB_SIZE = {"gpt1/117m": 40_480, "gpt3/small": 50_304, "roberta/base": 50_304}
RUN = ["gin/optimizers/adafactor.gin", "gin/parallel/data.gin", "gin/runs/pretrain.gin"]
RUN_MACROS = {
    "MODEL_DIR": "MODEL_DIR",
    "MIXTURE_OR_TASK_NAME": "task",
    "TASK_FEATURE_LENGTHS": "{'inputs': 512, 'targets': 114}",
    "TRAIN_STEPS": "10000",
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe(recipe: str, request: pytest.FixtureRequest) -> None:
    config = gin_config.parse([recipe], ["MODEL_DIR=MODEL_DIR"])
    compare(recipe, describe(config), request)


@pytest.mark.parametrize("model", MODELS)
def test_model(model: str, request: pytest.FixtureRequest) -> None:
    macros = dict(RUN_MACROS)
    if (size := VOCAB_SIZE.get(model.removeprefix("gin/models/").removesuffix(".gin"))) is not None:
        macros["VOCAB_SIZE"] = str(size)
    bindings = [f"{name}={value}" for name, value in macros.items()]
    config = gin_config.parse([model, MODELS[model], *RUN], bindings)
    compare(model, describe(config), request)


def test_every_family_has_a_golden_file() -> None:
    families = {path.name for path in (ROOT / "gin/models").iterdir()}
    assert families == {Path(model).parent.name for model in MODELS}
    expected = {golden_file(gin_file).name for gin_file in (*RECIPES, *MODELS)}
    assert {path.name for path in HERE.glob("*.txt")} == expected, "left over, or to be made"


def describe(config: gin_config.GinConfig) -> str:
    """One line a parameter, with its partition on four devices; then the macros."""
    run = config.build(TrainRun)
    model = ModelDef(run.model)
    mesh = MeshConfig(ici=MESH).build(jax.devices()[:4])
    shardings = dict(named_leaves(logical.param_shardings(mesh, run.rules, model.param_info)))
    rows = [
        (path, f"{info.dtype} [{_dims(info)}]", f"{tuple(shardings[path].spec)}")
        for path, info in named_leaves(model.param_info)
    ]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"{p:<{widths[0]}}  {array:<{widths[1]}}  {spec}" for p, array, spec in rows]
    macros = config.statements.macros()
    return "\n".join(
        [
            f"Parameters, and their partition on {MESH}",
            "",
            *lines,
            "",
            f"{model.num_params:,} parameters",
            "",
            "Macros",
            "",
            *(f"{name} = {macros[name].value!r}" for name in sorted(macros)),
            "",
        ]
    )


def _dims(info: ParamInfo) -> str:
    return ", ".join(f"{a} {n}" for a, n in zip(info.logical_axes, info.shape, strict=True))


def golden_file(gin_file: str) -> Path:
    """gin/models/t5_1_1/small.gin -> models.t5_1_1.small.txt"""
    name = Path(gin_file).relative_to("gin").with_suffix(".txt")
    return HERE / ".".join(name.parts)


def compare(gin_file: str, text: str, request: pytest.FixtureRequest) -> None:
    path = golden_file(gin_file)
    if request.config.getoption("--update-golden", default=False):
        path.write_text(text)
    assert path.exists(), "no golden file: run pytest tests/golden --update-golden"
    assert text.splitlines() == path.read_text().splitlines()
