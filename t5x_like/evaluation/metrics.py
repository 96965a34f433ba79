"""Metric functions in SeqIO's manner: (targets, predictions | scores) -> {name: value}.

Shares are percentages, as in T5. `targets` and `predictions` are what a Task's postprocess function
made of the decoded text, `scores` are log-likelihoods of the targets in nats. Where the arithmetic
is somebody's standard (BLEU, ROUGE, F1, correlations), their library does it. A Task may also have
functions of its own; `named` finds those of this module.
"""

from __future__ import annotations

import collections
import inspect
import math
import re
import string
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from t5x_like.errors import UserError, did_you_mean

Scalars = dict[str, float]
MetricFn = Callable[..., Mapping[str, Any]]

# The positional parameters that say what a metric function is given: SeqIO's three, and ours.
SIGNATURES = {
    ("targets", "predictions"),
    ("targets", "predictions", "aux_values"),
    ("targets", "scores"),
    ("targets", "scores", "aux_values"),
}


def parameters(function: MetricFn) -> tuple[str, ...]:
    """Which of `SIGNATURES` a metric function has.

    Raises:
      UserError: none of them.
    """
    found = tuple(
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    )
    if found not in SIGNATURES:
        name = getattr(function, "__name__", repr(function))
        raise UserError(
            f"The metric '{name}' takes {found}: give it the parameters (targets, predictions) or "
            "(targets, scores), and aux_values after them if it needs these."
        )
    return found


def named(name: str) -> MetricFn:
    """The metric function of that name in this module.

    Raises:
      UserError: there is none; with the nearest names.
    """
    functions = {
        key: value
        for key, value in vars(sys.modules[__name__]).items()
        if inspect.isfunction(value) and value.__module__ == __name__ and not key.startswith("_")
    }
    known = [
        key for key, value in functions.items() if "targets" in inspect.signature(value).parameters
    ]
    if name not in known:
        hint = did_you_mean(name, known) or f" Known: {', '.join(sorted(known))}."
        raise UserError(f"There is no metric '{name}'.{hint}")
    return functions[name]


# ---- Equality of labels and texts.


def accuracy(targets: Sequence[Any], predictions: Sequence[Any]) -> Scalars:
    """Share of predictions that equal their target; of strings, whitespace at the ends aside."""
    return {"accuracy": _percent(_equal(t, p) for t, p in _pairs(targets, predictions))}


def exact_match(targets: Sequence[Any], predictions: Sequence[Any]) -> Scalars:
    """The same as `accuracy`, under the name that it has for generated text."""
    return {"exact_match": accuracy(targets, predictions)["accuracy"]}


def _equal(target: Any, prediction: Any) -> bool:
    if isinstance(target, str) and isinstance(prediction, str):
        return target.strip() == prediction.strip()
    return bool(np.array_equal(target, prediction))


def edit_distance(targets: Sequence[str], predictions: Sequence[str]) -> Scalars:
    """Levenshtein distance in characters: mean, median, and the mean per character of targets."""
    pairs = _pairs(targets, predictions)
    distances = np.array([_levenshtein(t, p) for t, p in pairs] or [0])
    longest = np.array([max(len(t), len(p), 1) for t, p in pairs] or [1])
    return {
        "edit_distance": float(distances.mean()),
        "edit_distance_median": float(np.median(distances)),
        "edit_similarity": float(100.0 * (1.0 - distances / longest).mean()),
    }


def _levenshtein(a: str, b: str) -> int:
    """Row by row; each row's insertions by a running minimum (Wagner and Fischer, 1974)."""
    columns = np.arange(len(b) + 1)
    letters = np.array(list(map(ord, b)), np.int64)
    row = columns
    for i, letter in enumerate(map(ord, a), 1):
        replaced = row[:-1] + (letters != letter)
        best = np.concatenate([[i], np.minimum(replaced, row[1:] + 1)])
        row = np.minimum.accumulate(best - columns) + columns
    return int(row[-1])


# ---- Classification.


