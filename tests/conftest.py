"""Shared fixtures: eight simulated devices, and numbers made by T5X itself."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

# Before JAX is imported anywhere.
os.environ["JAX_PLATFORMS"] = "cpu"
# The tests compile hundreds of small programs: LLVM's optimisation and the fusion emitters would
# take most of their time.
QUICK_COMPILE = "--xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.10."):  # Later versions may refuse these.
    QUICK_COMPILE += " --xla_cpu_use_fusion_emitters=false"
    QUICK_COMPILE += " --xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = " ".join(
    [
        QUICK_COMPILE,
        "--xla_force_host_platform_device_count=8",
        os.environ.get("XLA_FLAGS", ""),
    ]
)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# All processes of a run of the tests share what they compile: those of xdist, and those that
# tests start. Storing it costs next to nothing, reading it a quarter of compiling it.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _COMPILED = tempfile.TemporaryDirectory(prefix="t5x_like_compiled_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import filelock  # noqa: E402
import pytest  # noqa: E402

TESTS = Path(__file__).parent


@pytest.fixture(scope="session")
def oracle_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the numbers that T5X gave; `README.txt` inside explains every key."""
    target = tmp_path_factory.mktemp("oracle")
    with tarfile.open(TESTS / "data" / "t5x_oracle.tar.xz") as archive:
        archive.extractall(target, filter="data")
    return target / "t5x_oracle"


@pytest.fixture(scope="session")
def kjv_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CACHE_DIR that holds the span-corruption and causal-LM tasks of the embedded corpus.

    All processes of xdist share it.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    directory = shared / "kjv_cache"
    command = [
        *(sys.executable, "-m", "t5x_like", "cache", "--module=tasks.kjv"),
        *("--tasks=kjv_span_corruption", "--tasks=kjv_causal_lm", f"--cache_dir={directory}"),
    ]
    with filelock.FileLock(shared / "kjv_cache.lock"):
        if not (made := shared / "kjv_cache.made").exists():
            subprocess.run(command, cwd=TESTS.parent, check=True, capture_output=True)
            made.touch()
    return directory
