"""Without the extra `harness` the adapter says which one it is."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest

from t5x_like.errors import UserError

ADAPTER = "t5x_like.evaluation.lm_eval_adapter"


def test_the_extra_is_named(monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, ADAPTER, raising=False)
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.instance"):
        monkeypatch.setitem(sys.modules, name, None)  # Python's mark of a module that is missing.
    with pytest.raises(UserError, match=r"pip install 't5x_like\[harness\]'"):
        __import__(ADAPTER)
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (requirement,) = project["optional-dependencies"]["harness"]
    assert requirement.startswith("lm-eval")
