"""Bad prompts through the command line: said clearly, counted, and the rest is done."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import seqio

from t5x_like.cli.main import main
from t5x_like.data import seqio_tasks
from tests.cache.conftest import remove


@pytest.fixture
def infer(tiny_cache, tmp_path, capsys):
    """Runs `t5x_like infer` on a file; returns exit code, lines of output, last of stderr."""

    def run(model_dir: Path, text: str, *flags: str, suffix: str = "txt"):
        path = tmp_path / f"asked.{suffix}"
        path.write_text(text)
        fixed = [f"--gin.CACHE_DIR={tiny_cache}", "--gin.MAX_NEW_TOKENS=5", "--gin.BATCH_SIZE=4"]
        code = main(["infer", str(model_dir), f"--input={path}", "--output=-", *fixed, *flags])
        said = capsys.readouterr()
        found = [json.loads(line) for line in said.out.splitlines()]
        return code, found, (said.err.strip().splitlines() or [""])[-1]

    return run


def test_longer_than_the_model_allows(infer, decoder) -> None:
    """48 positions, of which five are for the answer, one for BOS and one for EOS."""
    text = f"{'x' * 41}\n{'x' * 42}\nsay ox\n"
    code, found, line = infer(decoder, text)
    assert code == 2 and "1 of 3 prompts were refused" in line
    assert "44 tokens, and 43 are allowed" in line and "TRUNCATE" in line
    assert ["error" in row for row in found] == [False, True, False]
    # By the policy that is asked for, one side is cut: the last or the first letters stay.
    for side, same in (("start", 0), ("end", 0)):
        code, cut, _ = infer(decoder, text, f"--gin.TRUNCATE={side}")
        assert code == 0 and cut[1]["prediction"] == cut[same]["prediction"]
    code, cut, _ = infer(decoder, f"{'y' * 30}{'x' * 41}\n{'x' * 41}\n", "--gin.TRUNCATE=start")
    assert code == 0 and cut[0]["prediction"] == cut[1]["prediction"]


def test_examples_of_a_task_that_are_too_long(decoder, tiny_cache, tmp_path, capsys) -> None:
    """Its lengths leave no room for the answer: refused one by one, like lines of a file."""
    output = tmp_path / "out.jsonl"
    flags = [f"--gin.CACHE_DIR={tiny_cache}", "--task=tiny_copy", "--gin.MAX_NEW_TOKENS=38"]
    code = main(["infer", str(decoder), *flags, f"--output={output}"])
    line = capsys.readouterr().err.strip().splitlines()[-1]
    found = [json.loads(row) for row in output.read_text().splitlines()]
    refused = ["error" in row for row in found]
    assert code == 2 and f"{sum(refused)} of 12 prompts were refused" in line
    assert 0 < sum(refused) < 12
    # The others are evaluated, and those refused are counted.
    flags = [f"--gin.CACHE_DIR={tiny_cache}", "--tasks=tiny_copy", "--gin.MAX_NEW_TOKENS=38"]
    flags += [f"--gin.EVAL_OUTPUT_DIR={tmp_path}", "--metrics=['exact_match']"]
    assert main(["eval", str(decoder), *flags]) == 2
    said = capsys.readouterr()
    assert f"{sum(refused)} of 12 examples were refused" in said.err.strip().splitlines()[-1]
    assert "tiny_copy, example " in said.err and f"refused {sum(refused)}." in said.out
    written = (tmp_path / "tiny_copy" / "2.jsonl").read_text().splitlines()
    assert len(written) == 12 - sum(refused)


def test_a_file_to_evaluate_with_lines_that_are_too_long(decoder, tmp_path, capsys) -> None:
    path = tmp_path / "asked.jsonl"
    asked = [("say ox", "ox"), ("x" * 60, "ox"), ("say ox", "y" * 60), ("say hen", "hen")]
    path.write_text("".join(json.dumps({"inputs": i, "targets": t}) + "\n" for i, t in asked))
    flags = [f"--input={path}", "--gin.MAX_NEW_TOKENS=4", f"--gin.EVAL_OUTPUT_DIR={tmp_path}"]
    code = main(["eval", str(decoder), *flags, "--metrics=['exact_match','bits_per_byte']"])
    said = capsys.readouterr()
    line = said.err.strip().splitlines()[-1]
    assert (
        code == 2 and "2 of 4 lines" in line and "asked.jsonl:2: the prompt has 62 tokens" in line
    )
    assert "refused 2" in said.out
    written = (tmp_path / "asked" / "2.jsonl").read_text().splitlines()
    assert [json.loads(row)["targets"] for row in written] == ["ox", "hen"]


@pytest.mark.parametrize("verb", ["infer", "eval"])
def test_no_room_for_any_prompt(verb, decoder, tmp_path, capsys) -> None:
    path = tmp_path / "asked.jsonl"
    path.write_text('{"inputs": "say ox", "targets": "ox"}\n')
    metric = ["--metrics=['exact_match']"] if verb == "eval" else ["--output=-"]
    flags = [f"--input={path}", "--gin.MAX_NEW_TOKENS=48", *metric]
    assert main([verb, str(decoder), *flags]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "MAX_NEW_TOKENS = 48 leaves no room" in line and "48 positions" in line


@pytest.mark.parametrize("kind", ["pretrained", "decoder"])
def test_empty_prompts(kind, infer, request) -> None:
    code, found, line = infer(request.getfixturevalue(kind), "say ox\n\n   \n")
    assert code == 2 and "2 of 3 prompts were refused" in line
    assert "asked.txt:2: the prompt is empty" in line
    assert ["error" in row for row in found] == [False, True, True]


def test_a_stop_sequence_that_never_comes(infer, pretrained) -> None:
    stops = "--gin.sampling.Sampling.stop_sequences=((380, 381, 382),)"
    code, found, _ = infer(pretrained, "say ox\nsay hen\n", stops)
    assert code == 0 and found == infer(pretrained, "say ox\nsay hen\n")[1]


def test_no_targets_to_score(infer, pretrained) -> None:
    lines = ['{"inputs": "say ox", "targets": "ox"}', '{"inputs": "say ox"}', '"say"', "{"]
    text = "".join(f"{line}\n" for line in lines)
    code, found, line = infer(pretrained, text, "--mode=score", suffix="jsonl")
    assert code == 2 and "3 of 4 prompts were refused" in line
    assert 'asked.jsonl:2: it has no "targets"' in line
    assert ["score" in row for row in found] == [True, False, False, False]
    assert "asked.jsonl:3: a JSON str" in found[2]["error"]
    assert "asked.jsonl:4: not JSON" in found[3]["error"]
    # Text has no targets at all.
    code, found, line = infer(pretrained, "say ox\n", "--mode=score")
    assert code == 2 and '"targets"' in line and "error" in found[0]


def test_an_unknown_metric_as_training_goes(train, pretrained, tmp_path, capfd) -> None:
    flags = [f"--gin.INITIAL_CHECKPOINT_PATH={pretrained}", "--gin.TRAIN_STEPS_RELATIVE=1"]
    flags += ["--gin.MIXTURE_OR_TASK_NAME=tiny_copy", "--gin.EVAL_PERIOD=1", "--gin.KEEP_BEST=1"]
    flags += ["--gin.BEST_METRIC=inference_eval/tiny_copy/bleu"]
    assert train(tmp_path / "run", ["--gin_file=gin/runs/finetune.gin"], *flags) == 2
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert "'inference_eval/tiny_copy/bleu' is no metric" in line


def test_metric_objs_are_left_out_with_a_warning(caplog) -> None:
    """CLU's metric objects, which SeqIO takes in place of functions."""

    def count(targets, predictions):
        return {"count": len(targets) + len(predictions)}

    seqio.TaskRegistry.add(
        "own_objects",
        source=seqio.FunctionDataSource(lambda split, shuffle_files: None, splits=["train"]),
        output_features={"targets": seqio.Feature(seqio.ByteVocabulary())},
        preprocessors=[],
        metric_fns=[count],
        metric_objs=[object()],
    )
    try:
        with caplog.at_level(logging.WARNING):
            functions = seqio_tasks.load_functions("own_objects", None)
        assert functions.metric_fns == (count,)
        assert "own_objects has metric_objs, which are left out" in caplog.text
    finally:
        remove("own")
