"""Sequences, sentence pairs and masking, on the embedded corpus' vocabulary."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest

from t5x_like.data import denoisers, encoder_steps, vocabularies
from t5x_like.data.cache_format import OutputFeature
from t5x_like.data.denoisers import Context
from t5x_like.data.encoder_steps import FullSentences, MaskTokens, Passages, SentencePairs
from t5x_like.data.lexicon import lexicon
from t5x_like.data.mixtures import generator
from t5x_like.data.ragged import Ragged
from t5x_like.errors import UserError

VOCABULARY = vocabularies.load("tasks/kjv/vocabulary.model")
CLS, SEP, MASK = 8191, 8190, 8189
TEXT = (
    "In the beginning God created the heaven and the earth. And the earth was without form, and "
    "void. And God said, Let there be light! Was there light? There was light. Nebuchadnezzar "
    "went up to Shiloh, and Melchizedek with him. "
)


def context(inputs: int = 32, targets: int = 8) -> Context:
    feature = OutputFeature(vocabulary=VOCABULARY.spec)
    return Context(
        lengths={"inputs": inputs, "targets": targets},
        features={"inputs": feature, "targets": feature},
    )


def text_documents(count: int = 5) -> Ragged:
    """Documents of different length; document i begins at another place of the text."""
    ids = np.array(VOCABULARY.encode(TEXT * 8))
    return Ragged.from_rows([ids[7 * i : 7 * i + 90 + 13 * i] for i in range(count)])


def numbered_documents(count: int = 6) -> Ragged:
    """Documents whose tokens tell document and place: 1000 + 100 * document + place."""
    return Ragged.from_rows([1000 + 100 * i + np.arange(60 + 3 * i) for i in range(count)])


def run(step: Any, examples: dict[str, Ragged], *, seed: int = 0, **lengths: int) -> Any:
    return step.apply(examples, context(**lengths), generator(seed, position=0))


# The vocabulary


def test_special_ids_are_the_last_three_sentinels_or_the_named_pieces():
    words = lexicon(VOCABULARY.spec)
    assert (words.cls_id, words.sep_id, words.mask_id) == (CLS, SEP, MASK)
    assert words.special[[0, 1, CLS, SEP, MASK, 8092]].all()
    assert not words.special[[2, 6, 300, 8091]].any()


def word_piece(tmp_path: Any, names: list[str]) -> str:
    pieces = ["[PAD]", *names, "[UNK]", "jump", "##ing", ".", "?"]
    model = {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": {piece: i for i, piece in enumerate(pieces)},
    }
    added = [
        {"id": i, "content": p, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for i, p in enumerate(pieces[: len(names) + 2])
    ]  # fmt: skip
    path = tmp_path / "tokenizer.json"
    path.write_text(
        json.dumps(
            {
                "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
                "normalizer": None, "pre_tokenizer": {"type": "BertPreTokenizer"},
                "post_processor": None, "decoder": {"type": "WordPiece", "prefix": "##",
                "cleanup": True}, "model": model,
            }
        )
    )  # fmt: skip
    return str(path)


@pytest.mark.parametrize("names", [["[CLS]", "[SEP]", "[MASK]"], ["</s>", "<mask>", "<s>"]])
def test_named_pieces_are_the_special_ones(tmp_path, names):
    words = lexicon(vocabularies.load(word_piece(tmp_path, names), extra_ids=4).spec)
    special = {"[CLS]": 1, "[SEP]": 2, "[MASK]": 3} if "[CLS]" in names else None
    expected = list(special.values()) if special else [3, 1, 2]
    assert [words.cls_id, words.sep_id, words.mask_id] == expected
    assert words.starts_word[5] and not words.starts_word[6]  # jump ##ing
    assert words.ends_sentence.nonzero()[0].tolist() == [7, 8]
    assert len(words.special) == len(words.starts_word) == 13


def test_without_named_pieces_or_sentinels_nothing_is_special(tmp_path):
    spec = vocabularies.load(word_piece(tmp_path, ["[SEP]"]), extra_ids=2).spec
    with pytest.raises(UserError, match=r"no \[CLS\], .* and 2 sentinels; .* needs 3"):
        lexicon(spec)


def test_words_of_bytes():
    words = lexicon(vocabularies.Bytes().spec)
    ids = np.array(vocabularies.Bytes().encode("so it is."))
    assert words.starts_word[ids].nonzero()[0].tolist() == [2, 5]
    assert words.ends_sentence[ids].nonzero()[0].tolist() == [8]


# Sequences


def test_full_sentences_keep_every_token_in_order():
    documents = text_documents()
    out = run(FullSentences(), {"targets": documents})
    inputs = out["inputs"]
    assert inputs.lengths[:-1].tolist() == [32] * (len(inputs) - 1)
    assert {int(row[0]) for row in inputs} == {CLS} and {int(row[-1]) for row in inputs} == {SEP}
    inside = np.concatenate([row[1:-1] for row in inputs])
    expected = np.concatenate([np.append(row, SEP) for row in documents])
    np.testing.assert_array_equal(inside, expected)
    assert not out["token_types"].values.any()


def test_passages_keep_to_their_document_and_carry_its_label():
    documents = numbered_documents()
    labels = Ragged.from_rows([[10 + i] for i in range(len(documents))])
    out = run(Passages(), {"targets": documents, "label": labels})
    found = Counter()
    for row, label in zip(out["inputs"], out["label"], strict=True):
        assert row[0] == CLS and row[-1] == SEP and len(row) <= 32
        assert set((row[1:-1] - 1000) // 100) == {label[0] - 10}
        found[int(label[0]) - 10] += len(row) - 2
    assert found == {i: len(document) for i, document in enumerate(documents)}
    assert "label" not in run(Passages(), {"targets": documents})


def pairs(**kwargs: Any) -> list[tuple[np.ndarray, np.ndarray, int]]:
    out = run(SentencePairs(), **kwargs)
    found = []
    rows = zip(out["inputs"], out["token_types"], out["label"], strict=True)
    for row, types, label in rows:
        assert row[0] == CLS and row[-1] == SEP
        middle = int(np.flatnonzero(row == SEP)[0])
        assert (row == SEP).sum() == 2 and len(row) <= 32
        np.testing.assert_array_equal(types, np.arange(len(row)) > middle)
        found.append((row[1:middle], row[middle + 1 : -1], int(label[0])))
    return found


def test_pairs_belong_together_or_come_from_two_documents():
    documents = numbered_documents()
    labels = []
    for seed in range(40):
        for a, b, label in pairs(examples={"targets": documents}, seed=seed):
            assert len(a) and len(b)
            assert (np.diff(a) == 1).all() and (np.diff(b) == 1).all()
            if label == 0:
                assert b[0] == a[-1] + 1
            else:
                assert (b[0] - 1000) // 100 != (a[0] - 1000) // 100
            labels.append(label)
    # Two standard deviations of a fair coin.
    assert abs(np.mean(labels) - 0.5) < 1 / np.sqrt(len(labels))


def test_pairs_that_belong_together_are_the_whole_text():
    documents = numbered_documents()
    together = SentencePairs(random_fraction=0.0)
    inputs = run(together, {"targets": documents})["inputs"]
    tokens = inputs.values[inputs.values < 8000]
    np.testing.assert_array_equal(tokens, documents.values)


def test_pairs_are_split_at_sentences_where_there_are_any():
    words = lexicon(VOCABULARY.spec)
    inside = 0
    for seed in range(20):
        for a, b, label in pairs(examples={"targets": text_documents()}, seed=seed):
            if not words.ends_sentence[a[-1]]:
                inside += 1
                assert words.starts_word[b[0]]
                window = np.append(a, b[:-1])
                assert label == 1 or not words.ends_sentence[window].any()
    assert inside


def test_one_document_gives_pairs_too():
    only = Ragged.from_rows([1000 + np.arange(100)])
    labels = set()
    for seed in range(10):
        for a, b, label in pairs(examples={"targets": only}, seed=seed):
            labels.add(label)
            assert (b[0] == a[-1] + 1) == (label == 0)
    assert labels == {0, 1}
    ((a, b, label),) = pairs(examples={"targets": Ragged.from_rows([1000 + np.arange(20)])})
    assert label == 0 and len(a) + len(b) == 20


@pytest.mark.parametrize("step", [FullSentences(), Passages(), SentencePairs()])
def test_nothing_gives_nothing_and_short_lengths_are_refused(step):
    empty = {"targets": Ragged.from_rows([]), "label": Ragged.from_rows([])}
    out = run(step, empty)
    assert len(out["inputs"]) == 0
    masked = run(MaskTokens(), out)
    assert len(masked["targets"]) == len(masked["target_positions"]) == 0
    with pytest.raises(UserError, match=f"length 3 is too short for {type(step).__name__}"):
        run(step, empty, inputs=3)


# Masking


def masked(*, seed: int = 0, rows: int = 200, **fields: Any) -> Any:
    """(original, masked, chosen places) of sequences of different length."""
    ids = np.array(VOCABULARY.encode(TEXT * 4))
    rng = np.random.default_rng(1)
    texts = [ids[rng.integers(50) :][: rng.integers(1, 100)] for _ in range(rows)]
    inputs = Ragged.from_rows([[CLS, *text, SEP] for text in texts])
    out = run(
        MaskTokens(**fields), {"inputs": inputs, "label": inputs}, seed=seed, inputs=128, targets=14
    )
    assert out["label"] is inputs
    return inputs, out["inputs"], out["targets"], out["target_positions"]


@pytest.mark.parametrize("whole_words", [False, True])
def test_targets_are_what_was_there_and_the_rest_is_untouched(whole_words):
    inputs, noised, targets, places = masked(whole_words=whole_words)
    for before, after, target, place in zip(inputs, noised, targets, places, strict=True):
        np.testing.assert_array_equal(before[place], target)
        assert (np.diff(place) > 0).all()
        assert not set(target) & {CLS, SEP}
        untouched = np.ones(len(before), bool)
        untouched[place] = False
        np.testing.assert_array_equal(before[untouched], after[untouched])


def test_count_is_exact():
    inputs, _, targets, _ = masked()
    expected = np.clip(np.rint(0.15 * inputs.lengths), 1, 14)
    np.testing.assert_array_equal(targets.lengths, expected)
    assert expected.max() == 14 and (0.15 * inputs.lengths).max() > 14.5


def test_eighty_ten_ten():
    count = Counter()
    words = lexicon(VOCABULARY.spec)
    for seed in range(10):
        _, noised, targets, places = masked(seed=seed)
        for after, target, place in zip(noised, targets, places, strict=True):
            for now, before in zip(after[place], target, strict=True):
                kind = "mask" if now == MASK else "same" if now == before else "random"
                count[kind] += 1
                assert now == MASK or not words.special[now]
    total = sum(count.values())
    for kind, share in (("mask", 0.8), ("same", 0.1), ("random", 0.1)):
        deviation = np.sqrt(share * (1 - share) / total)
        assert abs(count[kind] / total - share) < 4 * deviation, (kind, count)


def test_every_token_is_as_likely():
    """Of a sequence of 20 tokens, all places are chosen equally often (chi-squared)."""
    inputs = Ragged.from_rows([[CLS, *range(300, 318), SEP]] * 4000)
    places = run(MaskTokens(), {"inputs": inputs})["target_positions"].values
    observed = np.bincount(places, minlength=20)
    assert observed[0] == observed[19] == 0
    expected = 4000 * 3 / 18
    assert ((observed[1:19] - expected) ** 2 / expected).sum() < 42.3  # 99.9% of 17 degrees


def test_whole_words_are_masked_whole():
    words = lexicon(VOCABULARY.spec)
    inputs, _, targets, places = masked(whole_words=True, mask_fraction=1.0,
                                                   random_fraction=0.0)  # fmt: skip
    long = 0
    for before, place in zip(inputs, places, strict=True):
        starts = words.starts_word[before] | words.special[before]
        starts[1] = True  # what stands after [CLS] begins a word
        word = np.cumsum(starts)
        for chosen in set(word[place]):
            inside = np.flatnonzero(word == chosen)
            assert set(inside) <= set(place)
            long += len(inside) > 1
    assert long > 50
    quota = np.clip(np.rint(0.15 * inputs.lengths), 1, 14)
    assert (targets.lengths <= quota).all()
    # BERT's rule leaves room only where no word is left that fits.
    assert targets.lengths.sum() > 0.95 * quota.sum()


def test_noise_follows_the_generator():
    first, again, other = (masked(seed=s)[1].values for s in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.1


def test_inputs_are_not_changed_in_place():
    inputs = Ragged.from_rows([[CLS, *range(300, 330), SEP]])
    before = inputs.values.copy()
    run(MaskTokens(), {"inputs": inputs})
    np.testing.assert_array_equal(inputs.values, before)


# Both routes, and the cache's form


@pytest.mark.parametrize("step", [cls() for cls in encoder_steps.STEPS])
def test_steps_survive_the_manifest(step):
    assert denoisers.from_dict(json.loads(json.dumps(step.to_dict()))) == step


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MaskTokens(density=1.5), "MaskTokens.density is 1.5; .* between 0 and 1"),
        (lambda: MaskTokens(random_fraction=0.5), "0.8 and random_fraction 0.5 add up to more"),
        (lambda: SentencePairs(random_fraction=-1), "SentencePairs.random_fraction is -1"),
    ],
)
def test_bad_values_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(
    ("name", "features"),
    [
        ("kjv_masked_lm", {"inputs", "token_types", "targets", "target_positions", "label"}),
        ("kjv_masked_lm_full_sentences", {"inputs", "token_types", "targets", "target_positions"}),
        ("kjv_genre", {"inputs", "token_types", "label"}),
    ],
)
def test_tasks_give_examples_through_seqio(name, features):
    seqio = pytest.importorskip("seqio")
    import tasks.kjv

    lengths = {"inputs": 64, "targets": 10}
    if name == "kjv_genre":
        del lengths["targets"]
    dataset = seqio.get_mixture_or_task(name).get_dataset(
        lengths, split="validation", shuffle=False, num_epochs=1, seed=0
    )
    examples = list(dataset.take(200).as_numpy_iterator())
    assert len(examples) == 200
    for example in examples:
        assert features <= example.keys()
        assert example["inputs"][0] == CLS and example["inputs"][-1] == SEP
        assert len(example["inputs"]) == len(example["token_types"]) <= 64
        if "targets" in features:
            assert len(example["targets"]) == len(example["target_positions"]) <= 10
    if name == "kjv_genre":
        # Ruth stands first among the books held out, in the second genre.
        assert examples[0]["label"].tolist() == [list(tasks.kjv.GENRES).index("history")]
        assert {int(e["label"][0]) for e in examples} <= set(range(6))
