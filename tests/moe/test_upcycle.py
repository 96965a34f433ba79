"""A model with experts that starts as copies of a dense one."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from t5x_like.errors import UserError
from t5x_like.interop.hugging_face.checkpoint import HuggingFaceCheckpoint, load_params
from t5x_like.layers.attention import AttentionConfig
from t5x_like.layers.mlp import MlpConfig
from t5x_like.layers.moe.layer import MoeConfig
from t5x_like.layers.moe.routers import TopKRouter
from t5x_like.models.base import ModelDef
from t5x_like.models.block import BlockConfig
from t5x_like.models.decoder_only import DecoderOnlyConfig
from t5x_like.models.encoder_decoder import EncoderDecoderConfig
from t5x_like.parallel.mesh import MeshConfig
from t5x_like.training.checkpoints import flatten
from t5x_like.training.optimizers.adamw import AdamWConfig
from t5x_like.training.state import TrainState
from t5x_like.training.upcycle import copies, dense_twin, upcycled

from ..interop.small_models import GPT2, random_tensors, write_directory
from .conftest import RULES

DENSE = BlockConfig(
    embed_dim=8, attention=AttentionConfig(num_heads=2, head_dim=4), mlp=MlpConfig(mlp_dim=16)
)
SPARSE = dataclasses.replace(
    DENSE, mlp=MoeConfig(num_experts=4, expert=DENSE.mlp, router=TopKRouter(k=2, renormalize=True))
)

LOCAL, LOCAL_SPARSE = (
    dataclasses.replace(b, attention=dataclasses.replace(b.attention, window=4))
    for b in (DENSE, SPARSE)
)
FOUR = (LOCAL, DENSE, LOCAL_SPARSE, SPARSE)


def decoder(**settings: Any) -> DecoderOnlyConfig:
    return DecoderOnlyConfig(**{"vocab_size": 32, "num_layers": 3, "dtype": "float32", **settings})


def test_dense_twin():
    plain = decoder(block=DENSE)
    assert dense_twin(decoder(block=SPARSE)) == plain
    assert dense_twin(decoder(block=(DENSE, SPARSE), leading_blocks=(DENSE,))) == plain
    wide = dataclasses.replace(DENSE, mlp=MlpConfig(mlp_dim=32))
    assert dense_twin(decoder(block=SPARSE, leading_blocks=(wide,))) == decoder(
        block=DENSE, leading_blocks=(wide,)
    )
    assert dense_twin(decoder(block=FOUR)) == decoder(block=(FOUR[0], DENSE))
    both = EncoderDecoderConfig(
        vocab_size=32,
        num_encoder_layers=2,
        num_decoder_layers=2,
        block=(DENSE, SPARSE),
        encoder_block=SPARSE,
    )
    twin = dense_twin(both)
    assert (twin.block, twin.encoder_block) == (DENSE, None)


@pytest.mark.parametrize(
    "settings",
    [
        {"block": (DENSE, SPARSE), "num_layers": 5},
        {"block": SPARSE, "leading_blocks": (DENSE,)},
        {"block": FOUR, "num_layers": 7},
        {"block": SPARSE, "future_depth": 1},
    ],
    ids=["every other", "all but the first", "a longer pattern", "multi-token prediction"],
)
def test_copies_go_to_their_layers(settings):
    """With weights that add up to one the model is the dense one, to 1e-5 of the largest logit."""
    config = decoder(**settings)
    dense, sparse = ModelDef(dense_twin(config)), ModelDef(config)
    theirs, fresh = (jax.jit(m.init)(jax.random.key(i)) for i, m in enumerate((dense, sparse)))
    wanted = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        for name, x in flatten(fresh).items()
    }
    given = copies(wanted, flatten(theirs), config=config, twin=dense.config)
    assert all("/mlp/router/" in name for name in wanted.keys() - given.keys())
    leaves = [given.get(name, x) for name, x in flatten(fresh).items()]
    params = jax.tree.unflatten(jax.tree.structure(fresh), leaves)
    tokens = np.random.default_rng(0).integers(1, 32, (2, 9))
    batch = {"decoder_input_tokens": tokens, "decoder_target_tokens": tokens}
    expected = np.asarray(dense.bind(theirs)(batch))
    bound = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(sparse.bind(params)(batch), expected, rtol=0, atol=bound)


def test_from_hugging_face(tmp_path):
    """Biases too; a checkpoint that has no optimizer state says so."""
    directory = write_directory(tmp_path / "gpt2", GPT2, random_tensors(GPT2))
    plain = dataclasses.replace(HuggingFaceCheckpoint(directory).config, dtype="float32")
    experts = dataclasses.replace(SPARSE.mlp, expert=plain.block.mlp)
    config = dataclasses.replace(plain, block=dataclasses.replace(plain.block, mlp=experts))
    dense, sparse = ModelDef(plain), ModelDef(config)
    mesh = MeshConfig().build(jax.devices()[:1])
    fresh = jax.jit(sparse.init)(jax.random.key(0))
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), fresh
    )
    run = SimpleNamespace(
        model=config, initial_checkpoint_path=str(directory), upcycle="params", rules=RULES
    )
    state = TrainState(step=jax.ShapeDtypeStruct((), np.int32), params=shapes, opt_state={})
    built: Any = SimpleNamespace(run=run, mesh=mesh, abstract_state=state)
    given = upcycled(built)
    leaves = [given.get(f"params/{name}", x) for name, x in flatten(fresh).items()]
    params = jax.tree.unflatten(jax.tree.structure(fresh), leaves)
    tokens = np.random.default_rng(0).integers(1, 64, (2, 9))
    batch = {"decoder_input_tokens": tokens, "decoder_target_tokens": tokens}
    expected = np.asarray(dense.bind(load_params(directory, dense.param_info))(batch))
    bound = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(sparse.bind(params)(batch), expected, rtol=0, atol=bound)
    run.upcycle, run.frozen, run.optimizer = "state", (), AdamWConfig()
    with pytest.raises(UserError, match="no optimizer state to copy: set UPCYCLE = 'params'"):
        upcycled(built)
