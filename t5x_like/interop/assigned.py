"""Partial loading: which parameters of a checkpoint become which of the model's, by regex."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from flax import traverse_util

from t5x_like.errors import UserError, did_you_mean
from t5x_like.interop import initial, matching, own, t5x_legacy
from t5x_like.interop.hugging_face import checkpoint as hugging_face
from t5x_like.interop.matching import Source

logger = logging.getLogger(__name__)
AssignmentMap = Sequence[tuple[str, str | None]]


def load_assigned(
    path: str | epath.Path,
    param_info: Mapping[str, Any],
    *,
    assignment_map: AssignmentMap,
    shardings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Reads those parameters of the model that the map takes from a checkpoint.

    Args:
      path: a checkpoint of any kind that `initial.load_initial_params` reads.
      param_info: nested dict of `ParamInfo`, of the model.
      assignment_map: see `TrainRun.assignment_map`; paths on both sides are ours, such as
        "encoder/layers/mlp/wi_0/kernel", whatever system wrote the checkpoint.
      shardings: nested dict of `jax.sharding.Sharding`, of the model.

    Returns:
      Nested dict of arrays, without the parameters that are not taken.

    Raises:
      UserError: what `load_initial_params` says; a rule that is no regular expression or matches
        nothing; a parameter that is not there, or not of the model's shape; nothing to load.
    """
    infos = traverse_util.flatten_dict(dict(param_info), sep="/")
    where = traverse_util.flatten_dict(dict(shardings or {}), sep="/")
    found = _sources(path, infos)
    wanted = assign(list(infos), assignment_map)
    if not wanted:
        raise UserError("The assignment map takes no parameter from the checkpoint: leave it out.")
    problems = []
    for name, source_name in wanted.items():
        if source_name not in found:
            near = did_you_mean(source_name, found, limit=1)
            problems.append(f"{name} wants {source_name}, which is not there.{near}")
        elif tuple(found[source_name].shape) != tuple(infos[name].shape):
            shapes = f"{tuple(found[source_name].shape)}, not {tuple(infos[name].shape)}"
            problems.append(f"{name} wants {source_name}, which is {shapes}.")
    if problems:
        more = f" ({len(problems) - 5} more.)" if len(problems) > 5 else ""
        raise UserError(
            f"The assignment map does not fit '{path}': {' '.join(problems[:5])}{more} Map a name "
            "to None to keep its fresh values."
        )
    fresh = sorted(infos.keys() - wanted.keys())
    logger.info("%d of %d parameters are loaded from %s.", len(wanted), len(infos), path)
    if fresh:
        logger.info("Fresh values: %s", ", ".join(fresh))
    return traverse_util.unflatten_dict(
        {
            name: matching.place(
                np.asarray(found[source_name].read(), infos[name].dtype), where.get(name)
            )
            for name, source_name in wanted.items()
        },
        sep="/",
    )


def assign(names: Sequence[str], assignment_map: AssignmentMap) -> dict[str, str]:
    """Name in the model -> name in the checkpoint, without the names that are mapped to None.

    Raises:
      UserError: a rule that is no regular expression, or that is nobody's first match.
    """
    rules = []
    for pattern, replacement in assignment_map:
        try:
            rules.append((re.compile(pattern), replacement))
        except re.error as error:
            raise UserError(
                f"The assignment map's '{pattern}' is no regular expression: {error}."
            ) from error
    assigned: dict[str, str] = {}
    used = set()
    for name in names:
        for i, (regex, replacement) in enumerate(rules):
            if match := regex.fullmatch(name):
                used.add(i)
                if replacement is not None:
                    assigned[name] = _expand(match, replacement)
                break
        else:
            assigned[name] = name
    for i, (regex, _) in enumerate(rules):
        if i not in used:
            raise UserError(
                f"The assignment map's '{regex.pattern}' is no parameter's first match: it must "
                f"match a whole path such as '{names[0]}'."
            )
    return assigned


def _expand(match: re.Match[str], replacement: str) -> str:
    try:
        return match.expand(replacement)
    except (re.error, IndexError) as error:
        raise UserError(
            f"The assignment map's replacement '{replacement}' does not suit "
            f"'{match.re.pattern}': {error}."
        ) from error


def _sources(path: str | epath.Path, infos: Mapping[str, Any]) -> Mapping[str, Source]:
    """All parameters of a checkpoint by our names; nothing is read yet."""
    step_dir = own.find_own_checkpoint(path)
    if step_dir is not None:
        return own.open_own_checkpoint(step_dir)
    if t5x_legacy.find_t5x_checkpoint(path) is not None:
        return t5x_legacy.by_our_names(t5x_legacy.open_t5x_checkpoint(path).params, infos)
    if hugging_face.is_hugging_face(path):
        return hugging_face.HuggingFaceCheckpoint(str(path)).sources()
    raise initial.unknown_checkpoint(path)
