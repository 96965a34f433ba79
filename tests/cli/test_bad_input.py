"""Bad input gets one line that names the thing, both values and the remedy; nothing is written."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import gin
import pytest

from t5x_like.cli.main import main
from t5x_like.data import cache_format

ROOT = Path(__file__).parents[2]
PREFIX = "t5x_like: error: "
# Small, so that what must be compiled is compiled soon.
SMALL = [
    "--gin.BATCH_SIZE=8",
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 16, 'targets': 16}",
    "--gin.block.BlockConfig.embed_dim=32",
    "--gin.encoder_decoder.EncoderDecoderConfig.num_encoder_layers=1",
    "--gin.encoder_decoder.EncoderDecoderConfig.num_decoder_layers=1",
    "--gin.run.TrainRun.eval_datasets={}",
]


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs from the checkout, and leaves no gin bindings."""
    monkeypatch.chdir(ROOT)
    yield
    gin.clear_config()


Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Refused:
    """Runs the command line, holds it to the contract, and returns its one line."""

    def run(*argv: str, says: list[str]) -> str:
        before = contents(tmp_path)
        capsys.readouterr()
        code = main(argv)
        stderr = capsys.readouterr().err
        assert (code, len(stderr.splitlines())) == (2, 1), stderr
        assert stderr.startswith(PREFIX) and stderr.count(PREFIX) == 1
        assert "Traceback" not in stderr
        assert [text for text in says if text not in stderr] == [], stderr
        assert contents(tmp_path) == before, "something was written"
        return stderr

    return run


@pytest.fixture
def refused_train(refused: Refused, tmp_path: Path, kjv_cache: Path) -> Refused:
    def run(*flags: str, says: list[str], cache: Path = kjv_cache) -> str:
        return refused(*train(tmp_path / "model", cache, *flags), says=says)

    return run


def train(model_dir: Path, cache: Path, *flags: str) -> list[str]:
    recipe = "--gin_file=gin/recipes/t5_tiny_cpu.gin"
    places = [f"--gin.MODEL_DIR={model_dir}", f"--gin.CACHE_DIR={cache}"]
    # A run that is not refused, as it should be, is soon over.
    return ["train", recipe, *places, "--gin.TRAIN_STEPS=1", "--gin.EVAL_STEPS=1", *flags]


def contents(directory: Path) -> dict[str, str]:
    """Digest of each file below, by relative path, and what lies in the directory itself.

    A cache's lock files are left out: they are empty and stay.
    """
    files = {path for path in directory.rglob("*") if path.is_file() and path.suffix != ".lock"}
    return {
        str(path.relative_to(directory)): (
            hashlib.sha256(path.read_bytes()).hexdigest() if path in files else ""
        )
        for path in {*files, *directory.iterdir()}
    }


# ---- Gin, mesh, batch, lengths, vocabulary.