def f1_macro(targets: Sequence[Any], predictions: Sequence[Any]) -> Scalars:
    """Mean of the F1 of every class that the targets have."""
    return {"f1_macro": _f1(targets, predictions, "macro")}


def f1_micro(targets: Sequence[Any], predictions: Sequence[Any]) -> Scalars:
    """F1 of all decisions together, over the classes that the targets have."""
    return {"f1_micro": _f1(targets, predictions, "micro")}


def f1_weighted(targets: Sequence[Any], predictions: Sequence[Any]) -> Scalars:
    """Mean of the F1 of every class, weighted by its number of targets."""
    return {"f1_weighted": _f1(targets, predictions, "weighted")}


def f1_binary(targets: Sequence[Any], predictions: Sequence[Any]) -> Scalars:
    """F1 of the positive class of yes-or-no questions.

    Labels are booleans, 0 and 1, or words: "no", "false", "negative", and what starts with "not" or
    "un", are negative; every other word that is a target is positive. A prediction that is no
    positive target counts as negative.
    """
    from sklearn import metrics

    positive = {label for label in map(_label, targets) if not _is_negative(label)}
    truth = [_label(t) in positive for t in targets]
    guess = [_label(p) in positive for _, p in _pairs(targets, predictions)]
    return {"f1": 100.0 * float(metrics.f1_score(truth, guess, zero_division=0.0))}


def _is_negative(label: str) -> bool:
    word = label.lower()
    return word in ("no", "false", "negative", "0", "") or word.startswith(("not", "un"))


def matthews_corrcoef(targets: Sequence[Any], predictions: Sequence[Any]) -> Scalars:
    """Matthews's correlation, times 100; a prediction that is no target is a class of its own."""
    from sklearn import metrics

    truth, guess = _labels(targets, predictions)
    return {"matthews_corrcoef": 100.0 * float(metrics.matthews_corrcoef(truth, guess))}


def _f1(targets: Sequence[Any], predictions: Sequence[Any], average: str) -> float:
    from sklearn import metrics

    truth, guess = _labels(targets, predictions)
    settings = {"labels": sorted(set(truth)), "average": average, "zero_division": 0.0}
    return 100.0 * float(metrics.f1_score(truth, guess, **settings))


def _labels(targets: Sequence[Any], predictions: Sequence[Any]) -> tuple[list[str], list[str]]:
    pairs = _pairs(targets, predictions)
    return [_label(t) for t, _ in pairs], [_label(p) for _, p in pairs]


def _label(value: Any) -> str:
    return str(int(value) if isinstance(value, bool | np.bool_) else value).strip()


# ---- Numbers.


def pearson(targets: Sequence[Any], predictions: Sequence[Any]) -> Scalars:
    """Pearson's correlation, times 100. Text that is no number is -1, as in T5; NaN if constant."""
    from scipy import stats

    return {"pearson_corrcoef": _correlation(stats.pearsonr, targets, predictions)}


def spearman(targets: Sequence[Any], predictions: Sequence[Any]) -> Scalars:
    """Spearman's rank correlation, times 100; see `pearson`."""
    from scipy import stats

    return {"spearman_corrcoef": _correlation(stats.spearmanr, targets, predictions)}


def _correlation(function: Any, targets: Sequence[Any], predictions: Sequence[Any]) -> float:
    pairs = _pairs(targets, predictions)
    truth, guess = (np.array([_number(pair[i]) for pair in pairs]) for i in (0, 1))
    if len(pairs) < 2 or np.ptp(truth) == 0 or np.ptp(guess) == 0:
        return math.nan
    return 100.0 * float(function(truth, guess)[0])


def _number(value: Any) -> float:
    try:
        number = float(value)
    except ValueError:
        return -1.0
    return number if math.isfinite(number) else -1.0


# ---- Generated text.


