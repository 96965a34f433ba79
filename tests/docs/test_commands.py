"""Every command in the documentation does what it says, on small data for few steps."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shutil
import socket
import subprocess
import sys
import time
import tomllib
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gin
import pytest

from t5x_like.cli.main import main
from t5x_like.data import cache_format, cache_job
from tests.cache.conftest import remove
from tests.cache.test_job import write_tfds
from tests.docs import fixtures
from tests.docs.commands import blocks, commands, placed
from tests.interop.small_models import GPT2, random_tensors, write_directory

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")])
REDUCED = [
    "--gin.TRAIN_STEPS=2",
    "--gin.EVAL_STEPS=1",
    "--gin.LOG_PERIOD=1",
    "--gin.BATCH_SIZE=8",
    "--gin.block.BlockConfig.embed_dim=32",
    "--gin.mlp.MlpConfig.mlp_dim=32",
]
DECODER = [
    "--gin.decoder_only.DecoderOnlyConfig.num_layers=1",
    "--gin.schedules.CosineSchedule.warmup_steps=1",
]
ENCODER_DECODER = [
    "--gin.encoder_decoder.EncoderDecoderConfig.num_encoder_layers=1",
    "--gin.encoder_decoder.EncoderDecoderConfig.num_decoder_layers=1",
]
FINETUNE = ["--gin.TRAIN_STEPS_RELATIVE=2", "--gin.EVALUATOR_NUM_EXAMPLES=4"]
# Prompts of the documentation are few; of Tasks, so many are asked.
ASKED = ["--gin.BATCH_SIZE=64", "--gin.MAX_NEW_TOKENS=3"]
# DESIGN, section 6: what a training run of a dense model writes.
SCALARS = {
    *("loss", "cross_ent_loss", "z_loss", "accuracy", "learning_rate", "grad_norm", "param_norm"),
    *("nonpadding_fraction", "memory/peak_gib", "timing/seconds_per_step", "timing/mfu"),
    *("timing/target_tokens_per_second", "timing/tokens_per_second_per_device"),
    *("timing/tflops_per_second_per_device", "timing/data_wait_fraction"),
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Stands for the reader's / and working directory; SeqIO and gin forget what was run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    gin.clear_config()
    if "seqio" in sys.modules:
        sys.modules["seqio"].set_tfds_data_dir_override(None)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, kjv_cache: Path) -> Path:
    """What stands for a MODEL_DIR that the documentation asks or tunes."""
    model_dir = tmp_path_factory.mktemp("tiny") / "run1"
    recipe = "--gin_file=gin/recipes/t5_tiny_cpu.gin"
    train([recipe, f"--gin.MODEL_DIR={model_dir}"], kjv_cache, evaluates=False)
    gin.clear_config()
    return model_dir


@pytest.mark.parametrize("document", [path.relative_to(ROOT).as_posix() for path in DOCUMENTS])
def test_commands(
    document: str, root: Path, kjv_cache: Path, request: pytest.FixtureRequest
) -> None:
    text = (ROOT / document).read_text()
    wanted = commands(text)
    if any("/data/" in word for command in wanted for word in command):
        fixtures.make(root / "data")
        splits = {"train": fixtures.DOCUMENTS, "validation": fixtures.DOCUMENTS[:2]}
        write_tfds(root / "data/tfds", "en/2.2.0", splits)
    for block in blocks(text, "python"):
        if module := re.match(r"# (\w+\.py)\n", block):
            (root / module[1]).write_text(placed(block, root))
    watched = any(command[0] == "tensorboard" for command in wanted)
    for words in wanted:
        print("$", " ".join(words))  # shown when it fails
        command = [placed(word, root) for word in words]
        if asks(command):
            with_model(command, lambda: request.getfixturevalue("tiny_run"), kjv_cache)
        else:
            execute(command, kjv_cache, evaluates=watched)


def execute(command: list[str], kjv_cache: Path, *, evaluates: bool) -> None:
    """Runs a command, or as much of it as can be run here."""
    if command[:2] == ["t5x_like", "train"]:
        return train(command[2:], kjv_cache, evaluates=evaluates)
    for start, handler in HANDLERS.items():
        if f"{' '.join(command)} ".startswith(f"{start} "):
            return handler(command[len(start.split()) :])
    pytest.fail(f"no test executes {command}")


def train(flags: list[str], kjv_cache: Path, *, evaluates: bool) -> None:
    """Trains two steps of a model reduced to one layer; reads what it should have written."""
    is_decoder = "decoder" in value_of("--gin_file", flags)
    reduced = [*REDUCED, *(DECODER if is_decoder else ENCODER_DECODER)]
    if not any(flag.startswith("--gin.CACHE_DIR=") for flag in flags):
        reduced.append(f"--gin.CACHE_DIR={kjv_cache}")
    if not evaluates:
        reduced.append("--gin.run.TrainRun.eval_datasets={}")
    assert main(["train", *flags, *reduced]) == 0
    assert steps(Path(value_of("--gin.MODEL_DIR", flags)) / "train/metrics.jsonl") == [1, 2]


def asks(command: list[str]) -> bool:
    """Whether a command needs a model that was trained before."""
    verb = command[command.index("t5x_like") + 1] if "t5x_like" in command else ""
    return verb in ("eval", "infer", "chat") or "--gin_file=gin/runs/finetune.gin" in command


def with_model(command: list[str], tiny_run: Callable[[], Path], kjv_cache: Path) -> None:
    """Runs eval, infer, chat or fine-tuning on a small model, copied if it is not there."""
    start = command.index("t5x_like")
    verb, *flags = command[start + 1 :]
    model_dir = Path(value_of("--gin.INITIAL_CHECKPOINT_PATH", flags) or flags[0])
    if not model_dir.exists():
        shutil.copytree(tiny_run(), model_dir)
    if not any(flag.startswith("--gin.CACHE_DIR=") for flag in flags):
        flags.append(f"--gin.CACHE_DIR={kjv_cache}")
    named = ("--tasks", "--task", "--gin.MIXTURE_OR_TASK_NAME", "--gin.INFERENCE_EVAL_TASKS")
    modules = (value_of(flag, flags) for flag in ("--module", "--gin.MIXTURE_OR_TASK_MODULE"))
    module = next(filter(None, modules), None)  # else it is in config.gin, and imported already
    for task in filter(None, (value_of(name, flags) for name in named)):
        # In this process: one of its own would take its time to start.
        jobs, place = cache_job.local(1), value_of("--gin.CACHE_DIR", flags)
        cache_job.cache(task, module=module, cache_dir=place, run_jobs=jobs)
    if verb == "train":
        reduced = [*REDUCED[1:], *ENCODER_DECODER, *FINETUNE, ASKED[1]]
        assert main(["train", *flags, *reduced]) == 0
        assert steps(Path(value_of("--gin.MODEL_DIR", flags)) / "train/metrics.jsonl") == [3, 4]
        return
    limit = [FINETUNE[1]] if verb == "eval" else []
    text = f"{command[1]}\n" if start else "In the beginning\n/quit\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        assert main([verb, *flags, *ASKED, *limit]) == 0
    directory = {"eval": "inference_eval", "infer": "inference"}.get(verb, ".")
    if "--input=-" not in flags and not value_of("--output", flags):
        assert any(path.stat().st_size for path in (model_dir / directory).rglob("*.jsonl*"))


def steps(file: Path) -> list[int]:
    return [json.loads(line)["step"] for line in file.read_text().splitlines()]


def cache(flags: list[str]) -> None:
    """Caches, and looks up the tasks in the cache."""
    gin.clear_config()  # as in a process of its own
    name = value_of("--name", flags) or "text"
    if "--module=tasks.user" in flags:
        remove(name)
        sys.modules.pop("tasks.user", None)
    code = main(["cache", *flags])
    if value_of("--beam_runner", flags) and importlib.util.find_spec("apache_beam") is None:
        assert code == 2  # the extra that the documentation names is not installed here
        return
    assert code == 0
    task = value_of("--tasks", flags)
    assert cache_format.read_task(value_of("--cache_dir", flags), task) is not None


def pip_install(words: list[str]) -> None:
    """Looks only: the extras that are named exist."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in words:
        if match := re.fullmatch(r"(.*)\[(.*)\]", word):
            assert match[1] in (".", project["name"])
            assert set(match[2].split(",")) <= project["optional-dependencies"].keys()
        else:
            assert word in ("-e", ".", project["name"]), word