UNKNOWN = "/data/nowhere/checkpoint"
CASES: dict[str, tuple[list[str], list[str]]] = {
    "unknown macro": (["--gin.BATCHSIZE=8"], ["BATCHSIZE", "Did you mean 'BATCH_SIZE'"]),
    "unknown parameter": (
        ["--gin.run.TrainRun.total_step=8"],
        ["total_step", "Did you mean 'total_steps'"],
    ),
    "unknown configurable": (
        ["--gin.block.BlokConfig.embed_dim=8"],
        ["block.BlokConfig", "Did you mean 'block.BlockConfig'"],
    ),
    "unknown reference": (
        ["--gin.OPTIMIZER=@adafactor.AdafaktorConfig()"],
        ["AdafaktorConfig", "Did you mean 'adafactor.AdafactorConfig'"],
    ),
    "string for an integer": (
        ["--gin.BATCH_SIZE=many"],
        ["BATCH_SIZE = 'many'", "takes int, not str"],
    ),
    "fraction for an integer": (
        ["--gin.TRAIN_STEPS=1.5"],
        ["TRAIN_STEPS = 1.5", "takes int | None, not float"],
    ),
    "schedule for an optimizer": (
        ["--gin.OPTIMIZER=@schedules.FactorSchedule()"],
        ["OPTIMIZER = @schedules.FactorSchedule()", "takes OptimizerConfig"],
    ),
    "number for a schedule": (["--gin.SCHEDULE=3"], ["SCHEDULE = 3", "takes ScheduleConfig"]),
    "number for a model": (["--gin.MODEL=3"], ["MODEL = 3", "takes ModelConfig, not int"]),
    "number for an objective": (["--gin.OBJECTIVE=3"], ["OBJECTIVE = 3", "not int"]),
    "zero steps": (["--gin.TRAIN_STEPS=0"], ["total_steps = 0", "at least 1"]),
    "unknown module": (
        ["--gin.MIXTURE_OR_TASK_MODULE=tasks.kvj"],
        ["'tasks.kvj'", "MIXTURE_OR_TASK_MODULE"],
    ),
    "unknown task in the cache": (
        [
            "--gin.MIXTURE_OR_TASK_NAME=kjv_span_corupton",
            "--gin.dataset.DatasetConfig.use_cached=True",
        ],
        ["'kjv_span_corupton'", "Did you mean 'kjv_span_corruption'"],
    ),
    "mesh of too few devices": (["--gin.MESH={'data': 3}"], ["{'data': 3}", "3", "8", "-1"]),
    "mesh of no divisor": (
        ["--gin.MESH={'data': -1, 'tensor': 3}"],
        ["a multiple of 3", "there are 8", "change a degree"],
    ),
    "unknown mesh axis": (["--gin.MESH={'fspd': 8}"], ["'fspd'", "Did you mean 'fsdp'"]),
    "mesh that does not divide the heads": (
        ["--gin.MESH={'tensor': 8}", "--gin.attention.AttentionConfig.head_dim=33"],
        ["132", "tensor 8", "MESH"],
    ),
    "batch that the mesh does not divide": (
        ["--gin.BATCH_SIZE=30"],
        ["batch", "30", "data 8", "a multiple of 8", "BATCH_SIZE"],
    ),
    "batch that the microbatches do not divide": (
        ["--gin.MICROBATCHES=3"],
        ["BATCH_SIZE 32", "MICROBATCHES 3", "change one"],
    ),
    "microbatch that the mesh does not divide": (
        ["--gin.MICROBATCHES=16"],
        ["2", "data 8", "BATCH_SIZE / MICROBATCHES"],
    ),
    "inputs too short for one span": (
        ["--gin.TASK_FEATURE_LENGTHS={'inputs': 2, 'targets': 32}"],
        ["inputs' length 2", "too short for one span", "take 3", "task_feature_lengths"],
    ),
    "targets too short for the spans": (
        ["--gin.TASK_FEATURE_LENGTHS={'inputs': 128, 'targets': 16}"],
        ["targets' length 16", "128", "needs", "task_feature_lengths"],
    ),
    "length of a feature left out": (
        ["--gin.TASK_FEATURE_LENGTHS={'inputs': 128}"],
        ["'targets'", "{'inputs': 128}", "Add it"],
    ),
    "table smaller than the vocabulary": (
        ["--gin.VOCAB_SIZE=8000"],
        ["'kjv_span_corruption'", "8192 ids", "8000 rows", "VOCAB_SIZE = 8192"],
    ),
    "table of another vocabulary": (
        ["--gin.VOCAB_SIZE=32128"],
        ["'kjv_span_corruption'", "8192 ids", "32128 rows", "VOCAB_SIZE = 8192"],
    ),
    "cache of another vocabulary than named": (
        ["--gin.dataset.DatasetConfig.vocabulary=bytes"],
        ["sentencepiece of 8192 ids", "not bytes of 359 ids", "Cache the task again"],
    ),
    "no such split": (
        ["--gin.train/dataset.DatasetConfig.split=trian"],
        ["'trian'", "Did you mean 'train'"],
    ),
    "no such split to evaluate": (
        ["--gin.validation/dataset.DatasetConfig.split=test"],
        ["'test'", "validation"],
    ),
    "initial checkpoint that is not there": (
        [f"--gin.INITIAL_CHECKPOINT_PATH={UNKNOWN}"],
        [UNKNOWN, "INITIAL_CHECKPOINT_PATH", "is no directory", "known kinds"],
    ),
    "initial checkpoint of no known kind": (
        [f"--gin.INITIAL_CHECKPOINT_PATH={ROOT}"],
        [str(ROOT), "INITIAL_CHECKPOINT_PATH", "known kinds", "t5x_like", "T5X"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_train(case: str, refused_train: Refused) -> None:
    flags, says = CASES[case]
    refused_train(*flags, says=says)


@pytest.mark.parametrize(
    "case", ["mesh of no divisor", "batch that the microbatches do not divide"]
)
def test_dry_run_says_the_same(case: str, refused_train: Refused) -> None:
    flags, says = CASES[case]
    refused_train(*flags, "--dry_run", says=says)


def test_missing_macro(refused: Refused) -> None:
    says = ["MODEL_DIR", "gin/runs/pretrain.gin:", "--gin.MODEL_DIR="]
    refused("train", "--gin_file=gin/recipes/t5_tiny_cpu.gin", says=says)


def test_unknown_gin_file(refused: Refused) -> None:
    refused("train", "--gin_file=gin/recipes/t5_tiny.gin", says=["gin/recipes/t5_tiny.gin"])


def test_unknown_task_in_a_real_process(tmp_path: Path, kjv_cache: Path) -> None:
    """SeqIO is asked, in one more process. Log lines may come before the one line, nothing else."""
    command = [sys.executable, "-m", "t5x_like", *train(tmp_path / "model", kjv_cache)]
    command += ["--gin.MIXTURE_OR_TASK_NAME=kjv_span_corupton"]
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    *logged, last = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert last.startswith(PREFIX) and last.count(PREFIX) == 1
    assert "'kjv_span_corupton' in tasks.kjv. Did you mean 'kjv_span_corruption'" in last
    assert [line for line in logged if " INFO " not in line] == []
    assert contents(tmp_path) == {}


# ---- Directories.


def test_model_dir_below_a_file(refused: Refused, tmp_path: Path, kjv_cache: Path) -> None:
    (tmp_path / "file").write_text("text")
    for name in ("file", "file/run"):
        path = tmp_path / name
        refused(*train(path, kjv_cache), says=["MODEL_DIR", str(path), "cannot be written"])


def test_model_dir_in_proc(refused: Refused, kjv_cache: Path) -> None:
    says = ["MODEL_DIR", "/proc/run", "cannot be written", "Choose"]
    refused(*train(Path("/proc/run"), kjv_cache), says=says)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, kjv_cache: Path) -> Path:
    """MODEL_DIR of a run of one step."""
    model_dir = tmp_path_factory.mktemp("trained") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert main(train(model_dir, kjv_cache, *SMALL)) == 0
    return model_dir


OTHER_RUNS: dict[str, tuple[list[str], list[str]]] = {
    "deeper": (
        ["--gin.encoder_decoder.EncoderDecoderConfig.num_decoder_layers=2"],
        ["decoder/layers", "(1, ", "(2, "],
    ),
    "tied": (["--gin.encoder_decoder.EncoderDecoderConfig.logits=tied"], ["decoder/logits_dense"]),
    "other optimizer": (
        ["--gin.adafactor.AdafactorConfig.momentum=0.9"],
        ["opt_state"],
    ),
    "other batch": (["--gin.BATCH_SIZE=16"], ["batch_size = 8", "16", "allow_data_reset"]),
    "other lengths": (
        ["--gin.TASK_FEATURE_LENGTHS={'inputs': 24, 'targets': 16}"],
        ["task_feature_lengths", "16", "24", "allow_data_reset"],
    ),
}


@pytest.mark.parametrize("case", OTHER_RUNS)
def test_model_dir_of_another_run(
    case: str, refused: Refused, trained: Path, tmp_path: Path, kjv_cache: Path
) -> None:
    flags, says = OTHER_RUNS[case]
    model_dir = tmp_path / "model"
    shutil.copytree(trained, model_dir)
    refused(*train(model_dir, kjv_cache, *SMALL, *flags), says=[str(model_dir), *says])


def test_initial_checkpoint_of_another_model(refused_train: Refused, trained: Path) -> None:
    says = [str(trained), "decoder/layers/mlp/wo", "(1, 512", "(4, 512"]
    refused_train(f"--gin.INITIAL_CHECKPOINT_PATH={trained}", says=says)


# ---- Caches.


@pytest.fixture
def cache(tmp_path: Path, kjv_cache: Path) -> Path:
    """A cache to spoil."""
    return Path(shutil.copytree(kjv_cache, tmp_path / "cache"))


def record_file(cache: Path, split: str) -> Path:
    (path,) = cache.glob(f"corpora/*/{split}/*.arrayrecord")
    return path


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_truncated_record_file(split: str, refused_train: Refused, cache: Path) -> None:
    path = record_file(cache, split)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size // 2])
    says = [str(path), str(size // 2), str(size), "t5x_like cache"]
    refused_train(says=says, cache=cache)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_corrupted_record(split: str, refused_train: Refused, cache: Path) -> None:
    path = record_file(cache, split)
    flip(path, 40_000)
    says = [str(path), "Record", "at byte", "t5x_like cache"]
    refused_train(says=says, cache=cache)


def test_missing_record_file(refused_train: Refused, cache: Path) -> None:
    path = record_file(cache, "train")
    path.unlink()
    refused_train(says=[str(path), "missing", "t5x_like cache"], cache=cache)


def test_verify(refused: Refused, cache: Path) -> None:
    path = record_file(cache, "train")
    verify = ["cache", "--verify", "--tasks=kjv_span_corruption", f"--cache_dir={cache}"]
    whole = path.read_bytes()
    flip(path, len(whole) // 2)
    refused(*verify, says=[str(path), "corrupted", "at byte", "--overwrite"])
    path.write_bytes(whole[: len(whole) // 3])
    says = [str(path), f"offset {len(whole) // 3}", str(len(whole)), "truncated", "--overwrite"]
    refused(*verify, says=says)


def test_manifest_that_is_not_json(refused_train: Refused, cache: Path) -> None:
    path = cache / "tasks" / "kjv_span_corruption.json"
    path.write_text(path.read_text()[:100])
    refused_train(says=[str(path), "not valid JSON", "cache again"], cache=cache)


@pytest.fixture
def other_vocabulary(cache: Path) -> Path:
    """The cache as it would be if the vocabulary's file had been another one then."""
    path = cache / "tasks" / "kjv_span_corruption.json"
    manifest = json.loads(path.read_text())
    for feature in manifest["output_features"].values():
        feature["vocabulary"]["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))
    return cache


ANOTHER = ["'kjv_span_corruption'", "another vocabulary", "sha256 000000000000", "CACHE_DIR"]


def test_cache_of_another_vocabulary(refused_train: Refused, other_vocabulary: Path) -> None:
    refused_train(says=ANOTHER, cache=other_vocabulary)


# ---- Text.


@pytest.fixture
def _tensorflow() -> None:
    """Loads it outside of what is measured."""
    importlib.import_module("tensorflow")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text").mkdir()
    (tmp_path / "cache").mkdir()
    # A process of a user's imports the module once; a name of its own keeps SeqIO's registry apart.
    sys.modules.pop("tasks.user", None)
    return tmp_path / "text"


def cache_flags(text: Path, name: str, *flags: str) -> list[str]:
    return [
        *("cache", "--module=tasks.user", f"--tasks={name}_span_corruption", f"--name={name}"),
        *(f"--files={text}/*.txt", f"--cache_dir={text.parent / 'cache'}", *flags),
    ]


BYTES = "--vocabulary=bytes"


@pytest.mark.usefixtures("_tensorflow")
@pytest.mark.parametrize(
    ("name", "documents"), {"empty": [b""], "blank": [b" \n\t ", b"\xe2\x80\x83"]}.items()
)
def test_corpus_without_text(
    name: str, documents: list[bytes], refused: Refused, text: Path
) -> None:
    for i, document in enumerate(documents):
        (text / f"{i}.txt").write_bytes(document)
    says = ["'train'", "is empty", f"{len(documents)} documents", "none with text", "Check"]
    refused(*cache_flags(text, name, BYTES, "--validation_fraction=0"), says=says)


@pytest.mark.usefixtures("_tensorflow")
def test_no_file(refused: Refused, text: Path) -> None:
    says = [f"{text}/*.txt", "No file matches"]
    refused(*cache_flags(text, "nofile", BYTES), says=says)


@pytest.mark.usefixtures("_tensorflow")
def test_no_such_vocabulary(refused: Refused, text: Path) -> None:
    (text / "a.txt").write_text("In the beginning")
    says = ["'nowhere.model'"]
    refused(*cache_flags(text, "novocabulary", "--vocabulary=nowhere.model"), says=says)


@pytest.mark.usefixtures("_tensorflow")
def test_no_vocabulary(refused: Refused, text: Path) -> None:
    (text / "a.txt").write_text("In the beginning")
    refused(*cache_flags(text, "none"), says=["TextCorpus.vocabulary", "is empty", "'bytes'"])


@pytest.mark.usefixtures("_tensorflow")
def test_unknown_task_to_cache(refused: Refused, tmp_path: Path) -> None:
    says = ["'kjv_prefixlm'", "tasks.kjv", "Did you mean 'kjv_prefix_lm'"]
    flags = ["--module=tasks.kjv", "--tasks=kjv_prefixlm", f"--cache_dir={tmp_path / 'cache'}"]
    refused("cache", *flags, says=says)


@pytest.mark.usefixtures("_tensorflow")
def test_cache_into_one_of_another_vocabulary(refused: Refused, other_vocabulary: Path) -> None:
    flags = ["--module=tasks.kjv", "--tasks=kjv_span_corruption", f"--cache_dir={other_vocabulary}"]
    refused("cache", *flags, says=[*ANOTHER, "--overwrite"])


@pytest.mark.usefixtures("_tensorflow")
def test_text_with_flaws(text: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Only whitespace is dropped and invalid UTF-8 replaced; both are counted and said."""
    documents = [b"In the beginning\xff was \xc3\x28 the word", b" \n\t ", b"and the word was"]
    for i, document in enumerate(documents):
        (text / f"{i}.txt").write_bytes(document)
    with caplog.at_level("INFO"):
        assert main(cache_flags(text, "flaws", BYTES, "--validation_fraction=0")) == 0
    assert "1 empty ones dropped, 2 invalid bytes replaced" in caplog.text
    cache = text.parent / "cache"
    task = cache_format.read_task(cache, "flaws_span_corruption")
    assert task is not None
    split = cache_format.read_corpus(cache, task.corpus).splits["train"]
    assert (split.records, split.dropped_documents, split.replaced_bytes) == (2, 1, 2)
    replaced = documents[0].decode(errors="replace").encode()
    assert split.tokens["targets"] == len(replaced) + len(documents[2])


EXPERTS_GIN = """
from __gin__ import dynamic_registration
from t5x_like.layers import mlp
from t5x_like.layers.moe import dispatch
from t5x_like.layers.moe import layer
from t5x_like.layers.moe import routers
from t5x_like.models import block
from t5x_like.parallel import mesh
block.BlockConfig.mlp = @layer.MoeConfig()
layer.MoeConfig:
  num_experts = 6
  expert = @mlp.MlpConfig()
  router = @routers.TopKRouter()
  dispatcher = @dispatch.DispatcherConfig()
routers.TopKRouter.k = 2
"""


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("routers.TopKRouter.k=7", ["k 7", "num_experts 6", "choose k of at most 6"]),
        (
            "dispatch.DispatcherConfig.capacity_factor=1.25",
            ["capacity_factor is 1.25", "kind 'dropless'", "choose kind 'capacity'"],
        ),
        ("MESH={'data': 2, 'expert': 4}", ["'experts'", "size 6", "expert 4", "divide 6"]),
    ],
)
def test_experts(refused_train: Refused, tmp_path: Path, flag: str, says: list[str]) -> None:
    file = tmp_path / "experts.gin"
    file.write_text(EXPERTS_GIN)
    refused_train(f"--gin_file={file}", *SMALL, f"--gin.{flag}", says=says)