def bleu(targets: Sequence[Any], predictions: Sequence[str]) -> Scalars:
    """Corpus BLEU of sacrebleu (Post, 2018) with its defaults; targets may be lists of references.

    Where examples have different numbers of references, sacrebleu takes what there is.
    """
    import sacrebleu

    pairs = _pairs(targets, predictions)
    if not pairs:
        return {"bleu": 0.0}
    references = [[t] if isinstance(t, str) else list(t) for t, _ in pairs]
    most = max(map(len, references))
    streams: list[Any] = [[r[i] if i < len(r) else None for r in references] for i in range(most)]
    score = sacrebleu.corpus_bleu([p for _, p in pairs], streams)
    return {"bleu": float(score.score)}


def rouge(targets: Sequence[str], predictions: Sequence[str]) -> Scalars:
    """Mean F of ROUGE-1, -2 and -Lsum (rouge-score, no stemming; sentences end at ". " or a line).

    T5's numbers, but for its bootstrap, whose middle is this mean.
    """
    from rouge_score import rouge_scorer

    keys = ("rouge1", "rouge2", "rougeLsum")
    scorer = rouge_scorer.RougeScorer(list(keys))
    totals = collections.Counter[str]()
    pairs = _pairs(targets, predictions)
    for target, prediction in pairs:
        scores = scorer.score(_sentences(target), _sentences(prediction))
        totals.update({key: scores[key].fmeasure for key in keys})
    return {key: 100.0 * totals[key] / max(1, len(pairs)) for key in keys}


def _sentences(text: str) -> str:
    """One sentence a line, as ROUGE-Lsum wants it."""
    return re.sub(r"([.!?]) +", r"\1\n", text)


def squad(targets: Sequence[Any], predictions: Sequence[str]) -> Scalars:
    """SQuAD's exact match and token F1 of normalised answers, the best over a target's answers.

    Normalised (Rajpurkar et al., 2016): lower case, without punctuation and articles.
    """
    return _question_answering(targets, predictions, lambda text: _SQUAD_MARKS.sub("", text))


def trivia_qa(targets: Sequence[Any], predictions: Sequence[str]) -> Scalars:
    """TriviaQA's exact match and token F1, the best over all aliases of the answer.

    Normalised (Joshi et al., 2017) as for SQuAD, but punctuation becomes a space.
    """
    return _question_answering(targets, predictions, lambda text: _TRIVIA_MARKS.sub(" ", text))


def _question_answering(
    targets: Sequence[Any], predictions: Sequence[str], strip_marks: Callable[[str], str]
) -> Scalars:
    def normalised(text: str) -> str:
        return " ".join(_ARTICLES.sub(" ", strip_marks(text.lower())).split())

    exact, overlap = [], []
    for target, prediction in _pairs(targets, predictions):
        answers = [normalised(t) for t in ([target] if isinstance(target, str) else target)]
        guess = normalised(prediction)
        exact.append(max((float(guess == answer) for answer in answers), default=0.0))
        overlap.append(max((_token_f1(answer, guess) for answer in answers), default=0.0))
    return {"em": _percent(exact), "f1": _percent(overlap)}


_SQUAD_MARKS = re.compile(f"[{re.escape(string.punctuation)}]")
# Besides, curly quotes and the acute accent.
_TRIVIA_MARKS = re.compile(f"[{re.escape(string.punctuation)}\u2018\u2019\u00b4]")
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def _token_f1(target: str, prediction: str) -> float:
    truth, guess = target.split(), prediction.split()
    if not truth or not guess:
        return float(truth == guess)
    same = sum((collections.Counter(truth) & collections.Counter(guess)).values())
    return 2.0 * same / (len(truth) + len(guess))


# ---- Log-likelihoods.


def perplexity(
    targets: Sequence[Any], scores: Sequence[float], aux_values: Mapping[str, Sequence[Any]]
) -> Scalars:
    """exp of the mean negative log-likelihood of a target token, end of sequence included.

    `aux_values["num_tokens"]` is the number of tokens of each target.
    """
    del targets
    tokens = float(sum(aux_values["num_tokens"]))
    return {"perplexity": math.exp(min(-float(sum(scores)) / max(tokens, 1.0), 700.0))}


def bits_per_byte(targets: Sequence[str], scores: Sequence[float]) -> Scalars:
    """Bits that the model needs for a UTF-8 byte of the targets' text."""
    count = sum(len(target.encode()) for target in targets)
    return {"bits_per_byte": -float(sum(scores)) / math.log(2.0) / max(count, 1)}


