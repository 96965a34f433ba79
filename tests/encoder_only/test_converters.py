"""What encoder-only models get: layout, packing, limits."""

from __future__ import annotations

import numpy as np
import pytest

from t5x_like.data.encoder_converters import (
    ClassificationConverter,
    EncoderConverter,
    MaskedLmConverter,
    NextSentenceConverter,
)
from t5x_like.data.packing import Block, Piece, collect, next_row
from t5x_like.data.ragged import Ragged
from t5x_like.errors import UserError

LENGTHS = {"inputs": 12, "targets": 4}


class Examples:
    """A stream over one block."""

    def __init__(self, block: Block) -> None:
        self.block, self.start = block, 0

    def peek(self) -> Piece | None:
        if self.start == len(self.block):
            return None
        return Piece(self.block, self.start, len(self.block))

    def advance(self, count: int) -> None:
        self.start += count


def examples(sizes: list[int], masked: list[list[int]]) -> dict[str, Ragged]:
    """Example i has the tokens 100 * (i + 1) + place; places `masked[i]` are targets."""
    tokens = [100 * (i + 1) + np.arange(size) for i, size in enumerate(sizes)]
    places = [np.array(m, int) for m in masked]
    return {
        "inputs": Ragged.from_rows(tokens),
        "token_types": Ragged.from_rows([np.arange(size) > 1 for size in sizes]),
        "targets": Ragged.from_rows([t[p] for t, p in zip(tokens, places, strict=True)]),
        "target_positions": Ragged.from_rows(places),
        "label": Ragged.from_rows([[i % 2] for i in range(len(sizes))]),
    }


def convert(converter: EncoderConverter, made: dict[str, Ragged], *, rows: int, pack: bool):
    stream = Examples(converter.block(made))
    filled = [next_row(stream, limits=converter.limits(LENGTHS), pack=pack) for _ in range(rows)]
    assert stream.peek() is None
    packed = collect(filled, converter.task_features)
    batch = converter.convert(packed, LENGTHS, pack=pack)
    spec = converter.element_spec(LENGTHS, batch_size=rows, pack=pack)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == spec
    return batch


def test_packed():
    made = examples([5, 4, 3, 6], [[1, 3], [2], [], [0, 5]])
    batch = convert(NextSentenceConverter(max_sequences=3), made, rows=2, pack=True)
    expected = {
        "encoder_input_tokens": [
            [100, 101, 102, 103, 104, 200, 201, 202, 203, 300, 301, 302],
            [400, 401, 402, 403, 404, 405, 0, 0, 0, 0, 0, 0],
        ],
        "encoder_token_types": [
            [0, 0, 1, 1, 1, 0, 0, 1, 1, 0, 0, 1],
            [0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0],
        ],
        "encoder_segment_ids": [[1] * 5 + [2] * 4 + [3] * 3, [1] * 6 + [0] * 6],
        "encoder_positions": [
            [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2],
            [0, 1, 2, 3, 4, 5, 0, 0, 0, 0, 0, 0],
        ],
        "encoder_sequence_starts": [[0, 5, 9], [0, 0, 0]],
        "encoder_target_tokens": [[101, 103, 202, 0], [400, 405, 0, 0]],
        "encoder_target_positions": [[1, 3, 7, 0], [0, 5, 0, 0]],
        "encoder_loss_weights": [[1, 1, 1, 0], [1, 1, 0, 0]],
        "class_labels": [[0, 1, 0], [1, 0, 0]],
        "class_loss_weights": [[1, 1, 1], [1, 0, 0]],
    }
    assert batch.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(batch[name], values, err_msg=name)


def test_not_packed():
    made = examples([5, 4], [[1, 3], [2]])
    batch = convert(NextSentenceConverter(), made, rows=3, pack=False)
    assert not {"encoder_positions", "encoder_sequence_starts"} & batch.keys()
    np.testing.assert_array_equal(batch["encoder_segment_ids"].sum(1), [5, 4, 0])
    np.testing.assert_array_equal(batch["class_labels"], [[0], [1], [0]])
    np.testing.assert_array_equal(batch["class_loss_weights"], [[1], [1], [0]])
    np.testing.assert_array_equal(batch["encoder_target_positions"][:2, :2], [[1, 3], [2, 0]])


def test_a_row_holds_so_many_targets_and_so_many_sequences():
    made = examples([2, 2, 2, 2], [[0, 1]] * 4)
    batch = convert(MaskedLmConverter(), made, rows=2, pack=True)  # 4 targets a row
    np.testing.assert_array_equal(batch["encoder_segment_ids"].max(1), [2, 2])
    batch = convert(ClassificationConverter(max_sequences=3), made, rows=2, pack=True)
    np.testing.assert_array_equal(batch["encoder_segment_ids"].max(1), [3, 1])
    assert not {"encoder_target_tokens", "encoder_loss_weights"} & batch.keys()


def test_id_zero_may_be_a_token():
    made = examples([3], [[1]])
    made["inputs"] = Ragged.from_rows([[0, 7, 2]])  # RoBERTa's <s> is 0
    batch = convert(MaskedLmConverter(), made, rows=1, pack=False)
    np.testing.assert_array_equal(batch["encoder_segment_ids"][0, :4], [1, 1, 1, 0])


def test_bad_input():
    with pytest.raises(UserError, match="max_sequences is 0; give at least 1"):
        ClassificationConverter(max_sequences=0)
    with pytest.raises(UserError, match="needs a length of at least 1 for 'targets'"):
        MaskedLmConverter().limits({"inputs": 8})
    with pytest.raises(UserError, match="NextSentenceConverter needs the feature 'label'"):
        made = examples([3], [[1]])
        NextSentenceConverter().block({k: v for k, v in made.items() if k != "label"})
