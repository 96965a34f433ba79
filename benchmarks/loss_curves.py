"""Validation loss by step of runs that differ by RANDOM_SEED, as JSON.

    python benchmarks/loss_curves.py dense=/tmp/d0,/tmp/d1,/tmp/d2 switch=/tmp/s0,...

Each name stands for MODEL_DIRs; reads the cross-entropy of the targets from their only
teacher-forced validation. `below` is how much lower each other name's is than the first one's at
the last step, seed by seed in the order given.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

from t5x_like.training.metrics import read_scalars


def curve(run: Path) -> dict[int, float]:
    """Step -> cross-entropy."""
    (directory,) = (d for d in (run / "training_eval").iterdir() if not d.name.endswith("-train"))
    return {int(line["step"]): line["cross_ent_loss"] for line in read_scalars(directory)}


def main() -> None:
    pairs = (argument.split("=", 1) for argument in sys.argv[1:])
    curves = {name: [curve(Path(run)) for run in runs.split(",")] for name, runs in pairs}
    report = {
        name: {
            step: [round(f([c[step] for c in of_seeds]), 4) for f in (statistics.mean, min, max)]
            for step in of_seeds[0]
        }
        for name, of_seeds in curves.items()
    }
    first, *others = curves
    last = {name: [c[max(c)] for c in of_seeds] for name, of_seeds in curves.items()}
    below = {
        name: [round(a - b, 4) for a, b in zip(last[first], last[name], strict=True)]
        for name in others
    }
    print(json.dumps({"mean, lowest, highest": report, "below": below}, indent=1))


if __name__ == "__main__":
    main()
