"""A model config written as gin gives the same config."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import gin
import pytest

from t5x_like.config import write_gin
from t5x_like.errors import UserError

REPOSITORY = Path(__file__).parents[2]
SHIPPED = sorted(
    str(path.relative_to(REPOSITORY))
    for path in (REPOSITORY / "gin/models").rglob("*.gin")
    if path.name != "base_config.gin"
)


@pytest.fixture(autouse=True)
def no_gin_left(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    yield
    gin.clear_config()


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_model(name, tmp_path):
    """Patterns, several norms, encoder blocks, rotary scalings: all that the shipped files have."""
    config = write_gin.build_model(name)
    (tmp_path / "model.gin").write_text(write_gin.model_text(config, comment=name))
    assert write_gin.build_model(tmp_path / "model.gin") == config


def test_values_that_only_training_uses(tmp_path):
    config = write_gin.build_model("gin/models/gpt2/tiny.gin")
    config = dataclasses.replace(config, remat="save:query,key", scan_unroll=2, dtype="bfloat16")
    (tmp_path / "model.gin").write_text(write_gin.model_text(config, comment="x"))
    assert write_gin.build_model(tmp_path / "model.gin") == config


def test_macros_of_recipes(tmp_path):
    """What a recipe or a command line sets reaches the model."""
    file = tmp_path / "model.gin"
    text = write_gin.model_text(write_gin.build_model("gin/models/gemma2/2b.gin"), comment="x")
    file.write_text(text)
    (tmp_path / "after.gin").write_text(
        f"include '{file}'\nDROPOUT_RATE = 0.25\nDTYPE = 'float16'\nVOCAB_SIZE = 99\nREMAT = 'full'"
    )
    config = write_gin.build_model(tmp_path / "after.gin")
    assert {block.dropout_rate for block in config.block} == {0.25}
    assert (config.dtype, config.vocab_size, config.remat) == ("float16", 99, "full")


def test_the_operative_config_of_a_run(tmp_path):
    """Its bindings are in the scope of the macro."""
    expected = write_gin.build_model("gin/models/longt5/tglobal_base.gin")
    (tmp_path / "config.gin").write_text(operative("gin/models/longt5/tglobal_base.gin"))
    assert write_gin.build_model(tmp_path / "config.gin") == expected


@gin.configurable
def model_of_a_run(model=gin.REQUIRED):
    return model


def operative(name: str) -> str:
    """What a run that uses %MODEL leaves in config.gin, without the run."""
    gin.clear_config()
    gin.parse_config_files_and_bindings([name], ["model_of_a_run.model = %MODEL"])
    model_of_a_run()
    lines = gin.operative_config_str().splitlines()
    return "\n".join(line for line in lines if "model_of_a_run" not in line)


@pytest.mark.parametrize("text", ["VOCAB_SIZE = 3", "MODEL = 'gpt2'", "MODEL = None"])
def test_no_model(tmp_path, text):
    (tmp_path / "x.gin").write_text(text)
    with pytest.raises(UserError, match="defines no MODEL = @"):
        write_gin.build_model(tmp_path / "x.gin")
