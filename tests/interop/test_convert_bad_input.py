"""What `convert` says to bad input: one line, exit code 2, and nothing is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts

from t5x_like.cli.main import main
from t5x_like.interop import convert

from .small_models import GPT2, T5, random_tensors, write_directory

TENSORS = random_tensors(T5)
WO = "encoder.block.0.layer.1.DenseReluDense.wo.weight"


@pytest.fixture
def refused(tmp_path, capsys):
    """Runs `convert` on a directory, expects that it is refused, and returns the line."""

    def refused(source: Path | str, *flags: str, target: Path | None = None) -> str:
        target = target or tmp_path / "target"
        existed = target.exists()
        before = sorted(p.name for p in tmp_path.iterdir())
        capsys.readouterr()
        assert main(["convert", f"--from={source}", f"--to={target}", *flags]) == 2
        message = capsys.readouterr().err
        assert message.startswith("t5x_like: error: ") and message.count("\n") == 1, message
        assert target.exists() == existed
        assert sorted(p.name for p in tmp_path.iterdir()) == before
        return message

    return refused


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("own")
    convert.from_hugging_face(write_directory(directory / "hf", T5, TENSORS), directory / "own")
    return directory / "own"


def test_every_wrong_tensor_is_listed(tmp_path, refused):
    tensors = dict(TENSORS)
    tensors["encoder.block.0.layer.1.DenseReluDense.w0.weight"] = tensors.pop(WO)
    tensors["shared.weight"] = np.zeros((64, 15), np.float32)
    tensors["extra.weight"] = np.zeros((2, 3), np.float32)
    message = refused(write_directory(tmp_path / "hf", T5, tensors))
    assert (
        f"missing {WO} (16, 24), nearest there: "
        "'encoder.block.0.layer.1.DenseReluDense.w0.weight'" in message
    )
    assert (
        "not in the model encoder.block.0.layer.1.DenseReluDense.w0.weight (16, 24), nearest "
        f"here: '{WO}'" in message
    )
    assert "not in the model extra.weight (2, 3)" in message
    assert "shared.weight is (64, 15) there, (64, 16) in the model" in message


def test_unknown_architectures(tmp_path, refused):
    source = write_directory(
        tmp_path / "hf", T5 | {"architectures": ["T5ForConditionalGenerations"]}, TENSORS
    )
    message = refused(source)
    assert "architecture 'T5ForConditionalGenerations' is not known. Did you mean" in message
    assert "LlamaForCausalLM" in message and "MT5ForConditionalGeneration" in message
    (source / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    assert "model_type 'mamba' is not known" in refused(source)
    (source / "config.json").write_text("{}")
    assert "model_type 'None' is not known" in refused(source)


@pytest.mark.parametrize("keep", [0, 4, 200, 0.5, 0.999])
def test_truncated_files(tmp_path, refused, keep):
    source = write_directory(tmp_path / "hf", T5, TENSORS)
    file = source / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    assert f"'{file}' is damaged or cut short" in refused(source)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_is_refused_by_name(tmp_path, refused, value):
    tensors = TENSORS | {WO: TENSORS[WO].copy()}
    tensors[WO][3, 2] = value
    source = write_directory(tmp_path / "hf", T5, tensors)
    assert f"Tensor '{WO}' of '{source}' holds NaN or infinite" in refused(source)


def test_nan_in_a_checkpoint_of_ours(own, tmp_path, refused):
    shutil.copytree(own, tmp_path / "copy")
    path = tmp_path / "copy/checkpoints/0/state/params.encoder.layers.mlp.wo.kernel/"
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(path)}}
    ts.open(spec, write=True).result()[1, 3, 2].write(np.float32(np.nan)).result()
    message = refused(tmp_path / "copy", "--format=hf")
    assert "Parameter 'encoder/layers/mlp/wo/kernel' (layer 1 of the stack)" in message
    assert "holds NaN or infinite values" in message


def test_pickles_are_never_read(tmp_path, refused):
    source = write_directory(tmp_path / "hf", T5, TENSORS)
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    (source / "training_args.bin").unlink()
    message = refused(source)
    assert "pickled weights only (pytorch_model.bin)" in message and "save_pretrained" in message
    (source / "pytorch_model.bin").unlink()
    assert "has no model.safetensors and no model.safetensors.index.json" in refused(source)


def test_a_target_with_something_in_it(own, tmp_path, refused):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    assert "exists and is not empty" in refused(own, "--format=hf", target=tmp_path / "full")
    file = tmp_path / "full/file"
    assert "exists and is not empty" in refused(own, "--format=hf", target=file)
    assert file.read_text() == "mine"
    assert main(["convert", f"--from={own}", "--to=gs://bucket/x", "--format=hf"]) == 2


def test_sources_that_are_none(own, tmp_path, refused):
    assert "is no directory that can be read; known kinds: t5x_like" in refused(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "has no checkpoint" in refused(tmp_path / "empty")
    assert "is a checkpoint of t5x_like: give --format=hf or t5x" in refused(own)


def test_flags(own, refused):
    assert "--dtype=float16 is not known: give float32 or" in refused(own, "--dtype=float16")
    assert "--format=orbax is not known" in refused(own, "--format=orbax")
    assert "--scanned is a layout of T5X" in refused(own, "--format=hf", "--scanned")
    message = refused(own.parent / "hf", "--model=gin/models/t5_1_1/small.gin")
    assert "--model is not needed" in message
    assert "not found; searched" in refused(own, "--format=hf", "--model=gin/absent.gin")


def test_the_model_of_a_checkpoint(own, tmp_path, refused):
    copy = tmp_path / "copy"
    shutil.copytree(own, copy)
    (copy / "model.gin").unlink()
    assert "has neither model.gin nor config.gin" in refused(copy, "--format=hf")
    message = refused(copy, "--format=hf", "--model=gin/models/t5_1_1/tiny.gin")
    assert "decoder/decoder_norm/scale is (16,) there, (256,) in the model" in message
    (tmp_path / "other.gin").write_text("VOCAB_SIZE = 3\n")
    message = refused(copy, "--format=hf", f"--model={tmp_path / 'other.gin'}")
    assert "defines no MODEL" in message


def test_a_damaged_checkpoint_of_ours(own, tmp_path, refused):
    copy = tmp_path / "copy"
    shutil.copytree(own, copy)
    chunk = copy / "checkpoints/0/state/params.encoder.layers.mlp.wo.kernel/1.0.0"
    chunk.write_bytes(chunk.read_bytes()[:100])
    message = refused(copy, "--format=hf")
    assert "Array 'params.encoder.layers.mlp.wo.kernel' of the checkpoint cannot be read" in message
    chunk.unlink()  # Not zeros.
    assert "wo.kernel' of the checkpoint cannot be read" in refused(copy, "--format=hf")


def test_tied_tensors_that_differ(tmp_path, refused):
    config = T5 | {"tie_word_embeddings": True}
    tensors = random_tensors(config)
    tensors["lm_head.weight"] = tensors["shared.weight"] + 1
    message = refused(write_directory(tmp_path / "hf", config, tensors))
    assert "Tensors 'shared.weight' and 'lm_head.weight'" in message and "differ" in message


def test_shards_and_index(tmp_path, refused):
    source = write_directory(tmp_path / "hf", T5, TENSORS, shards=3)
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["absent.weight"] = "model-00001-of-00003.safetensors"
    index.write_text(json.dumps(content))
    assert "lists what no file has: absent.weight" in refused(source)
    (source / "model-00002-of-00003.safetensors").unlink()
    assert "lacks files that its index names: model-00002-of-00003" in refused(source)
    index.write_text("[1]")
    assert "holds no JSON object" in refused(source)
    index.write_text("{")
    assert "is no JSON" in refused(source)
    index.write_text("{}")
    assert "has no 'weight_map'" in refused(source)


def test_types_of_numbers(tmp_path, refused):
    tensors = TENSORS | {WO: TENSORS[WO].astype(np.int8)}
    message = refused(write_directory(tmp_path / "hf", T5, tensors))
    assert f"{WO} (I8)" in message and "dequantise" in message


@pytest.mark.parametrize("value", [None, "three", -1, 0, 1.5, [2], {}, True])
def test_nonsense_in_config_json(tmp_path, refused, value):
    source = write_directory(tmp_path / "hf", T5, TENSORS)
    keys = ["vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_layers", "feed_forward_proj"]
    if value:  # Otherwise another key holds.
        keys += ["architectures", "num_decoder_layers"]
    for key in keys:
        (source / "config.json").write_text(json.dumps(T5 | {key: value}))
        refused(source)


def test_keys_that_are_not_there(tmp_path, refused):
    source = write_directory(tmp_path / "hf", T5, TENSORS)
    (source / "config.json").write_text(json.dumps({k: v for k, v in T5.items() if k != "d_ff"}))
    assert "config.json has no 'd_ff'" in refused(source)
    (source / "config.json").write_text(json.dumps(T5 | {"feed_forward_proj": "gated-mish"}))
    assert "activation 'mish' is not supported; known: gelu_new" in refused(source)


def test_models_that_another_system_does_not_have(tmp_path, refused):
    tensors = random_tensors(GPT2)
    convert.from_hugging_face(write_directory(tmp_path / "hf", GPT2, tensors), tmp_path / "gpt2")
    message = refused(tmp_path / "gpt2", "--format=t5x")
    assert "T5X has no model with decoder/decoder_norm/bias" in message
    text = (tmp_path / "gpt2/model.gin").read_text()
    (tmp_path / "gpt2/model.gin").write_text(text.replace("logits = 'tied'", "logits = 'dense'"))
    assert "is of another model: missing decoder/logits_dense" in refused(
        tmp_path / "gpt2", "--format=hf"
    )
    swapped = text.replace("kind = 'layer'", "kind = 'rms'")
    (tmp_path / "gpt2/model.gin").write_text(swapped)
    message = refused(tmp_path / "gpt2", "--format=hf")
    assert "No architecture of Hugging Face that is known here computes this model" in message
