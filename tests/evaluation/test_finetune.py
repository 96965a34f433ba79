"""Fine-tuning: habits of T5X, generated text, partial loading, freezing, early stopping."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import traverse_util
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from t5x_like.config import gin_config
from t5x_like.errors import UserError
from t5x_like.training import hooks
from t5x_like.training.checkpoints import CheckpointConfig
from t5x_like.training.loop import StepInfo, Stop
from t5x_like.training.optimizers.adafactor import AdafactorConfig
from t5x_like.training.run import TrainRun
from tests.evaluation.conftest import FINETUNE, T5

# Two evaluations, of all that is to be seen in one run.
TUNE = [
    "--gin.TRAIN_STEPS_RELATIVE=2",
    "--gin.EVAL_PERIOD=2",
    "--gin.MIXTURE_OR_TASK_NAME=tiny_copy",
]
READ_ONLY = ocp.CheckpointManagerOptions(read_only=True)
NO_TEXT = "--gin.run.TrainRun.inference_eval=None"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def state(model_dir: Path, step: int) -> dict:
    """Arrays of a checkpoint by name."""
    directory = model_dir / "checkpoints" / str(step) / "state"
    tree = ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(directory)
    return traverse_util.flatten_dict(tree, sep="/")


def params(model_dir: Path, step: int) -> dict:
    found = state(model_dir, step)
    return {n.removeprefix("params/"): v for n, v in found.items() if n.startswith("params/")}


def error(capfd: pytest.CaptureFixture[str]) -> str:
    """The one line of a refusal."""
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("t5x_like: error: ")
    return last


# ---- Habits.


def parse(*bindings: str) -> TrainRun:
    files = [flag.removeprefix("--gin_file=") for flag in (*T5, *FINETUNE) if "gin_file" in flag]
    wanted = {
        "MODEL_DIR": "/tmp/unused",
        "MIXTURE_OR_TASK_NAME": "tiny_copy",
        "TASK_FEATURE_LENGTHS": "{'inputs': 24, 'targets': 16}",
        "INITIAL_CHECKPOINT_PATH": "/data/t5",
    }
    return gin_config.parse(files, [f"{k}={v}" for k, v in wanted.items()] + list(bindings)).build(
        TrainRun
    )


def test_t5x_habits() -> None:
    run = parse("TRAIN_STEPS=1020000")
    assert isinstance(run.optimizer, AdafactorConfig)
    schedule = run.schedule.build()
    assert float(schedule(0)) == float(schedule(10**6)) == np.float32(1e-3)
    assert run.model.block.dropout_rate == 0.1 and run.total_steps == 1020000
    assert run.inference_eval.source.names == ("tiny_copy",)
    relative = parse("TRAIN_STEPS_RELATIVE=20000", "INFERENCE_EVAL_TASKS=['a', 'b']")
    assert (relative.total_steps, relative.relative_steps) == (None, 20000)
    assert relative.inference_eval.source.names == ("a", "b")


@pytest.mark.parametrize("run_file", ["finetune", "eval", "infer"])
@pytest.mark.parametrize("decoding", ["greedy", "sample", "beam"])
def test_no_macro_is_dead(run_file, decoding) -> None:
    models = ["gin/models/t5_1_1/tiny.gin", "gin/objectives/seq2seq.gin", "gin/parallel/data.gin"]
    runs = [f"gin/runs/{run_file}.gin", f"gin/decoding/{decoding}.gin"]
    files = [*models, *runs] if run_file == "finetune" else [*runs, *models]
    wanted = ["MODEL_DIR=/tmp/unused", "MIXTURE_OR_TASK_NAME=x", "TASK_FEATURE_LENGTHS={'a': 1}"]
    wanted += ["INITIAL_CHECKPOINT_PATH=/x"] if run_file == "finetune" else []
    statements = gin_config.parse(files, wanted).statements
    # What a model's objective is trained with has no part in asking it.
    of_training = {"OBJECTIVE"} if run_file != "finetune" else set()
    assert statements.macros().keys() - statements.uses.keys() == of_training


def test_loss_of_public_checkpoints() -> None:
    files = ["gin/objectives/seq2seq_public_t5.gin"]
    config = gin_config.parse(files)
    assert config.statements.macros()["LOSS_NORMALIZING_FACTOR"].value == 2048 * 114


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--gin.TRAIN_STEPS=5"], ["INITIAL_CHECKPOINT_PATH", "required"]),
        (["--gin.INITIAL_CHECKPOINT_PATH=/data/t5"], ["TRAIN_STEPS_RELATIVE", "both None"]),
        (
            [
                "--gin.INITIAL_CHECKPOINT_PATH=/data/t5",
                "--gin.TRAIN_STEPS=5",
                "--gin.FROZEN_PARAMETERS=['encodr/.*']",
            ],
            ["'encodr/.*'", "none of the"],
        ),
        (
            [
                "--gin.INITIAL_CHECKPOINT_PATH=/data/t5",
                "--gin.TRAIN_STEPS=5",
                "--gin.inference_eval.InferenceEval.metrics=['blue']",
            ],
            ["'blue'", "Did you mean 'bleu'"],
        ),
    ],
)
def test_refused(flags, says, train, tmp_path, capfd) -> None:
    flags = [*flags, "--gin.MIXTURE_OR_TASK_NAME=tiny_copy"]
    assert train(tmp_path / "run", FINETUNE, *flags) == 2
    line = error(capfd)
    assert [text for text in says if text not in line] == [], line
    assert not (tmp_path / "run").exists()


# ---- Evaluation by generation as training goes.


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, train, pretrained) -> Path:
    model_dir = tmp_path_factory.mktemp("tuned") / "run"
    flags = [
        f"--gin.INITIAL_CHECKPOINT_PATH={pretrained}",
        "--gin.INFERENCE_EVAL_TASKS=['tiny_mixture', 'tiny_choice', 'tiny_unscored']",
        "--gin.FROZEN_PARAMETERS=['encoder/.*', 'token_embedder/.*']",
        "--gin.KEEP_BEST=1",
        "--gin.BEST_METRIC=inference_eval/tiny_copy/bits_per_byte",
    ]
    assert train(model_dir, FINETUNE, *TUNE, *flags) == 0
    return model_dir


def test_inference_eval_of_a_run(tuned) -> None:
    copy = tuned / "inference_eval" / "tiny_copy"
    logged = lines(copy / "metrics.jsonl")
    assert [line["step"] for line in logged] == [4, 6]
    assert {"accuracy", "bits_per_byte"} <= logged[0].keys()
    written = lines(copy / "6.jsonl")
    assert len(written) == 12
    pairs = {(line["inputs"], line["targets"]) for line in written}
    assert ("say ox 0", "ox") in pairs and ("say cow 11", "cow") in pairs
    assert all({"prediction", "log_prob", "score"} <= line.keys() for line in written)
    # The mixture has the mean of what its Tasks have.
    shout = lines(tuned / "inference_eval" / "tiny_shout" / "metrics.jsonl")
    mean = lines(tuned / "inference_eval" / "tiny_mixture" / "metrics.jsonl")
    assert mean[1]["exact_match"] == shout[1]["exact_match"]
    assert not (tuned / "inference_eval" / "tiny_unscored").exists()
    assert lines(tuned / "inference_eval" / "tiny_shout" / "6.jsonl")[0]["targets"].isupper()


def test_score_metrics_see_what_postprocessing_made(tuned) -> None:
    choice = tuned / "inference_eval" / "tiny_choice"
    written = lines(choice / "6.jsonl")
    by_question: dict[int, list] = {}
    for line in written:
        question, right, _ = line["targets"]
        by_question.setdefault(question, []).append((line["score"], right))
    best = [max(choices)[1] for choices in by_question.values()]
    (last,) = [line for line in lines(choice / "metrics.jsonl") if line["step"] == 6]
    assert last["accuracy"] == pytest.approx(100 * sum(best) / len(best))
    assert len(by_question) == 4


def test_tensorboard_has_scalars_and_samples(tuned) -> None:
    events = EventAccumulator(str(tuned / "inference_eval" / "tiny_copy"))
    events.Reload()
    assert {"accuracy", "bits_per_byte"} <= set(events.Tags()["scalars"])
    (text,) = {
        event.tensor_proto.string_val[0] for event in events.Tensors("samples/text_summary")[:1]
    }
    assert b"inputs: say " in text and b"prediction: " in text


def test_frozen_parameters_stay_and_have_no_optimizer_state(tuned) -> None:
    before, after = state(tuned, 4), state(tuned, 6)
    for name in before:
        if name.startswith("params/"):
            frozen = name.startswith(("params/encoder/", "params/token_embedder/"))
            assert np.array_equal(before[name], after[name]) == frozen, name
        else:
            assert "encoder/" not in name.replace("encoder_decoder", "") and "embedder" not in name


# ---- Which parameters are loaded.


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, train, pretrained) -> tuple[Path, str, list[str]]:
    """A run with an assignment map whose rate of 0 makes no evaluation better than the first.

    MODEL_DIR, what it said, and its flags.
    """
    model_dir = tmp_path_factory.mktemp("stopped") / "run"
    rules = [
        (r"decoder/layers/mlp/(\w+)/kernel", r"encoder/layers/mlp/\1/kernel"),
        (r"decoder/logits_dense/.*", None),
    ]
    flags = [
        f"--gin.INITIAL_CHECKPOINT_PATH={pretrained}",
        f"--gin.ASSIGNMENT_MAP={rules!r}",
        "--gin.RANDOM_SEED=3",
        "--gin.TRAIN_STEPS_RELATIVE=50",
        "--gin.EVAL_PERIOD=2",
        "--gin.PATIENCE=2",
        "--gin.schedules.FactorSchedule.base_learning_rate=0.0",
        "--gin.schedules.FactorSchedule.min_learning_rate=0.0",
        "--gin.MIXTURE_OR_TASK_NAME=tiny_copy",
        NO_TEXT,
    ]
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert train(model_dir, FINETUNE, *flags) == 0
    return model_dir, said.getvalue(), flags


def test_assignment_map(stopped, pretrained) -> None:
    theirs, ours = params(pretrained, 4), params(stopped[0], 4)
    fresh = "decoder/logits_dense/kernel"
    assert not np.array_equal(ours[fresh], theirs[fresh])
    for name, value in ours.items():
        if name != fresh:
            source = name
            if name.startswith("decoder/layers/mlp/"):
                source = name.replace("decoder", "encoder", 1)
            np.testing.assert_array_equal(value, theirs[source], err_msg=name)


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ([("decoder/(", None)], ["'decoder/('", "no regular expression"]),
        ([("decodr/.*", None)], ["'decodr/.*'", "first match"]),
        ([("decoder/logits_dense/kernel", "x/y")], ["wants x/y", "not there", "None"]),
        ([("decoder/logits_dense/kernel", r"\2")], [r"\2", "does not suit"]),
        (
            [("decoder/logits_dense/kernel", "token_embedder/embedding")],
            ["(384, 32), not (32, 384)"],
        ),
        ([(".*", None)], ["takes no parameter"]),
    ],
)
def test_bad_assignment_maps(rules, says, train, pretrained, tmp_path, capfd) -> None:
    flags = [f"--gin.INITIAL_CHECKPOINT_PATH={pretrained}", f"--gin.ASSIGNMENT_MAP={rules!r}"]
    assert train(tmp_path / "run", FINETUNE, *TUNE, *flags, NO_TEXT) == 2
    line = error(capfd)
    assert [text for text in says if text not in line] == [], line
    assert not (tmp_path / "run").exists()


# ---- Early stopping, and keeping the best.


def test_early_stopping_and_restart(stopped, train) -> None:
    model_dir, said, flags = stopped
    assert "early stopping at step 8: validation/loss" in said
    evaluated = lines(model_dir / "training_eval" / "tiny_copy" / "metrics.jsonl")
    assert [line["step"] for line in evaluated] == [4, 6, 8]
    assert (model_dir / "checkpoints" / "8").is_dir()
    # Started again it knows that it is over.
    assert train(model_dir, FINETUNE, *flags) == 0
    assert lines(model_dir / "train" / "metrics.jsonl")[-1]["step"] == 8


class Evaluations:
    """Values of a metric by step, as an EvalHook would have them; counts saves."""

    def __init__(self, values: dict[int, float], history: list[float], **config) -> None:
        self.saved: list[int] = []
        self.hook = hooks.BestHook(
            CheckpointConfig(best_metric="a/b", **config),
            latest=lambda step: {"a/b": values[step]} if step in values else {},
            save=lambda info: self.saved.append(info.step),
            history=history,
        )

    def run(self, last: int) -> int | None:
        """The step at which it stops, if it does."""
        for step in range(last + 1):
            try:
                self.hook(StepInfo(step, None, {} if step else None, None, None, 0.0, False))
            except Stop:
                return step
        return None


def test_every_new_best_is_saved() -> None:
    values = {2: 1.0, 4: 2.0, 6: 0.5, 8: 0.5}
    smaller = Evaluations(values, [], keep_best=1)
    assert smaller.run(9) is None and smaller.saved == [2, 6]
    larger = Evaluations(values, [0.9], keep_best=1, best_mode="max")
    assert larger.run(9) is None and larger.saved == [2, 4]


def test_patience_goes_on_after_a_restart() -> None:
    values = {2: 3.0, 4: 1.0, 6: 2.0, 8: float("nan"), 10: 0.0}
    assert Evaluations(values, [], patience=2).run(11) == 8
    assert Evaluations({}, [1.0, 2.0, 3.0], patience=2).run(11) == 0
    assert Evaluations({2: 0.5}, [1.0, 2.0], patience=2).run(11) is None


def test_best_metric_that_is_none() -> None:
    hook = Evaluations({2: 1.0}, [], keep_best=1).hook
    hook._config = CheckpointConfig(best_metric="a/c")
    with pytest.raises(UserError, match=r"'a/c' is no metric.*Did you mean 'a/b'"):
        hook(StepInfo(2, None, {}, None, None, 0.0, False))


def test_checkpoints_carry_what_they_are_ranked_by(tuned) -> None:
    with ocp.CheckpointManager(tuned / "checkpoints", options=READ_ONLY) as manager:
        for line in lines(tuned / "inference_eval" / "tiny_copy" / "metrics.jsonl"):
            metrics = manager.metrics(line["step"])
            assert metrics["inference_eval/tiny_copy/bits_per_byte"] == line["bits_per_byte"]
