"""Runs the command line in processes of its own, over loopback if there are several."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from tests.conftest import QUICK_COMPILE
from tests.evaluation.conftest import MODULES, ROOT

ENVIRONMENT = os.environ | {
    "PYTHONPATH": f"{ROOT}{os.pathsep}{MODULES}",
    "XLA_FLAGS": QUICK_COMPILE,
}


def start(*arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "t5x_like", *arguments]
    return subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes], *, seconds: float = 300) -> None:
    try:
        _, stderr = process.communicate(timeout=seconds)
    finally:
        process.kill()
    assert process.returncode == 0, stderr.decode()[-3000:]


def run_two(*arguments: str) -> None:
    """One job of two processes, a device each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    job = ("--num_processes=2", f"--coordinator_address=127.0.0.1:{port}")
    running = [start(*arguments, *job, f"--process_id={i}") for i in range(2)]
    for process in running:
        finish(process)
