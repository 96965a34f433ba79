"""The rules of the house that a machine can check."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [*ROOT.glob("t5x_like/**/*.py"), *ROOT.glob("tasks/**/*.py")]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_imports_point_one_way() -> None:
    result = run(str(Path(sys.executable).with_name("lint-imports")), "--no-cache")
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("package", ["t5x_like.training", "t5x_like.data", "t5x_like.models"])
def test_neither_tensorflow_nor_torch(package: str) -> None:
    """Neither the package nor any module in it loads them; data's SeqIO side is left out."""
    script = f"""
import importlib, pkgutil, sys
import {package} as package
names = [m.name for m in pkgutil.walk_packages(package.__path__, "{package}.")]
for name in names:
    if "seqio" not in name and "beam" not in name:
        importlib.import_module(name)
loaded = {{"tensorflow", "seqio", "t5", "torch"}} & set(sys.modules)
assert not loaded, loaded
"""
    result = run(sys.executable, "-c", script)
    assert result.returncode == 0, result.stderr


def test_gin_is_data_only() -> None:
    strangers = [p for p in (ROOT / "gin").rglob("*") if p.is_file() and p.suffix != ".gin"]
    assert not strangers  # An __init__.py would shadow gin-config.


def test_files_are_short() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in [*SOURCES, *ROOT.glob("tests/**/*.py")]
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 600
    }
    assert not long


def test_package_inits_are_light() -> None:
    """A package's `__init__` imports nothing, so that importing one module loads that one."""
    for path in SOURCES:
        if path.name == "__init__.py" and "t5x_like" in path.parts:
            text = path.read_text(encoding="utf-8")
            assert "import " not in text.replace("from __future__ import annotations", ""), path
