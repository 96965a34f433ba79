"""Metric functions against hand-computed values and other people's definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from t5x_like.errors import UserError
from t5x_like.evaluation import metrics


def test_accuracy_and_exact_match() -> None:
    assert metrics.accuracy(["a", "b ", "c", "d"], ["a", "b", "x", ""]) == {"accuracy": 50.0}
    assert metrics.accuracy([1, 2], [1, 3]) == {"accuracy": 50.0}
    assert metrics.exact_match([], []) == {"exact_match": 0.0}
    with pytest.raises(ValueError, match="argument"):
        metrics.accuracy(["a"], [])


def test_f1_of_classes() -> None:
    targets = ["x", "x", "x", "y"]
    predictions = ["x", "x", "y", "junk"]
    # x: precision 1, recall 2/3, F1 0.8. y: precision 0, recall 0, F1 0. Junk is a miss.
    assert metrics.f1_macro(targets, predictions)["f1_macro"] == pytest.approx(40.0)
    assert metrics.f1_weighted(targets, predictions)["f1_weighted"] == pytest.approx(60.0)
    # Over both classes: 2 right, 3 predicted as one of them, 4 targets.
    assert metrics.f1_micro(targets, predictions)["f1_micro"] == pytest.approx(100 * 4 / 7)


@pytest.mark.parametrize(
    ("positive", "negative"),
    [
        ("yes", "no"),
        ("equivalent", "not_equivalent"),
        ("acceptable", "unacceptable"),
        (1, 0),
        (True, False),
    ],
)
def test_f1_of_the_positive_class(positive, negative) -> None:
    targets = [positive, positive, negative, negative]
    predictions = [positive, negative, positive, "junk"]
    assert metrics.f1_binary(targets, predictions)["f1"] == pytest.approx(50.0)


def test_matthews() -> None:
    same = metrics.matthews_corrcoef(["a", "b", "a"], ["a", "b", "a"])
    opposite = metrics.matthews_corrcoef(["a", "b"], ["b", "a"])
    assert same == {"matthews_corrcoef": 100.0} and opposite == {"matthews_corrcoef": -100.0}


def test_correlations() -> None:
    targets, predictions = ["1.0", "2.0", "3.0", "4.0"], ["1", "4", "9", "16"]
    expected = 100 * np.corrcoef([1, 2, 3, 4], [1, 4, 9, 16])[0, 1]
    assert metrics.pearson(targets, predictions)["pearson_corrcoef"] == pytest.approx(expected)
    assert metrics.spearman(targets, predictions)["spearman_corrcoef"] == pytest.approx(100.0)
    # What is no number is -1.
    worse = metrics.spearman(targets, ["1", "4", "9", "what?"])["spearman_corrcoef"]
    assert worse == pytest.approx(100 * np.corrcoef([1, 2, 3, 4], [2, 3, 4, 1])[0, 1])
    assert math.isnan(metrics.pearson(targets, ["1"] * 4)["pearson_corrcoef"])


def test_edit_distance() -> None:
    found = metrics.edit_distance(["kitten", "abc", ""], ["sitting", "abc", "xy"])
    assert found["edit_distance"] == pytest.approx((3 + 0 + 2) / 3)
    assert found["edit_distance_median"] == 2.0
    assert found["edit_similarity"] == pytest.approx(100 * (4 / 7 + 1 + 0) / 3)


def test_bleu_is_sacrebleus() -> None:
    # From sacrebleu's own test of its effective order: one n-gram away from the reference.
    score = metrics.bleu(["The dog bit the man."], ["The dog bit the man."])["bleu"]
    assert score == pytest.approx(100.0)
    several = metrics.bleu([["a b c d e", "the cat sat on the mat"]], ["the cat sat on the mat"])
    assert several["bleu"] == pytest.approx(100.0)
    # Brevity: 4 of 5 words, all n-grams right: exp(1 - 5/4).
    short = metrics.bleu(["a b c d e"], ["a b c d"])["bleu"]
    assert short == pytest.approx(100 * math.exp(-0.25))
    assert metrics.bleu([], []) == {"bleu": 0.0}
    uneven = metrics.bleu([["a b c d"], ["x", "e f g h"]], ["a b c d", "e f g h"])
    assert uneven["bleu"] == pytest.approx(100.0)


def test_rouge() -> None:
    found = metrics.rouge(["a b c d e", "x"], ["a b x d e", "y"])
    # Four of five words; "a b" and "d e" of four pairs; the rest of the mean is 0.
    assert found == pytest.approx({"rouge1": 40.0, "rouge2": 25.0, "rougeLsum": 40.0})
    # Sentence by sentence, order among sentences does not count.
    swapped = metrics.rouge(["the cat sat. a dog ran."], ["a dog ran. the cat sat."])
    assert swapped["rougeLsum"] == pytest.approx(100.0) and swapped["rouge2"] < 100.0


def test_squad() -> None:
    targets = [["The Eiffel Tower!", "Eiffel"], ["two words"], ["a"]]
    predictions = ["eiffel tower", "two other words", "An"]
    found = metrics.squad(targets, predictions)
    # Articles alone normalise to nothing, which equals nothing.
    assert found["em"] == pytest.approx(100 * 2 / 3)
    assert found["f1"] == pytest.approx(100 * (1 + 0.8 + 1) / 3)
    assert metrics.squad(["plain"], ["Plain."]) == {"em": 100.0, "f1": 100.0}


def test_trivia_qa_takes_the_best_alias() -> None:
    targets = [["Sunset Blvd", "West Sunset_Boulevard"], ["Reagan\u2019s"]]
    found = metrics.trivia_qa(targets, ["west sunset boulevard", "reagan s"])
    assert found == {"em": 100.0, "f1": 100.0}
    # SQuAD's normalisation joins what punctuation had kept apart.
    assert metrics.squad(targets[:1], ["west sunset boulevard"])["em"] == 0.0


def test_perplexity_and_bits_per_byte() -> None:
    scores = [-2 * math.log(2), -4 * math.log(2)]
    found = metrics.perplexity(["ab", "\u00e9"], scores, {"num_tokens": [2, 4]})
    assert found["perplexity"] == pytest.approx(2.0)
    # Six bits for four bytes.
    assert metrics.bits_per_byte(["ab", "\u00e9"], scores)["bits_per_byte"] == pytest.approx(1.5)


TARGETS = [(0, False, "long wrong choice"), (0, True, "ok"), (1, True, "a"), (1, False, "b")]
SCORES = [-3.0, -4.0, -1.0, -2.0]


def test_rank_classification() -> None:
    found = metrics.rank_classification(TARGETS, SCORES)
    assert found["accuracy"] == 50.0
    # Per byte: -3/17 against -4/2; the long one wins again.
    assert found["accuracy_normalized"] == 50.0
    longer = [(0, False, "x"), (0, True, "a long right choice")]
    assert metrics.rank_classification(longer, [-2.0, -3.0]) == {
        "accuracy": 0.0,
        "accuracy_normalized": 100.0,
    }


def test_truthful_qa() -> None:
    found = metrics.truthful_qa(TARGETS, SCORES)
    second = 1 / (1 + math.e)
    assert found["mc1"] == 50.0
    assert found["mc2"] == pytest.approx(100 * (second + 1 - second) / 2)
    several = metrics.truthful_qa(
        [(0, True, "a"), (0, True, "b"), (0, False, "c")], [-1.0, -1.0, -1.0]
    )
    assert several["mc2"] == pytest.approx(100 * 2 / 3)


def test_pass_at_k() -> None:
    metric = metrics.pass_at_k(lambda target, sample: target == sample, ks=(1, 2, 4))
    found = metric(["x", "y"], [["x", "a", "x", "b"], ["a", "b", "c", "d"]])
    # 2 of 4 right: one draw 1/2; two draws 1 - C(2,2)/C(4,2) = 5/6; four 1. The other: 0.
    assert found["pass@1"] == pytest.approx(100 * 0.5 / 2)
    assert found["pass@2"] == pytest.approx(100 * (5 / 6) / 2)
    assert found["pass@4"] == pytest.approx(50.0)
    with pytest.raises(UserError, match=r"pass@4 needs 4 samples.*one has 1"):
        metric(["x"], ["x"])
    assert metrics.parameters(metric) == ("targets", "predictions")


def test_names() -> None:
    assert metrics.named("squad") is metrics.squad
    with pytest.raises(UserError, match=r"no metric 'rogue'. Did you mean 'rouge'"):
        metrics.named("rogue")
    with pytest.raises(UserError, match="no metric 'named'"):
        metrics.named("named")
    with pytest.raises(UserError, match=r"'odd' takes \('a',\)"):
        metrics.parameters(odd)


def odd(a):
    return {}
