"""A converted Hugging Face model, by its own tokenizer: what `transformers` generates."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from t5x_like.cli.main import main

torch = pytest.importorskip("torch", reason="the oracle is transformers on torch")
transformers = pytest.importorskip("transformers", reason="the oracle")

# Id 0 is an ordinary word, as GPT-2's "!" is.
WORDS = ["the", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(60))]
PROMPTS = ["the w1 w2", "w7 w8 w9 w10 the the", "w3"]


def save(directory) -> transformers.LlamaForCausalLM:
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    return model


def test_infer_as_transformers_does(tmp_path, capsys) -> None:
    theirs = save(tmp_path)
    ours = tmp_path / "ours"
    assert main(["convert", f"--from={tmp_path}", f"--to={ours}"]) == 0
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    flags = [f"--input={path}", "--output=-", "--gin.MAX_NEW_TOKENS=8", "--gin.BATCH_SIZE=4"]
    capsys.readouterr()
    assert main(["infer", str(ours), *flags]) == 0
    found = [json.loads(line)["prediction"] for line in capsys.readouterr().out.splitlines()]
    for prompt, text in zip(PROMPTS, found, strict=True):
        ids = [1, *(WORDS.index(word) for word in prompt.split())]
        (generated,) = theirs.generate(
            torch.tensor([ids]), max_new_tokens=8, do_sample=False, pad_token_id=3
        ).tolist()
        new = generated[len(ids) :]
        new = new[: new.index(2)] if 2 in new else new
        assert text.split() == [WORDS[i] for i in new if i not in (1, 2, 3)]


def test_scores_are_those_of_transformers(tmp_path, capsys) -> None:
    theirs = save(tmp_path)
    ours = tmp_path / "ours"
    assert main(["convert", f"--from={tmp_path}", f"--to={ours}"]) == 0
    path = tmp_path / "asked.jsonl"
    path.write_text('{"inputs": "the w1 w2", "targets": "the w5 the"}\n')
    flags = [f"--input={path}", "--output=-", "--mode=score", "--gin.BATCH_SIZE=4"]
    capsys.readouterr()
    assert main(["infer", str(ours), *flags]) == 0
    (found,) = [json.loads(line)["score"] for line in capsys.readouterr().out.splitlines()]
    words = ["the", "w1", "w2", "the", "w5", "the"]
    ids = torch.tensor([[1, *(WORDS.index(word) for word in words)]])
    with torch.no_grad():
        log_probs = theirs(ids).logits[0].log_softmax(-1)
    expected = sum(float(log_probs[i, ids[0, i + 1]]) for i in (3, 4, 5))
    # float32, three tokens.
    assert found == pytest.approx(expected, abs=1e-4)
