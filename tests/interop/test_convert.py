"""Conversion between Hugging Face's form and ours, through the command line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import traverse_util
from safetensors.numpy import load_file

from t5x_like.cli.main import main
from t5x_like.config import write_gin
from t5x_like.interop import arrays, convert, own
from t5x_like.interop.hugging_face.checkpoint import load_params
from t5x_like.interop.hugging_face.tensor_files import SINGLE, TensorFiles
from t5x_like.interop.initial import initial_step, load_initial_params
from t5x_like.models.base import ModelDef

from .small_models import GEMMA2, GPT2, T5, as_bfloat16, random_tensors, write_directory


def run(source: Path, target: Path, *flags: str) -> None:
    assert main(["convert", f"--from={source}", f"--to={target}", *flags]) == 0


def flat(tree: dict) -> dict[str, Any]:
    return traverse_util.flatten_dict(tree, sep="/")


def read(directory: Path) -> dict[str, np.ndarray]:
    files = TensorFiles(directory)
    return {name: files.read(name) for name in files.specs}


def assert_same(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert actual[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize("config", [T5, GEMMA2, GPT2], ids=["t5", "gemma2", "gpt2"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_there_and_back_is_bit_identical(tmp_path, config, shards, dtype):
    """The model of Gemma 2 is a repeated pattern with one layer left over."""
    tensors = random_tensors(config, dtype=dtype)
    source = write_directory(tmp_path / "hf", config, tensors, shards=shards)
    run(source, tmp_path / "own")
    run(tmp_path / "own", tmp_path / "back", "--format=hf")
    assert_same(read(tmp_path / "back"), tensors)
    written = json.loads((tmp_path / "back/config.json").read_text())
    names = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}
    assert written.pop("torch_dtype") == names[np.dtype(dtype).name]
    assert config.items() <= written.items()
    for directory in ("own", "back"):
        assert (tmp_path / directory / "tokenizer.json").read_text() == '{"a tokenizer": 1}'
        assert (tmp_path / directory / "spiece.model").read_bytes() == b"\x00\xff model"
        assert not (tmp_path / directory / "training_args.bin").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "hf", "own"]


@pytest.fixture(scope="module")
def t5(tmp_path_factory) -> dict[str, Any]:
    """A T5 in Hugging Face's form and in ours, and its tensors."""
    directory = tmp_path_factory.mktemp("t5")
    tensors = random_tensors(T5)
    hf = write_directory(directory / "hf", T5, tensors)
    weights = convert.from_hugging_face(hf, directory / "own")
    return {"hf": hf, "own": directory / "own", "tensors": tensors, "config": weights.config}


def test_our_names_and_layers(t5):
    params = flat(load_initial_params(t5["own"], ModelDef(t5["config"]).param_info))
    tensors = t5["tensors"]
    for layer in range(3):
        expected = tensors[f"encoder.block.{layer}.layer.1.DenseReluDense.wi_1.weight"].T
        np.testing.assert_array_equal(params["encoder/layers/mlp/wi_1/kernel"][layer], expected)
    expected = tensors["decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"].T
    np.testing.assert_array_equal(params["decoder/relpos_bias/rel_embedding"], expected)


def test_orbax_reads_what_it_did_not_write(t5):
    """By its own names, shapes and dtypes, and with the metadata beside."""
    step_dir = own.find_own_checkpoint(t5["own"])
    assert (step_dir.name, initial_step(t5["own"])) == ("0", 0)
    info = flat(ModelDef(t5["config"]).param_info)
    with ocp.CheckpointManager(
        t5["own"] / "checkpoints",
        item_handlers={
            "state": ocp.PyTreeCheckpointHandler(),
            "metadata": ocp.JsonCheckpointHandler(),
        },
    ) as manager:
        saved = flat(manager.item_metadata(0)["state"].tree["params"])
        restored = manager.restore(
            0,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(), metadata=ocp.args.JsonRestore()
            ),
        )
    assert {n: (tuple(m.shape), m.dtype) for n, m in saved.items()} == {
        n: (i.shape, np.float32) for n, i in info.items()
    }
    assert restored["state"]["step"] == 0
    assert restored["metadata"]["gin"] == (t5["own"] / "model.gin").read_text()
    expected = flat(load_params(t5["hf"], ModelDef(t5["config"]).param_info))
    for name, value in flat(restored["state"]["params"]).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


@pytest.mark.parametrize("kind", ["own", "hf"])
def test_onto_a_mesh(t5, kind):
    """A changed mesh is invisible: any sharding of any form gives the same numbers."""
    info = ModelDef(t5["config"]).param_info
    whole = load_initial_params(t5[kind], info)
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"))
    shardings = jax.tree.map(
        lambda i: jax.NamedSharding(
            mesh, jax.P(*[None] * (len(i.shape) - 1), None if i.shape[-1] % 4 else "fsdp")
        ),
        info,
    )
    sharded = load_initial_params(t5[kind], info, shardings=shardings)
    assert jax.tree.map(lambda x: x.sharding, sharded) == shardings
    jax.tree.map(np.testing.assert_array_equal, sharded, whole)


