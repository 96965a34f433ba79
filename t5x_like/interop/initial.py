"""The parameters a run starts from: INITIAL_CHECKPOINT_PATH, whatever system wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util

from t5x_like.errors import UserError
from t5x_like.interop import matching, t5x_legacy
from t5x_like.interop.hugging_face import checkpoint as hugging_face
from t5x_like.interop.own import find_own_checkpoint, unknown_checkpoint


def load_initial_params(
    path: str | epath.Path,
    param_info: Mapping[str, Any],
    *,
    shardings: Mapping[str, Any] | None = None,
    config: Any = None,
) -> dict[str, Any]:
    """Reads only the parameters of a checkpoint, in the names, shapes and dtypes of the model.

    Args:
      path: a checkpoint of this system (`MODEL_DIR`, `MODEL_DIR/checkpoints` or one step in it),
        of T5X, legacy or Orbax (a model directory or one `checkpoint_<step>`), the latest step
        where there are several; or a Hugging Face directory (config.json and safetensors).
      param_info: nested dict of `ParamInfo`, as `ModelDef.param_info`.
      shardings: nested dict of `jax.sharding.Sharding`, as `parallel.logical.param_shardings`.
      config: the config of the model; where a Hugging Face directory says something else (another
        activation, other rotary frequencies), which no shape shows, a warning is logged.

    Returns:
      Nested dict of numpy arrays, or of global `jax.Array`s if there are shardings.

    Raises:
      UserError: nothing there, a kind that is not known, another model, a damaged file.
    """
    own = find_own_checkpoint(path)
    if own is not None:
        return _load_own(own, param_info, shardings)
    if t5x_legacy.find_t5x_checkpoint(path) is not None:
        tree = t5x_legacy.open_t5x_checkpoint(path).params
        return t5x_legacy.to_stacked(tree, param_info, shardings=shardings)
    if hugging_face.is_hugging_face(path):
        return hugging_face.load_params(path, param_info, shardings=shardings, config=config)
    raise unknown_checkpoint(path)


def initial_step(path: str | epath.Path) -> int:
    """The step at which `path`'s checkpoint was taken, 0 for Hugging Face's, which do not say it.

    Errors are those of `load_initial_params`.
    """
    own = find_own_checkpoint(path)
    if own is not None:
        return int(own.name)
    if t5x_legacy.find_t5x_checkpoint(path) is not None:
        return t5x_legacy.open_t5x_checkpoint(path).step
    if hugging_face.is_hugging_face(path):
        return 0
    raise unknown_checkpoint(path)


def _load_own(
    step_dir: epath.Path, param_info: Mapping[str, Any], shardings: Mapping[str, Any] | None
) -> dict[str, Any]:
    wanted = traverse_util.flatten_dict(param_info, sep="/")
    where = traverse_util.flatten_dict(shardings or {}, sep="/")
    abstract = {
        n: jax.ShapeDtypeStruct(i.shape, i.dtype, sharding=where.get(n)) for n, i in wanted.items()
    }
    restore_args = {
        n: ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
        if leaf.sharding is None
        else ocp.ArrayRestoreArgs(sharding=leaf.sharding, dtype=leaf.dtype)
        for n, leaf in abstract.items()
    }
    # Orbax takes absolute paths only.
    state = (step_dir if "://" in str(step_dir) else step_dir.absolute()) / "state"
    handler = ocp.PyTreeCheckpointHandler()
    try:
        saved = handler.metadata(state).tree["params"]
        found = traverse_util.flatten_dict(saved, sep="/")
        shapes = {name: tuple(leaf.shape) for name, leaf in found.items()}
        matching.check_match(shapes, wanted, what=str(step_dir))
        restored = handler.restore(
            state,
            args=ocp.args.PyTreeRestore(
                item={"params": traverse_util.unflatten_dict(abstract, sep="/")},
                restore_args={"params": traverse_util.unflatten_dict(restore_args, sep="/")},
                partial_restore=True,
            ),
        )
    except UserError:
        raise
    except (ValueError, KeyError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"The checkpoint '{step_dir}' cannot be read: {reason}") from error
    finally:
        handler.close()
    return restored["params"]
