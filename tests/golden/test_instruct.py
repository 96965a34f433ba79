"""Every task and template of instruction data, as a person would read it.

`pytest tests/golden --update-golden` rewrites the files in instruct/.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from t5x_like.data.chat import FORMATS, Message
from t5x_like.data.templates import Record, Template
from tasks.instruct.register import Collection, exemplars
from tasks.instruct.schemas.all import COLLECTIONS
from tasks.instruct.sources import read_examples, records_of
from tests.tasks.instruct_examples import (
    HUGGING_FACE,
    NATURAL_INSTRUCTIONS,
    TFDS,
    all_examples,
)

GOLDEN = Path(__file__).parent / "instruct"
MESSAGES = [
    Message("system", "Be brief."),
    Message("user", "Who wrote it?"),
    Message("assistant", "Luke."),
    Message("user", "And when?"),
    Message("assistant", "Nobody knows."),
]


def test_public_collections(request: pytest.FixtureRequest) -> None:
    fixtures = {n: all_examples(HUGGING_FACE).get(n, []) for n in COLLECTIONS}
    for name, examples in all_examples(TFDS).items():
        fixtures[name] = examples + fixtures[name]
    task = {k: v for k, v in NATURAL_INSTRUCTIONS.items() if k != "Instances"}
    fixtures["natural_instructions"].append(task | NATURAL_INSTRUCTIONS["Instances"][0])
    text = [
        describe(name, collection, records(collection, fixtures[name]))
        for name, collection in COLLECTIONS.items()
    ]
    compare("public.txt", "\n".join(text), request)


def test_embedded_tasks(request: pytest.FixtureRequest) -> None:
    from tasks.instruct import embedded

    text = []
    for name, collection in embedded.COLLECTIONS.items():
        source = embedded.source_of(name)
        found = records(collection, next_examples(source))
        pool = exemplars(source, "train", collection.prepare)
        text.append(describe(name, collection, [*found[:1], *pool]))
    compare("embedded.txt", "\n".join(text), request)


def test_chat_formats(request: pytest.FixtureRequest) -> None:
    text = []
    for name, format in FORMATS.items():
        system = format.system or format.system_in_user
        messages = MESSAGES if system else MESSAGES[1:]
        shown = [
            f"[{piece.text}]" if piece.has_loss else piece.text for piece in format.pieces(messages)
        ]
        joined = "".join(shown).replace("\0", format.bos).replace("\1", format.eos)
        text.append(f"=== {name} (with loss: [...])\n{joined}\n")
    compare("chat.txt", "\n".join(text), request)


def next_examples(source: Any) -> list[Any]:
    """The first few examples of the validation split."""
    examples = read_examples(source, "validation")
    return [example for example, _ in zip(examples, range(40), strict=False)]


def records(collection: Collection, examples: list[Any]) -> list[Record]:
    return [r for example in examples for r in records_of(collection.prepare, example)]


def describe(name: str, collection: Collection, found: list[Record]) -> str:
    """The templates of a collection, filled with the first record that each applies to."""
    lines = [f"=== {name}", ""]
    for template in collection.all_templates():
        applies = [record for record in found if template.applies(record)]
        lines += rendered(template, applies[0], applies[1:] or applies)
    return "\n".join(lines)


def rendered(template: Template, record: Record, pool: list[Record]) -> list[str]:
    inputs = template.with_exemplars(record, pool[: template.shots])
    targets = template.render(record)[1]
    shots = f" ({template.shots})" if template.shots else ""
    return [
        f"--- {template.kind}{shots}, weight {template.weight:.3f}",
        *(f"    {line}" for line in inputs.splitlines()),
        *(f" => {line}" for line in targets.splitlines()),
        "",
    ]


def compare(name: str, text: str, request: pytest.FixtureRequest) -> None:
    path = GOLDEN / name
    if request.config.getoption("--update-golden", default=False):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.exists(), "no golden file: run pytest tests/golden --update-golden"
    assert text.splitlines() == path.read_text().splitlines()