def test_model_gin_is_the_model(t5):
    assert write_gin.build_model(t5["own"] / "model.gin") == t5["config"]
    assert t5["config"].block.mlp.activations == ("gelu", "linear")


def test_dtype(t5, tmp_path):
    run(t5["hf"], tmp_path / "own16", "--dtype=bfloat16")
    run(tmp_path / "own16", tmp_path / "hf16", "--format=hf")
    assert_same(read(tmp_path / "hf16"), as_bfloat16(t5["tensors"]))
    run(tmp_path / "own16", tmp_path / "hf32", "--format=hf", "--dtype=float32")
    widened = {n: v.astype(np.float32) for n, v in as_bfloat16(t5["tensors"]).items()}
    assert_same(read(tmp_path / "hf32"), widened)
    params = load_initial_params(tmp_path / "own16", ModelDef(t5["config"]).param_info)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))


def test_large_arrays_in_blocks_and_shards(tmp_path, monkeypatch):
    """As above, with every size limit so small that all code for large arrays runs."""
    monkeypatch.setattr(arrays, "BLOCK_BYTES", 256)
    tensors = random_tensors(T5)
    source = write_directory(tmp_path / "hf", T5, tensors)
    weights = convert.from_hugging_face(source, tmp_path / "own")
    kernel = tmp_path / "own/checkpoints/0/state/params.encoder.layers.mlp.wi_0.kernel"
    assert json.loads((kernel / ".zarray").read_text())["chunks"] == [1, 2, 24]
    (tmp_path / "back").mkdir()
    opened = convert.open_weights(tmp_path / "own")
    convert._write_hugging_face(opened, tmp_path / "back", dtype=None, shard_bytes=10_000)
    index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    files = sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors" and len(files) > 3
    for file in files:  # The library's own reader agrees.
        for name, value in load_file(tmp_path / "back" / file).items():
            np.testing.assert_array_equal(value, tensors[name])
            assert index["weight_map"][name] == file
    assert_same(read(tmp_path / "back"), tensors)
    assert weights.step == 0


def test_tied_weights_that_are_there_twice(tmp_path):
    """Other writers repeat tied tensors, or write them under their other name only."""
    config = T5 | {"tie_word_embeddings": True}
    tensors = random_tensors(config)
    assert "lm_head.weight" not in tensors
    twice = tensors | {"lm_head.weight": tensors["shared.weight"].copy()}
    run(write_directory(tmp_path / "hf", config, twice), tmp_path / "own")
    other = dict(tensors)
    other["decoder.embed_tokens.weight"] = other.pop("shared.weight")
    run(write_directory(tmp_path / "hf2", config, other), tmp_path / "own2")
    for directory in ("own", "own2"):
        run(tmp_path / directory, tmp_path / f"{directory}_back", "--format=hf")
        assert_same(read(tmp_path / f"{directory}_back"), tensors)


def test_buffers_are_ignored(tmp_path):
    tensors = random_tensors(GPT2)
    buffers = {f"h.{i}.attn.bias": np.ones((1, 1, 32, 32), np.uint8) for i in range(3)}
    bare = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    run(write_directory(tmp_path / "hf", GPT2, bare | buffers), tmp_path / "own")
    run(tmp_path / "own", tmp_path / "back", "--format=hf")
    assert_same(read(tmp_path / "back"), tensors)


def test_an_empty_directory_may_be_the_target(t5, tmp_path):
    (tmp_path / "own").mkdir()
    run(t5["hf"], tmp_path / "own")
    assert (tmp_path / "own/model.gin").is_file()
    run(t5["hf"], tmp_path / "new/deep/own")
    assert (tmp_path / "new/deep/own/model.gin").is_file()


def test_hugging_face_to_hugging_face(t5, tmp_path):
    run(t5["hf"], tmp_path / "hf16", "--format=hf", "--dtype=bfloat16")
    assert_same(read(tmp_path / "hf16"), as_bfloat16(t5["tensors"]))
    assert (tmp_path / "hf16" / SINGLE).is_file()


def test_a_model_that_no_shape_tells_apart(t5, caplog):
    """Training from other activations goes on, with a warning."""
    info = ModelDef(t5["config"]).param_info
    load_initial_params(t5["hf"], info, config=t5["config"])
    assert not caplog.records
    mlp = dataclasses.replace(t5["config"].block.mlp, activations=("silu", "linear"))
    block = dataclasses.replace(t5["config"].block, mlp=mlp)
    other = dataclasses.replace(t5["config"], block=block, dtype="bfloat16")
    load_initial_params(t5["hf"], info, config=other)
    assert caplog.messages == [
        f"The model is not quite that of '{t5['hf']}': block.mlp.activations[0] is 'silu', there "
        "'gelu'"
    ]
