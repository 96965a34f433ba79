"""Accuracy of tuned models on every task that they generated answers for, as JSON.

    python benchmarks/instruct_table.py tuned=/tmp/t5_0,/tmp/t5_1,/tmp/t5_2 scratch=/tmp/s_0,...

Each name stands for MODEL_DIRs that differ by RANDOM_SEED. Reads what their last in-training
evaluation wrote, `inference_eval/TASK/STEP.jsonl`: `majority` is the share of the most frequent
target among the evaluated examples, the others the mean of the runs' percent of exact answers with
the lowest and the highest run. The last rows are the means over the tasks trained on and held out.
"""

from __future__ import annotations

import collections
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from tasks.instruct.embedded import HELD_OUT

_SUFFIX = "_zero_shot"


def answers(run: Path) -> dict[str, list[tuple[str, str]]]:
    """(target, prediction) of every example by task, from the last evaluation of a run."""
    found = {}
    for directory in sorted((run / "inference_eval").glob(f"embedded_*{_SUFFIX}")):
        files = sorted(directory.glob("[0-9]*.jsonl"), key=lambda path: int(path.stem))
        if files:
            lines = map(json.loads, files[-1].read_text().splitlines())
            name = directory.name.removeprefix("embedded_").removesuffix(_SUFFIX)
            found[name] = [(line["targets"].strip(), line["prediction"].strip()) for line in lines]
    return found


def last_step(run: Path) -> int:
    """Of the evaluations of a run; SystemExit if it stopped amid one or has none."""
    found = [
        [int(path.stem) for path in directory.glob("[0-9]*.jsonl")]
        for directory in (run / "inference_eval").glob(f"embedded_*{_SUFFIX}")
    ]
    steps = {max(of_task) for of_task in found if of_task}  # A mixture has none of its own.
    if len(steps) != 1:
        raise SystemExit(f"{run}: its last evaluations are of steps {sorted(steps)}; let it end")
    return steps.pop()


def exact(pairs: list[tuple[str, str]]) -> float:
    return 100 * sum(target == prediction for target, prediction in pairs) / len(pairs)


def majority(pairs: list[tuple[str, str]]) -> float:
    return 100 * max(collections.Counter(t for t, _ in pairs).values()) / len(pairs)


def spread(values: list[float]) -> dict[str, float]:
    return {
        "mean": round(statistics.mean(values), 1),
        "lowest": round(min(values), 1),
        "highest": round(max(values), 1),
    }


def table(groups: dict[str, list[Path]]) -> dict[str, dict[str, Any]]:
    """A row for every task, and one for the mean of the trained and of the held-out tasks."""
    for name, runs in groups.items():
        steps = {str(run): last_step(run) for run in runs}
        if len(set(steps.values())) > 1:
            raise SystemExit(f"The runs of {name} ended at different steps: {steps}")
    read = {name: [answers(run) for run in runs] for name, runs in groups.items()}
    first = next(iter(read.values()))[0]
    rows: dict[str, dict[str, Any]] = {}
    for title, tasks in [(task, [task]) for task in first] + [
        ("mean of the trained tasks", [task for task in first if task not in HELD_OUT]),
        ("mean of the held-out tasks", [task for task in first if task in HELD_OUT]),
    ]:
        row: dict[str, Any] = {
            "examples": sum(len(first[task]) for task in tasks),
            "majority": round(statistics.mean(majority(first[task]) for task in tasks), 1),
        }
        for name, runs in read.items():
            row[name] = spread([statistics.mean(exact(run[t]) for t in tasks) for run in runs])
        rows[title] = row
    return rows


def main() -> None:
    pairs = (argument.split("=", 1) for argument in sys.argv[1:])
    groups = {name: [Path(run) for run in runs.split(",")] for name, runs in pairs}
    print(json.dumps(table(groups), indent=1))


if __name__ == "__main__":
    main()
