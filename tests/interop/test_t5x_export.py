"""Checkpoints written as T5X writes them: compared with T5X's own, byte by byte."""

from __future__ import annotations

import filecmp
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from flax import serialization, traverse_util

from t5x_like.cli.main import main
from t5x_like.config import write_gin
from t5x_like.errors import UserError
from t5x_like.interop import t5x_export
from t5x_like.interop.hugging_face.tensor_files import TensorFiles
from t5x_like.interop.initial import initial_step, load_initial_params
from t5x_like.interop.t5x_legacy import load_t5x_checkpoint, open_t5x_checkpoint
from t5x_like.models.base import ModelDef

MODEL = """
from __gin__ import dynamic_registration
from t5x_like.layers import attention
from t5x_like.layers import mlp
from t5x_like.models import block
from t5x_like.models import encoder_decoder
include 'gin/models/t5_1_1/base_config.gin'
VOCAB_SIZE = 256
block.BlockConfig.embed_dim = 32
attention.AttentionConfig.num_heads = 4
attention.AttentionConfig.head_dim = 8
mlp.MlpConfig.mlp_dim = 64
encoder_decoder.EncoderDecoderConfig.num_encoder_layers = 2
encoder_decoder.EncoderDecoderConfig.num_decoder_layers = 2
"""
# T5X's decoder_only example: a table of relative positions in every layer.
DECODER_ONLY = """
from __gin__ import dynamic_registration
from t5x_like.layers import attention
from t5x_like.layers import mlp
from t5x_like.layers import positions
from t5x_like.models import block
from t5x_like.models import decoder_only
MODEL = @decoder_only.DecoderOnlyConfig()
decoder_only.DecoderOnlyConfig:
  vocab_size = 64
  block = @block.BlockConfig()
  positions = @positions.RelativePositionsConfig()
  num_layers = 3
block.BlockConfig:
  embed_dim = 32
  attention = @attention.AttentionConfig()
  mlp = @mlp.MlpConfig()
attention.AttentionConfig.num_heads = 4
attention.AttentionConfig.head_dim = 8
mlp.MlpConfig.mlp_dim = 64
positions.RelativePositionsConfig.per_layer = {per_layer}
"""


@pytest.fixture(scope="module")
def tiny(oracle_dir: Path) -> Path:
    return oracle_dir / "t5_1_1_tiny"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    file = tmp_path / "oracle.gin"
    file.write_text(MODEL)
    return file


def run(source: Path, target: Path, *flags: str) -> None:
    assert main(["convert", f"--from={source}", f"--to={target}", *flags]) == 0


def files(directory: Path) -> list[str]:
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())


def flat(tree: dict) -> dict[str, Any]:
    return traverse_util.flatten_dict(tree, sep="/")


def assert_same(a: dict, b: dict) -> None:
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize(
    ("oracle", "chunk_bytes"),
    [
        ("legacy_trained/checkpoint_1500", None),
        ("legacy_bf16/checkpoint_20", None),
        ("legacy_multichunk/checkpoint_20", 6144),
    ],
)
def test_files_are_those_of_t5x(tiny, model, tmp_path, monkeypatch, oracle, chunk_bytes):
    """The same tree, dtypes, chunks and compressor, the msgpack file included."""
    if chunk_bytes:
        monkeypatch.setattr(t5x_export, "CHUNK_BYTES", chunk_bytes)
    run(tiny / oracle, tmp_path / "own", f"--model={model}")
    run(tmp_path / "own", tmp_path / "t5x", "--format=t5x")
    written = tmp_path / "t5x" / Path(oracle).name
    names = files(tiny / oracle)
    assert files(written) == names and len(names) > 50
    match, mismatch, errors = filecmp.cmpfiles(written, tiny / oracle, names, shallow=False)
    assert (mismatch, errors) == ([], []) and len(match) == len(names)


