"""Multiple choice scored by the log-likelihood of each choice, in place of generated text."""

from __future__ import annotations

import collections
import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import seqio

from t5x_like.data.choices import Choices
from t5x_like.data.denoisers import AppendEos
from t5x_like.data.templates import Template
from t5x_like.errors import UserError
from tasks.instruct import metrics
from tasks.instruct.register import Collection, WithExemplars, to_cache
from tasks.instruct.schemas import classify

_LIBRARY = "t5x_like.evaluation.metrics"
Target = Mapping[str, Any]


def choice_of(text: str, *, example: Mapping[str, Any], is_target: bool) -> Any:
    """Postprocess function: targets are what `Choices` wrote of the choice."""
    return metrics.read_record(example) if is_target else text


def ranked(name: str, *keys: str) -> Callable[..., Mapping[str, Any]]:
    """The function `name` of `t5x_like.evaluation.metrics`, over questions with all their choices.

    Args:
      keys: which of its values; none for all.
    """

    def metric(targets: Sequence[Target], scores: Sequence[float]) -> Mapping[str, Any]:
        rows = complete(targets, scores)
        function = getattr(importlib.import_module(_LIBRARY), name)
        found = function([row for row, _ in rows], [score for _, score in rows])
        return {key: value for key, value in found.items() if not keys or key in keys}

    metric.__name__ = name
    return metric


def complete(
    targets: Sequence[Target], scores: Sequence[float]
) -> list[tuple[tuple[Any, bool, str], float]]:
    """((question, whether it is right, text), score) of each choice.

    A question that comes twice counts twice. One that lacks a choice, as the last of a limited
    number of examples may, is left out.

    Raises:
      UserError: no question has all of its choices.
    """
    times, sizes = collections.Counter[Any](), collections.Counter[Any]()
    rows = []
    for target, score in zip(targets, scores, strict=True):
        choice = (target["question"], target["choice"])
        question = (target["question"], times[choice])
        times[choice] += 1
        sizes[question] += 1
        rows.append((question, target, score))
    kept = [row for row in rows if sizes[row[0]] == row[1]["choices"]]
    if rows and not kept:
        raise UserError(
            f"None of the questions has all of its choices: {len(rows)} examples are too few. Each "
            "choice is an example; raise EVALUATOR_NUM_EXAMPLES."
        )
    return [((q, bool(t["is_right"]), t["text"]), score) for q, t, score in kept]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rank:
    """How a collection is asked.

    Attributes:
      template: its targets are formatted for each choice; see `Choices`, as for the next two.
      metric_fns: of (targets, scores), where targets are what `Choices` wrote.
    """

    template: Template
    choices: str = "choices"
    right: str = "answer"
    metric_fns: tuple[Callable[..., Mapping[str, Any]], ...] = (ranked("rank_classification"),)


def add_rank_task(
    name: str,
    rank: Rank,
    collection: Collection,
    *,
    source: seqio.DataSource,
    vocabulary: seqio.Vocabulary,
    continuation: bool = False,
) -> None:
    """Registers the Task `name`. It shares the cache of the collection's other Tasks.

    Args:
      source: of the examples that `collection.prepare` reads.
      continuation: for language models without instruction tuning: no end of sequence after inputs
        or choice, and a space between them, as the lm-evaluation-harness has it.
    """
    template = rank.template
    if continuation:
        template = dataclasses.replace(template, targets=f" {template.targets}", answer_prefix="")
    feature = seqio.Feature(vocabulary, add_eos=not continuation)
    step = WithExemplars(
        Choices(templates=(template,), choices=rank.choices, right=rank.right),
        source=source,
        split=collection.exemplar_split,
        prepare=collection.prepare,
    )
    seqio.TaskRegistry.add(
        name,
        source=source,
        preprocessors=[*to_cache(collection.prepare), step.__call__, AppendEos().__call__],
        output_features={"inputs": feature, "targets": feature},
        metric_fns=list(rank.metric_fns),
        postprocess_fn=choice_of,
    )


def add_rank_tasks(
    name: str,
    collection: str,
    *,
    source: seqio.DataSource,
    vocabulary: seqio.Vocabulary,
    continuation: bool = False,
) -> list[str]:
    """Registers the Tasks of a public collection: `name_rank`, of TruthfulQA `name_mc1` and `_mc2`.

    Args:
      collection: a key of `RANKS`.

    Returns:
      Names of the Tasks.
    """
    from tasks.instruct.schemas.all import COLLECTIONS

    made = {f"{name}_{suffix}": rank for suffix, rank in RANKS[collection].items()}
    for task, rank in made.items():
        add_rank_task(
            task,
            rank,
            COLLECTIONS[collection],
            source=source,
            vocabulary=vocabulary,
            continuation=continuation,
        )
    return list(made)


# Hendrycks et al. (arXiv:2009.03300): five solved examples of the subject, the letters are scored.
_MMLU = Template(
    "{question}\n{choices:letters}\nAnswer:",
    "{label:letter}",
    kind="few_shot",
    shots=5,
    answer_prefix=" ",
)
_TRUTHFUL = Template("Q: {question}\nA:", "{answer}")
# Of classification, the words of the first template; these two have no classes.
_CLASSIFIED = [n for n in classify.COLLECTIONS if n not in ("glue_stsb", "super_glue_record")]

RANKS: dict[str, dict[str, Rank]] = {
    "mmlu": {"rank": Rank(template=_MMLU, right="label")},
    # Zellers et al. (arXiv:1905.07830); "accuracy_normalized" is what is usually reported.
    "hellaswag": {
        "rank": Rank(template=Template("{activity}: {context}", "{answer}"), right="label")
    },
    # Lin et al. (arXiv:2109.07958), without the examples that stand before each question there.
    "truthful_qa": {
        "mc1": Rank(template=_TRUTHFUL, right="label", metric_fns=(ranked("truthful_qa", "mc1"),)),
        "mc2": Rank(
            template=_TRUTHFUL,
            choices="mc2_choices",
            right="true_answers",
            metric_fns=(ranked("truthful_qa", "mc2"),),
        ),
    },
    **{
        name: {"rank": Rank(template=classify.COLLECTIONS[name].templates[0], right="label")}
        for name in _CLASSIFIED
    },
}
