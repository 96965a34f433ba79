"""What the embedded tasks share."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping
from typing import Any

from t5x_like.data.templates import Template
from tasks.instruct import metrics
from tasks.instruct.register import Collection
from tasks.instruct.sources import Prepare

BLANK = "<extra_id_0>"
"""Stands for what is missing, as in pre-training by span corruption."""
# Short prompts, as a small model has use for.
SHARES = {"zero_shot": 0.8, "few_shot": 0.1, "chain_of_thought": 0.1, "inversion": 0.1}


def rng_of(*identity: str) -> random.Random:
    """Random numbers that follow from strings."""
    digest = hashlib.sha256("\0".join(identity).encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "little"))


def collection(
    prepare: Prepare,
    *asks: str,
    steps: tuple[str, str] | None = None,
    inverse: tuple[str, str] | None = None,
    metric: Callable[..., Mapping[str, Any]] = metrics.exact_match,
) -> Collection:
    """Zero-shot templates `asks`, whose targets are the answer, and one of each other kind."""
    templates = [Template(ask, "{answer}") for ask in asks]
    if steps:
        templates.append(Template(*steps, kind="chain_of_thought"))
    if inverse:
        templates.append(Template(*inverse, kind="inversion"))
    return Collection(
        prepare=prepare,
        templates=tuple(templates),
        shots=(1,),
        shares=SHARES,
        metric_fns=(metric,),
    )
