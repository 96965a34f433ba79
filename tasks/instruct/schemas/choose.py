"""Multiple choice: MMLU, HellaSwag, TruthfulQA."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

from t5x_like.data.templates import GROUP, Record, Template
from tasks.instruct import metrics
from tasks.instruct.register import Collection
from tasks.instruct.sources import Example


def _choice(choices: Sequence[str], label: int) -> dict[str, Any]:
    return {"choices": list(choices), "label": label, "answer": choices[label]}


def prepare_mmlu(example: Example) -> Record:
    """Solved examples come from the same subject."""
    subject = str(example.get("subject") or "").replace("_", " ")
    fields = {"question": example["question"], "subject": subject, GROUP: subject}
    return fields | _choice(example["choices"], int(example["answer"]))


def prepare_hellaswag(example: Example) -> Record | None:
    """The test split has no labels and is left out. WikiHow's marks are removed."""
    label = str(example["label"])
    if label in ("", "-1"):
        return None
    context = example.get("ctx") or example["context"]
    fields = {"context": _clean(context), "activity": example["activity_label"]}
    return fields | _choice([_clean(ending) for ending in example["endings"]], int(label))


def _clean(text: str) -> str:
    return " ".join(re.sub(r"\[.*?\]", "", text.replace(" [title]", ". ")).split())


def prepare_truthful_qa(example: Example) -> Record:
    """The configuration "multiple_choice". The choices are mc1's, in an order of their own: there
    the right one is always the first. `mc2_choices` and `true_answers` are for mc2."""
    mc1, mc2 = example["mc1_targets"], example["mc2_targets"]
    right = mc1["choices"][[bool(label) for label in mc1["labels"]].index(True)]
    order = sorted(mc1["choices"], key=lambda choice: hashlib.sha256(choice.encode()).digest())
    true = [c for c, label in zip(mc2["choices"], mc2["labels"], strict=True) if label]
    fields = {"question": example["question"], "true_answers": true, "mc2_choices": mc2["choices"]}
    return fields | _choice(order, order.index(right))


_LETTER = "{label:letter}"
_BACK = Template(
    "Write a multiple-choice question with these answers, the right one being {label:letter}."
    "\n{choices:letters}",
    "{question}",
    kind="inversion",
)

COLLECTIONS = {
    "mmlu": Collection(
        prepare=prepare_mmlu,
        templates=(
            # The form of Hendrycks et al. (arXiv:2009.03300), but for its list of choices.
            Template("{question}\n{choices:letters}\nAnswer:", _LETTER),
            Template("Question about {subject}: {question}\n{choices:letters}", _LETTER),
            Template("{question}\nChoose the right letter.\n{choices:letters_inline}", _LETTER),
            Template("{question}\n{choices:lines}", "{answer}"),
            _BACK,
        ),
        shots=(5,),
        exemplar_split="dev",
        metric_fns=(metrics.accuracy,),
    ),
    "hellaswag": Collection(
        prepare=prepare_hellaswag,
        templates=(
            Template("What happens next?\n{context}\n{choices:lines}", "{answer}"),
            Template("{activity}: {context}\nHow does it go on?\n{choices:letters}", _LETTER),
            Template("Continue: {context}\n{choices:letters_inline}", _LETTER),
            Template("{answer}\nWhat came before that?", "{context}", kind="inversion"),
        ),
        metric_fns=(metrics.accuracy,),
        tfds="hellaswag:1.1.0",
    ),
    "truthful_qa": Collection(
        prepare=prepare_truthful_qa,
        templates=(
            Template("{question}\n{choices:lines}", "{answer}"),
            Template("Q: {question}\nWhich answer is true?\n{choices:letters}", _LETTER),
            Template("Answer truthfully: {question}", "{answer}"),
            _BACK,
        ),
        exemplar_split="validation",
        metric_fns=(metrics.accuracy,),
    ),
}
