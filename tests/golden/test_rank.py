"""Every question that is scored by the likelihood of its choices, as a person would read it.

`pytest tests/golden --update-golden` rewrites instruct/rank.txt.
"""

from __future__ import annotations

from typing import Any

import pytest

from t5x_like.data.choices import marked
from tasks.instruct.rank import RANKS, Rank
from tasks.instruct.register import exemplars
from tasks.instruct.schemas.all import COLLECTIONS
from tests.golden.test_instruct import compare, next_examples, records
from tests.tasks.instruct_examples import HUGGING_FACE, TFDS, all_examples


def test_questions(request: pytest.FixtureRequest) -> None:
    from tasks.instruct import embedded

    text = []
    for name, ranks in RANKS.items():
        examples = all_examples(TFDS).get(name, []) + all_examples(HUGGING_FACE).get(name, [])
        found = records(COLLECTIONS[name], examples)
        text += [
            described(f"{name}_{suffix}", rank, found, found) for suffix, rank in ranks.items()
        ]
    for name, rank in embedded.RANKED.items():
        source, collection = embedded.source_of(name), embedded.COLLECTIONS[name]
        pool = exemplars(source, "train", collection.prepare)
        found = records(collection, next_examples(source))
        text.append(described(f"embedded_{name}_rank", rank, found, pool))
    compare("rank.txt", "\n".join(text), request)


def described(name: str, rank: Rank, found: Any, pool: Any) -> str:
    """The first record with each of its choices; `*` stands before the right ones."""
    record = next(r for r in found if r.get(rank.right) is not None)
    inputs = rank.template.with_exemplars(record, pool[: rank.template.shots])
    choices = marked(record, choices=rank.choices, right=rank.right)
    lines = [f"=== {name}", "", *(f"    {line}" for line in inputs.splitlines())]
    for index, (text, is_right) in enumerate(choices):
        answer = rank.template.render({**record, "answer": text, "label": index})[1]
        lines.append(f" {'*' if is_right else ' '}=> {answer}")
    return "\n".join([*lines, ""])