@pytest.mark.parametrize("layout", ["legacy", "orbax", "legacy_factored8"])
def test_parameters_of_a_train_state(tiny, model, tmp_path, layout):
    """Parameters and step go there and back; the optimizer's state stays behind."""
    run(tiny / layout, tmp_path / "own", f"--model={model}")
    assert initial_step(tmp_path / "own") == 20
    run(tmp_path / "own", tmp_path / "t5x", "--format=t5x")
    again, before = load_t5x_checkpoint(tmp_path / "t5x"), load_t5x_checkpoint(tiny / layout)
    assert (again.step, again.opt_state) == (20, None)
    assert_same(again.params, before.params)


def test_scanned(tiny, model, tmp_path):
    source = tiny / "legacy_trained"
    run(source, tmp_path / "own", f"--model={model}")
    run(tmp_path / "own", tmp_path / "t5x", "--format=t5x", "--scanned")
    scanned = flat(load_t5x_checkpoint(tmp_path / "t5x").params)
    plain = flat(load_t5x_checkpoint(source).params)
    # As T5X's scalable_t5 has them: layers on axis 1, heads and head_dim apart.
    shapes = {
        "encoder/encoder/attention/query/kernel": (32, 2, 4, 8),
        "decoder/decoder/encoder_decoder_attention/out/kernel": (4, 2, 8, 32),
        "decoder/decoder/mlp/wi_1/kernel": (32, 2, 64),
        "encoder/encoder/pre_mlp_layer_norm/scale": (32, 2),
        "encoder/encoder/relpos_bias/rel_embedding": (4, 2, 32),
        "decoder/logits_dense/kernel": (32, 256),
    }
    assert {name: scanned[name].shape for name in shapes} == shapes
    np.testing.assert_array_equal(
        scanned["decoder/decoder/self_attention/query/kernel"][:, 1].reshape(32, 32),
        plain["decoder/layers_1/self_attention/query/kernel"],
    )
    for layer in (0, 1):
        np.testing.assert_array_equal(
            scanned["decoder/decoder/relpos_bias/rel_embedding"][:, layer],
            plain["decoder/relpos_bias/rel_embedding"],
        )
    run(tmp_path / "t5x", tmp_path / "own2", f"--model={model}")
    info = ModelDef(write_gin.build_model(model)).param_info
    params = [load_initial_params(tmp_path / d, info) for d in ("own", "own2", "t5x")]
    assert_same(params[1], params[0])
    assert_same(params[2], params[0])


def test_tables_that_differ_between_layers(tiny, model, tmp_path):
    run(tiny / "legacy_trained", tmp_path / "t5x", f"--model={model}", "--format=t5x", "--scanned")
    path = "checkpoint_1500/target.encoder.encoder.relpos_bias.rel_embedding/"
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{tmp_path}/t5x/{path}"}}
    ts.open(spec, write=True).result()[0, 1, 0].write(np.float32(5)).result()
    info = ModelDef(write_gin.build_model(model)).param_info
    with pytest.raises(UserError, match=r"different tables.*per_layer = True"):
        load_initial_params(tmp_path / "t5x", info)


@pytest.mark.parametrize("per_layer", [True, False])
def test_decoder_only(tmp_path, per_layer):
    file = tmp_path / "decoder.gin"
    file.write_text(DECODER_ONLY.format(per_layer=per_layer))
    model = ModelDef(write_gin.build_model(file))
    params = model.init(jax.random.key(0))
    with ocp.CheckpointManager(tmp_path / "own/checkpoints") as manager:
        state = ocp.args.PyTreeSave({"params": params, "step": np.int32(7)})
        manager.save(7, args=ocp.args.Composite(state=state))
    run(tmp_path / "own", tmp_path / "t5x", "--format=t5x", f"--model={file}")
    tree = flat(load_t5x_checkpoint(tmp_path / "t5x/checkpoint_7").params)
    # T5X keeps the embedding of this model inside the decoder, and tables in the layers.
    assert tree["decoder/token_embedder/embedding"].shape == (64, 32)
    assert [tree[f"decoder/layers_{i}/relpos_bias/rel_embedding"].shape for i in range(3)] == [
        (4, 32)
    ] * 3
    assert not any(name.startswith(("token_embedder", "decoder/relpos")) for name in tree)
    assert_same(load_initial_params(tmp_path / "t5x", model.param_info), params)
    run(tmp_path / "t5x", tmp_path / "again", f"--model={file}")
    assert_same(load_initial_params(tmp_path / "again", model.param_info), params)
    code = main(
        ["convert", f"--from={tmp_path / 'own'}", f"--to={tmp_path / 'no'}", "--format=t5x",
         f"--model={file}", "--scanned"]
    )  # fmt: skip
    assert code == 2