def rank_classification(
    targets: Sequence[tuple[Any, bool, str]], scores: Sequence[float]
) -> Scalars:
    """Multiple choice by log-likelihood: an example a choice (MMLU, HellaSwag, COPA, ...).

    Args:
      targets: (question, whether the choice is right, text of the choice); choices of the same
        question have the same first item.

    Returns:
      `accuracy`: share of questions whose likeliest choice is right;
      `accuracy_normalized`: the same by log-likelihood per byte of the choice's text.
    """
    questions = _by_question(targets, scores)
    plain, per_byte = [], []
    for choices in questions:
        right = [bool(is_right) for is_right, _, _ in choices]
        plain.append(right[_first_best(score for _, _, score in choices)])
        lengths = [max(1, len(text.encode())) for _, text, _ in choices]
        relative = (c[2] / n for c, n in zip(choices, lengths, strict=True))
        per_byte.append(right[_first_best(relative)])
    return {"accuracy": _percent(plain), "accuracy_normalized": _percent(per_byte)}


def truthful_qa(targets: Sequence[tuple[Any, bool, str]], scores: Sequence[float]) -> Scalars:
    """TruthfulQA's measures (Lin et al., 2021); arguments as for `rank_classification`.

    Returns:
      `mc1`: share of questions whose likeliest choice is true; `mc2`: mean probability of the true
      choices, where the probabilities of a question's choices are scaled to sum to one.
    """
    questions = _by_question(targets, scores)
    single, mass = [], []
    for choices in questions:
        true = np.array([bool(is_right) for is_right, _, _ in choices])
        values = np.array([score for _, _, score in choices], np.float64)
        single.append(true[_first_best(values)])
        probabilities = np.exp(values - values.max())
        mass.append(probabilities[true].sum() / probabilities.sum())
    return {"mc1": _percent(single), "mc2": _percent(mass)}


def _by_question(
    targets: Sequence[tuple[Any, bool, str]], scores: Sequence[float]
) -> list[list[tuple[bool, str, float]]]:
    groups: dict[Any, list[tuple[bool, str, float]]] = {}
    for (question, is_right, text), score in _pairs(targets, scores):
        groups.setdefault(question, []).append((is_right, text, float(score)))
    return list(groups.values())


def _first_best(values: Iterable[float]) -> int:
    return int(np.argmax(np.fromiter(values, np.float64)))


# ---- Programs.


def pass_at_k(
    check: Callable[[Any, Any], bool], *, ks: Sequence[int] = (1,)
) -> Callable[[Sequence[Any], Sequence[Any]], Scalars]:
    """A metric function for several samples an example: the chance that one of k is right.

    The unbiased estimate 1 - C(n - c, k) / C(n, k) of Chen et al. (2021, arXiv:2107.03374).

    Args:
      check: (target, sample) -> whether the sample is right. Running what a model wrote is left to
        the caller, who knows in what box.
    """

    def metric(targets: Sequence[Any], predictions: Sequence[Any]) -> Scalars:
        counts = []
        for target, samples in _pairs(targets, predictions):
            samples = [samples] if isinstance(samples, str) else samples
            counts.append((len(samples), sum(bool(check(target, s)) for s in samples)))
        fewest = min((n for n, _ in counts), default=0)
        if counts and max(ks) > fewest:
            raise UserError(
                f"pass@{max(ks)} needs {max(ks)} samples of every example, and one has {fewest}: "
                "set Sampling.num_samples."
            )
        return {
            f"pass@{k}": _percent(1 - math.comb(n - c, k) / math.comb(n, k) for n, c in counts)
            for k in ks
        }

    return metric


def _pairs(targets: Sequence[Any], others: Sequence[Any]) -> list[tuple[Any, Any]]:
    return list(zip(targets, others, strict=True))


def _percent(shares: Iterable[float]) -> float:
    values = list(shares)
    return 100.0 * float(sum(values)) / max(1, len(values))
