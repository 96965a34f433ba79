"""Two real processes over loopback, each with four devices, make one mesh."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from t5x_like.errors import UserError
from t5x_like.parallel import multihost
from tests.conftest import QUICK_COMPILE

WORKER = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from t5x_like.parallel import logical, multihost
from t5x_like.parallel.mesh import MeshConfig

multihost.initialize()
rules = logical.Rules(storage={}, compute={"batch": ("data", "fsdp")})
batch_size, result = 16, {"processes": jax.process_count()}
for name, ici, dcn in json.loads(sys.argv[1]):
    mesh = MeshConfig(ici=ici, dcn=dcn).build()
    rows = logical.local_rows(mesh, rules, batch_size)
    local = {"tokens": rows[:, None] * 10 + np.arange(3)}
    batch = logical.to_global(mesh, rules, local, batch_size)
    weighted = jax.jit(lambda x: (x * jnp.arange(batch_size)[:, None]).sum())
    result[name] = [rows.tolist(), int(weighted(batch["tokens"]))]
result["gathered"] = multihost.process_allgather_json({"of": "é" * (jax.process_index() + 1)})
print(json.dumps(result))
"""
MESHES = [
    ("data over both", {"data": 4}, {"data": 2}),
    ("fsdp over both", {"data": 4}, {"fsdp": 2}),
    ("tensor over both", {"data": 4}, {"tensor": 2}),
]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def run_workers(num_processes: int) -> list[dict]:
    flags = {
        "XLA_FLAGS": f"{QUICK_COMPILE} --xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "COORDINATOR_ADDRESS": f"localhost:{free_port()}",
        "NUM_PROCESSES": str(num_processes),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, json.dumps(MESHES)],
            env={**os.environ, **flags, "PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(num_processes)
    ]
    try:
        outputs = [worker.communicate(timeout=100)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * num_processes
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def test_two_processes():
    results = run_workers(2)
    # Row r of the global batch holds 10 r + (0, 1, 2), on whichever process it came from.
    expected = sum(r * (10 * r + column) for r in range(16) for column in range(3))
    for result in results:
        assert result["processes"] == 2
        assert result["gathered"] == [{"of": "é"}, {"of": "éé"}]
        assert {result[name][1] for name, *_ in MESHES} == {expected}
    rows = {name: [result[name][0] for result in results] for name, *_ in MESHES}
    assert rows["data over both"] == [list(range(8)), list(range(8, 16))]
    interleaved = [[r for r in range(16) if r // 2 % 2 == i] for i in range(2)]
    assert rows["fsdp over both"] == interleaved
    assert rows["tensor over both"] == [list(range(16))] * 2


def test_one_process_needs_nothing(monkeypatch):
    for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    multihost.initialize()
    assert multihost.process_allgather_json([1, None]) == [[1, None]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_processes": 2}, "COORDINATOR_ADDRESS and PROCESS_ID not set"),
        (
            {"coordinator_address": "h:1", "num_processes": 2, "process_id": 2},
            "PROCESS_ID 2 is not in 0..1 (NUM_PROCESSES 2)",
        ),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(UserError) as error:
        multihost.initialize(**arguments)
    assert message in str(error.value)


def test_number_that_is_none(monkeypatch):
    monkeypatch.setenv("NUM_PROCESSES", "two")
    with pytest.raises(UserError, match="NUM_PROCESSES is 'two': give an integer"):
        multihost.initialize(coordinator_address="h:1", process_id=0)
