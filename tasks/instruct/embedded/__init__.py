"""An instruction mixture over data that ships with the package (see README.md here).

    embedded_TASK, embedded_TASK_zero_shot, ...   every Task below, by kind of template
    embedded_train                                the mixture to train on
    embedded_train_zero_shot                      the same Tasks by answer templates alone, to score
    embedded_held_out                             Tasks that are not in the training mixture
    embedded_NAME_rank                            those of them with choices, scored by the
                                                  log-likelihood of each choice
    embedded_held_out_rank                        all of these

The vocabulary is that of the King James text.
"""

from pathlib import Path

import seqio

from tasks.instruct.embedded import passages, rules, words
from tasks.instruct.rank import Rank, add_rank_task
from tasks.instruct.register import add_mixture, add_tasks
from tasks.instruct.sources import CountingSource, RecordSource

HELD_OUT = (
    *("kind_choice", "book_choice", "small_choice", "name_choice", "part_choice", "list_first"),
    *("next_choice", "hypernym_choice", "larger"),
)
# Of the sums there are few. Long answers would be most of the loss, which is a mean over tokens.
RATES = dict.fromkeys(passages.COLLECTIONS | words.COLLECTIONS | rules.COLLECTIONS, 1.0) | {
    **{"arithmetic": 0.5, "hypernym": 0.5, "list_reverse": 0.5, "definition": 0.25, "restore": 0.25}
}

_KJV = Path(__file__).parents[2] / "kjv"
_VOCABULARY = seqio.SentencePieceVocabulary(str(_KJV / "vocabulary.model"), extra_ids=100)
_TRAIN, _VALIDATION = (str(_KJV / "data" / f"{s}.jsonl.xz") for s in ("train", "validation"))
# Whole books are held out; but which book a passage is from can be asked of known books only.
_BOOKS = RecordSource({"train": [_TRAIN], "validation": [_VALIDATION]})
_CHAPTERS = RecordSource({"train": [_TRAIN]}, validation_fraction=0.05)
_WORDS = RecordSource({"train": [str(words.FILE)]}, validation_fraction=0.1)
_NUMBERS = CountingSource(rules.COUNT, validation_fraction=0.05)
_PAIRS = CountingSource(rules.PAIRS, validation_fraction=0.1)


def source_of(name: str) -> seqio.DataSource:
    """The examples of an embedded Task."""
    if name in passages.COLLECTIONS:
        return _CHAPTERS if name.startswith(("book", "name")) else _BOOKS
    if name in words.COLLECTIONS:
        return _WORDS
    return _PAIRS if name == "arithmetic" else _NUMBERS


COLLECTIONS = passages.COLLECTIONS | words.COLLECTIONS | rules.COLLECTIONS
for _name, _collection in COLLECTIONS.items():
    add_tasks(f"embedded_{_name}", _collection, source=source_of(_name), vocabulary=_VOCABULARY)
RANKED = {
    name: Rank(template=COLLECTIONS[name].templates[0], choices=choices)
    for name, choices in (
        ("kind_choice", "choices"),
        ("book_choice", "choices"),
        ("small_choice", "choices"),
        ("name_choice", "choices"),
        ("part_choice", "choices"),
        ("next_choice", "choices"),
        ("hypernym_choice", "choices"),
        ("larger", "numbers"),
    )
}
for _name, _rank in RANKED.items():
    add_rank_task(
        f"embedded_{_name}_rank",
        _rank,
        COLLECTIONS[_name],
        source=source_of(_name),
        vocabulary=_VOCABULARY,
    )
add_mixture("embedded_held_out_rank", {f"embedded_{name}_rank": 1.0 for name in RANKED})

_trained = [name for name in COLLECTIONS if name not in HELD_OUT]
add_mixture("embedded_train", {f"embedded_{name}": RATES[name] for name in _trained})
for _mixture, _names in (("train_zero_shot", _trained), ("held_out", HELD_OUT)):
    add_mixture(f"embedded_{_mixture}", {f"embedded_{name}_zero_shot": 1.0 for name in _names})
