"""TensorFlow must neither take the accelerator's memory from the model nor load what it wraps."""

from __future__ import annotations

import subprocess
import sys

import pytest
import tensorflow as tf

from t5x_like.data import seqio_host
from t5x_like.errors import UserError

# In a process of its own, as it happens when a module is imported; these tests have no GPU.
SCRIPT = """
import importlib
import sys
from t5x_like.data.seqio_host import tf
hidden = []
tf.config.set_visible_devices = lambda devices, kind: hidden.append((devices, kind))
for module in ("seqio_cache", "seqio_stream", "seqio_tasks"):
    hidden.clear()
    importlib.import_module(f"t5x_like.data.{module}")
    assert hidden and set(map(str, hidden)) == {"([], 'GPU')"}, (module, hidden)
assert "sklearn" not in sys.modules
import sklearn.metrics  # can be imported later all the same
"""


def test_gpus_are_hidden_before_anything_runs() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_too_late(monkeypatch) -> None:
    def refuse(*_) -> None:
        raise RuntimeError("Visible devices cannot be modified after being initialized")

    monkeypatch.setattr(tf.config, "set_visible_devices", refuse)
    with pytest.raises(UserError, match="uses the GPU of this process already"):
        seqio_host.hide_accelerators()