def test_a_trainers_checkpoint_of_whole_stacks(tiny, model, tmp_path):
    """Orbax's chunks hold all layers; they come out as those of the source."""
    info = ModelDef(write_gin.build_model(model)).param_info
    params = jax.tree.map(jax.numpy.asarray, load_initial_params(tiny / "legacy_trained", info))
    with ocp.CheckpointManager(tmp_path / "run/checkpoints") as manager:
        state = {"params": params, "opt_state": {"count": np.int32(3)}, "step": np.int32(3)}
        manager.save(3, args=ocp.args.Composite(state=ocp.args.PyTreeSave(state)))
    (tmp_path / "run/config.gin").write_text(MODEL)
    for source in ("run", "run/checkpoints", "run/checkpoints/3"):
        target = tmp_path / f"hf_{source.count('/')}"
        run(tmp_path / source, target, "--format=hf")
    run(tiny / "legacy_trained", tmp_path / "direct", f"--model={model}", "--format=hf")
    expected, actual = (TensorFiles(tmp_path / name) for name in ("direct", "hf_0"))
    assert actual.specs == expected.specs
    assert all(actual.equals(name, expected.read(name)) for name in expected.specs)


def test_chunks_of_large_arrays():
    """The cases of T5X's own test of its choice."""
    assert t5x_export.chunk_shape((8192, 8192), 4096 * 4096) == [4096, 4096]
    assert t5x_export.chunk_shape((8192, 8193), 4096 * 4096) == [4096, 2731]
    assert t5x_export.chunk_shape((8193,), 4096) == [2731]


def test_without_a_model(tiny, tmp_path, capsys):
    assert main(["convert", f"--from={tiny / 'legacy'}", f"--to={tmp_path / 'own'}"]) == 2
    assert "give --model=FILE.gin" in capsys.readouterr().err
    assert not (tmp_path / "own").exists()


def test_a_damaged_array(tiny, model, tmp_path, capsys):
    run(tiny / "legacy_trained", tmp_path / "t5x", f"--model={model}", "--format=t5x")
    array = tmp_path / "t5x/checkpoint_1500/target.encoder.layers_1.mlp.wo.kernel"
    (array / "0.0").unlink()
    arguments = [f"--from={tmp_path / 't5x'}", f"--to={tmp_path / 'own'}", f"--model={model}"]
    assert main(["convert", *arguments]) == 2
    assert "Array 'target/encoder/layers_1/mlp/wo/kernel'" in capsys.readouterr().err
    assert not (tmp_path / "own").exists()


def test_the_msgpack_file_is_small(tiny, model, tmp_path):
    """Every array is in its zarr directory; the file holds specifications."""
    run(tiny / "legacy_bf16", tmp_path / "t5x", f"--model={model}", "--format=t5x")
    content = serialization.msgpack_restore(
        (tmp_path / "t5x/checkpoint_20/checkpoint").read_bytes()
    )
    table = content["optimizer"]["target"]["token_embedder"]["embedding"]
    assert table["dtype"] == "bfloat16" and table["metadata"]["shape"] == [256, 32]
    zarr = tmp_path / "t5x/checkpoint_20/target.token_embedder.embedding/.zarray"
    assert json.loads(zarr.read_text())["dtype"] == "bfloat16"
    assert open_t5x_checkpoint(tmp_path / "t5x").step == 20