def pytest_runs(words: list[str]) -> None:
    """This process is that command, or a part of it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for path in words or project["tool"]["pytest"]["ini_options"]["testpaths"]:
        assert path.startswith("-") or (ROOT / path).exists()


def script(words: list[str]) -> None:
    """Scripts run for long: their help must know the flags."""
    command = [sys.executable, str(ROOT / words[0]), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for flag in words[1:]:
        assert not flag.startswith("-") or flag.partition("=")[0] in done.stdout


def tensorboard(flags: list[str]) -> None:
    """Really starts it, and asks for the scalars and the text that a run wrote."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", *flags, f"--port={port}", "--bind_all"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        plugin = f"http://127.0.0.1:{port}/data/plugin"
        scalars = wait_for(lambda: get(f"{plugin}/scalars/tags"), until=is_loaded)
        assert scalars["train"].keys() >= SCALARS
        evaluations = {run for run in scalars if run.startswith("training_eval/")}
        assert len(evaluations) == 2
        assert all({"loss", "accuracy"} <= scalars[run].keys() for run in evaluations)
        tags = get(f"{plugin}/text/tags")["train"]
        (tag,) = tags
        query = urllib.parse.urlencode({"run": "train", "tag": tag})
        assert "TRAIN_STEPS = 2" in json.dumps(get(f"{plugin}/text/text?{query}"))
    finally:
        process.kill()
        process.communicate()


def convert(flags: list[str]) -> None:
    """Converts a small Hugging Face directory, and back."""
    if not (source := Path(value_of("--from", flags))).exists():
        write_directory(source, GPT2, random_tensors(GPT2))
    assert main(["convert", *flags]) == 0
    name = "config.json" if "--format=hf" in flags else "model.gin"
    assert (Path(value_of("--to", flags)) / name).is_file()


HANDLERS: dict[str, Callable[[list[str]], None]] = {
    "t5x_like cache": cache,
    "t5x_like convert": convert,
    "pip install": pip_install,
    "python -m pytest": pytest_runs,
    "tensorboard": tensorboard,
    "python": script,
}


def is_loaded(scalars: dict[str, Any]) -> bool:
    return "train" in scalars and any(run.startswith("training_eval/") for run in scalars)


def value_of(flag: str, flags: list[str]) -> str:
    return next((f.partition("=")[2] for f in flags if f.partition("=")[0] == flag), "")


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)


def wait_for(ask: Callable[[], Any], *, until: Callable[[Any], bool], seconds: float = 60) -> Any:
    """Asks again until the answer is good: TensorBoard starts, then loads its files."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if until(answer := ask()):
                return answer
        except OSError:
            answer = "no connection"
        assert time.monotonic() < deadline, answer
        time.sleep(0.2)
