"""A model out of its directory, ready to be asked: what eval, infer and chat share."""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import jax

from t5x_like.data import cache_format
from t5x_like.errors import UserError
from t5x_like.evaluation.codecs import Codec, find_codec
from t5x_like.evaluation.predictor import Predictor, is_prefix_lm
from t5x_like.evaluation.requests import TaskSource
from t5x_like.interop.initial import initial_step, load_initial_params
from t5x_like.models.base import ModelConfig, ModelDef
from t5x_like.parallel import logical
from t5x_like.parallel.mesh import MeshConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelRun:
    """Which model is asked.

    Attributes:
      model_dir: of training or of `t5x_like convert`.
      checkpoint_path: other parameters than the latest of `model_dir`: ours, T5X's, Hugging Face's.
      vocabulary: "bytes" or a file; None for what the Task or the directory says.
      task: name of the Task that the model was trained on, () if it is not known: its vocabulary
        and its way to end inputs are those of text.
    """

    model_dir: str
    model: ModelConfig
    mesh: MeshConfig
    rules: logical.Rules
    checkpoint_path: str | None = None
    vocabulary: str | None = None
    task: str | tuple[()] = ()

    def __post_init__(self) -> None:
        for name in ("model_dir", "checkpoint_path"):
            if (path := getattr(self, name)) is not None:
                object.__setattr__(self, name, os.path.expanduser(path))

    @property
    def checkpoint(self) -> str:
        return self.checkpoint_path or self.model_dir


class Served:
    """A `ModelRun` on its mesh, without parameters.

    Attributes:
      predictor: runs the model.
    """

    def __init__(self, run: ModelRun, *, source: TaskSource, batch_size: int) -> None:
        """`source`: its feature converter says how a decoder alone was trained.

        Raises:
          UserError: a model that cannot write, a mesh that does not fit.
        """
        self._run, self._source = run, source
        self._mesh = run.mesh.build()
        self._model_def = ModelDef(run.model)
        self.predictor = Predictor(
            self._model_def,
            mesh=self._mesh,
            rules=run.rules,
            batch_size=batch_size,
            bidirectional_prompt=is_prefix_lm(source.feature_converter),
        )

    def load(self, path: str) -> Any:
        """The parameters of a checkpoint, on the mesh.

        Raises:
          UserError: there is none, or one of another model.
        """
        info = self._model_def.param_info
        shardings = logical.param_shardings(self._mesh, self._run.rules, info)
        try:
            return load_initial_params(path, info, shardings=shardings)
        except UserError as error:
            message = str(error).replace("INITIAL_CHECKPOINT_PATH", "CHECKPOINT_PATH")
            raise UserError(message) from error

    @functools.cached_property
    def codec(self) -> Codec:
        """How text becomes prompts."""
        features = None
        if self._run.task:
            task = cache_format.read_task(
                os.path.expanduser(self._source.cache_dir), self._run.task
            )
            features = task.output_features if task else None
        return find_codec(
            Path(self._run.model_dir),
            features=features,
            vocabulary=self._run.vocabulary,
            has_encoder=self.predictor.has_encoder,
            first_id=self._source.first_id,
        )


def step_of(path: str) -> int:
    """The step of a checkpoint.

    Raises:
      UserError: there is none.
    """
    try:
        return initial_step(path)
    except UserError as error:
        raise UserError(
            str(error).replace("INITIAL_CHECKPOINT_PATH", "CHECKPOINT_PATH or MODEL_DIR")
        ) from error


def is_leader() -> bool:
    return jax.process_index() == 0
