"""Packing and feature conversion against SeqIO's own, and without its two defects."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_like.data.converters import (
    Batch,
    EncDecConverter,
    FeatureConverter,
    LMConverter,
    PrefixLMConverter,
)
from t5x_like.data.packing import Block, Piece, collect, next_row
from t5x_like.data.ragged import Ragged
from t5x_like.errors import UserError

CONVERTERS = {
    "EncDecFeatureConverter": EncDecConverter,
    "LMFeatureConverter": LMConverter,
    "PrefixLMFeatureConverter": PrefixLMConverter,
}


class ListStream:
    """A stream over one block."""

    def __init__(self, block: Block):
        self.block, self.place = block, 0

    def peek(self) -> Piece | None:
        if self.place == len(self.block):
            return None
        return Piece(self.block, self.place, len(self.block))

    def advance(self, count: int) -> None:
        self.place += count

    def get_state(self) -> list[int]:
        return [self.place]

    def set_state(self, state) -> None:
        self.place = state[0]


def convert(
    converter: FeatureConverter, examples: list[dict], lengths: dict[str, int], *, pack: bool
) -> Batch:
    features = {k: Ragged.from_rows([np.array(e[k], int) for e in examples]) for k in examples[0]}
    stream, rows = ListStream(converter.block(features)), []
    while row := next_row(stream, limits=converter.limits(lengths), pack=pack):
        rows.append(row)
    batch = converter.convert(collect(rows, converter.task_features), lengths, pack=pack)
    spec = converter.element_spec(lengths, batch_size=len(rows), pack=pack)
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == spec
    return batch


def test_equal_to_seqio(oracle_dir: Path):
    oracle = json.loads((oracle_dir / "seqio_converters.json").read_text())["main"]
    assert len(oracle["results"]) == 10
    for result in oracle["results"]:
        settings = dict(result["args"])
        pack = settings.pop("pack")
        converter = CONVERTERS[result["converter"]](**settings)
        lengths = result["task_feature_lengths"]
        if isinstance(result["outputs"], str):
            with pytest.raises(UserError, match=r"An example of \[5, 2\] tokens does not fit"):
                convert(converter, oracle["examples"], lengths, pack=pack)
            continue
        batch = convert(converter, oracle["examples"], lengths, pack=pack)
        for name in batch:
            wanted = np.array([row[name] for row in result["outputs"]])
            if converter.bos_id and name == "decoder_input_tokens":
                # SeqIO writes BOS on the padding after the last segment of a row.
                wanted *= batch["decoder_segment_ids"] > 0
            np.testing.assert_array_equal(batch[name], wanted, err_msg=f"{result['args']} {name}")
        assert all(row.keys() == batch.keys() for row in result["outputs"])


def test_an_empty_feature_does_not_shift_segments():
    """SeqIO gives the second example's inputs segment 1 and its targets segment 2."""
    examples = [
        {"inputs": [], "targets": [3, 4, 1]},
        {"inputs": [5, 6, 1], "targets": [7, 1]},
        {"inputs": [8, 1], "targets": []},
        {"inputs": [9, 1], "targets": [10, 1]},
    ]
    batch = convert(EncDecConverter(), examples, {"inputs": 8, "targets": 8}, pack=True)
    assert batch["encoder_segment_ids"].tolist() == [[2, 2, 2, 3, 3, 4, 4, 0]]
    assert batch["decoder_segment_ids"].tolist() == [[1, 1, 1, 2, 2, 4, 4, 0]]
    assert batch["decoder_input_tokens"].tolist() == [[0, 3, 4, 0, 7, 0, 10, 0]]


def test_a_zero_inside_an_example_is_kept():
    """SeqIO packs [5, 0, 7, 1] as [5, 0, 7], segments [1, 0, 1]."""
    examples = [{"targets": [5, 0, 7, 1]}, {"targets": [8, 1]}]
    batch = convert(LMConverter(), examples, {"targets": 7}, pack=True)
    assert batch["decoder_target_tokens"].tolist() == [[5, 0, 7, 1, 8, 1, 0]]
    assert batch["decoder_segment_ids"].tolist() == [[1, 1, 1, 1, 2, 2, 0]]
    assert batch["decoder_positions"].tolist() == [[0, 1, 2, 3, 0, 1, 0]]
    # A token is a target whatever its id: in GPT-2's vocabulary 0 is "!".
    assert batch["decoder_loss_weights"].tolist() == [[1, 1, 1, 1, 1, 1, 0]]


tokens = st.lists(st.integers(0, 9), max_size=6)


@given(examples=st.lists(st.fixed_dictionaries({"inputs": tokens, "targets": tokens}), min_size=1))
@settings(max_examples=200, deadline=None)
def test_packing_keeps_everything_in_order(examples):
    lengths = {"inputs": 7, "targets": 6}
    batch = convert(EncDecConverter(), examples, lengths, pack=True)
    kept = [e for e in examples if e["inputs"] or e["targets"]]
    found = []
    for row in range(len(batch["encoder_input_tokens"])):
        segments = batch["encoder_segment_ids"][row], batch["decoder_segment_ids"][row]
        for segment in range(1, max(map(max, segments)) + 1):
            inputs, targets = (s == segment for s in segments)
            found.append(
                {
                    "inputs": batch["encoder_input_tokens"][row][inputs].tolist(),
                    "targets": batch["decoder_target_tokens"][row][targets].tolist(),
                }
            )
            shifted = batch["decoder_input_tokens"][row][targets].tolist()
            assert shifted == [0, *found[-1]["targets"]][: len(shifted)]
            for side, mask in (("encoder", inputs), ("decoder", targets)):
                positions = batch[f"{side}_positions"][row][mask].tolist()
                assert positions == list(range(mask.sum()))
    assert found == kept


@given(examples=st.lists(st.fixed_dictionaries({"inputs": tokens, "targets": tokens}), min_size=1))
@settings(max_examples=100, deadline=None)
def test_rows_are_as_full_as_greedy_packing_makes_them(examples):
    """An example opens a row only if it did not fit into the one before."""
    lengths = {"inputs": 7, "targets": 6}
    features = {k: Ragged.from_rows([np.array(e[k], int) for e in examples]) for k in lengths}
    block = EncDecConverter().block(features)
    stream, rows = ListStream(block), []
    while row := next_row(stream, limits=(7, 6), pack=True):
        rows.append((row[0].start, row[-1].stop))
    for start, stop in rows[:-1]:
        sizes = [total[stop + 1] - total[start] for total in block.totals]
        assert sizes[0] > 7 or sizes[1] > 6


def test_missing_features_and_lengths():
    with pytest.raises(UserError, match="EncDecConverter needs the feature 'inputs'"):
        EncDecConverter().block({"targets": Ragged.from_rows([np.array([1])])})
    with pytest.raises(UserError, match="needs a length of at least 1 for 'inputs'"):
        PrefixLMConverter().limits({"targets": 5})
