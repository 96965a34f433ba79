"""The fast route: from the token cache to global batches, without TensorFlow.

A Task is read in windows. A window is a group of documents after all post-cache steps: T5 puts the
tokens of 128 shuffled documents end to end, cuts and corrupts them. Row v of the global batch is
virtual shard v, of V = batch size: it reads the windows v, V + v, 2V + v, ... of an endless list in
which every epoch lists all windows once, each epoch with its own order of documents and its own
noise. What a row holds depends on nothing else, so the rows may be spread over hosts at will, and
the position of a shard is two integers: how many windows it has left behind, and how many examples
of the present one.

With a finite number of epochs there is one shard that fills the rows of one batch after another:
each host reads all of it and keeps its own rows, so that all hosts end together, only the last
batch has padding, and the examples do not depend on the batch size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from grain.experimental import index_shuffle

from t5x_like.data.cache_reader import SplitReader
from t5x_like.data.converters import FeatureConverter
from t5x_like.data.denoisers import Context, Preprocessor
from t5x_like.data.mixtures import generator, stream_key
from t5x_like.data.packing import Block, Piece
from t5x_like.data.ragged import Examples
from t5x_like.errors import UserError

# T5 concatenates this many documents before it cuts them.
_DOCUMENTS = 128
# A window of long documents has fewer: about this many tokens, to bound memory.
_TOKENS = 2**16
# Up to so many documents, the order of an epoch is held in memory; beyond, it is computed from the
# index, which is slower by far for small numbers.
_MOST_IN_MEMORY = 2**20
_MOST_EMPTY_WINDOWS = 10_000


class TaskWindows:
    """Windows of one cached Task, by position: window p belongs to epoch p // len(self).

    Groups of a small corpus have fewer documents than T5's, so that every shard gets a group in
    every epoch. With fewer documents than shards, the examples of one document are dealt out over
    several windows, so that all shards together still read every document once an epoch.
    """

    def __init__(
        self,
        name: str,
        documents: SplitReader,
        steps: Sequence[Preprocessor],
        *,
        context: Context,
        converter: FeatureConverter,
        seed: int,
        shuffle: bool,
        num_shards: int,
    ):
        """The order and the noise depend on (name, seed); without `shuffle` only the noise does.

        Raises:
          UserError: the lengths or the converter do not suit the steps.
        """
        self._documents, self._steps = documents, steps
        self._context, self._converter = context, converter
        self._key, self._shuffle = stream_key(seed, name), shuffle
        count = documents.num_documents
        few = min(_DOCUMENTS, int(_TOKENS / documents.mean_tokens), count // num_shards)
        self._group_size = max(1, few)
        self._num_groups = -(-count // self._group_size)
        self._windows_per_group = -(-num_shards // self._num_groups)
        keep = self._num_groups if self._windows_per_group > 1 else 0
        self._group = functools.lru_cache(maxsize=keep)(self._process_group)
        self._permutation = functools.lru_cache(maxsize=2)(self._permute)
        # Without examples, to see at once whether all fits together.
        self._run(documents.nothing(), generator(0, position=0))

    def __len__(self) -> int:
        return self._num_groups * self._windows_per_group

    def __getitem__(self, position: int) -> Block:
        group, part = divmod(position, self._windows_per_group)
        block = self._group(group)
        if self._windows_per_group == 1:
            return block
        # Parts rotate from epoch to epoch: else a shard might get the same, even an empty one, in
        # all of them.
        first = (part + position // len(self)) % self._windows_per_group
        rows = np.arange(first, len(block), self._windows_per_group)
        return self._converter.block({k: v.take(rows) for k, v in block.examples.items()})

    def _process_group(self, group: int) -> Block:
        """Examples of a group, counted over epochs, in random order if shuffled."""
        epoch, place = divmod(group, self._num_groups)
        start = place * self._group_size
        stop = min(start + self._group_size, self._documents.num_documents)
        rng = generator(self._key, position=group)
        block = self._run(self._documents.read(self._order(epoch, start, stop)), rng)
        if not self._shuffle:
            return block
        order = rng.permutation(len(block))
        return self._converter.block({k: v.take(order) for k, v in block.examples.items()})

    def _run(self, examples: Examples, rng: np.random.Generator) -> Block:
        for step in self._steps:
            examples = step.apply(examples, self._context, rng)
        lengths = self._context.lengths
        trimmed = {
            name: self._context.trim(name, tokens, lengths[name]) if name in lengths else tokens
            for name, tokens in examples.items()
        }
        return self._converter.block(trimmed)

    def _order(self, epoch: int, start: int, stop: int) -> Sequence[int]:
        """Documents at the places [start, stop) of an epoch."""
        count = self._documents.num_documents
        if not self._shuffle:
            return range(start, stop)
        if count <= _MOST_IN_MEMORY:
            return self._permutation(epoch)[start:stop].tolist()
        seed = (self._key + epoch) % 2**32
        return [
            index_shuffle(place, max_index=count - 1, seed=seed, rounds=4)
            for place in range(start, stop)
        ]

    def _permute(self, epoch: int) -> np.ndarray:
        rng = generator(stream_key(self._key, "order"), position=epoch)
        return rng.permutation(self._documents.num_documents)


class WindowStream:
    """Examples of the windows `shard`, `shard + num_shards`, ... below `stop`, if that is given.

    The state is [windows left behind, examples passed of the present one].
    """

    def __init__(self, windows: TaskWindows, *, shard: int, num_shards: int, stop: int | None):
        self._windows, self._shard, self._num_shards, self._stop = windows, shard, num_shards, stop
        self._state = [0, 0]
        self._block: Block | None = None

    def peek(self) -> Piece | None:
        for _ in range(_MOST_EMPTY_WINDOWS):
            position = self._state[0] * self._num_shards + self._shard
            if self._stop is not None and position >= self._stop:
                return None
            if self._block is None:
                self._block = self._windows[position]
            if self._state[1] < len(self._block):
                return Piece(self._block, self._state[1], len(self._block))
            self._state, self._block = [self._state[0] + 1, 0], None
        raise UserError(
            f"{_MOST_EMPTY_WINDOWS} windows in a row gave no example. Check the preprocessors of "
            "the task."
        )

    def advance(self, count: int) -> None:
        self._state[1] += count

    def get_state(self) -> list[int]:
        return list(self._state)

    def set_state(self, state: Sequence[int]) -> None:
        self._state, self._block = list(state), None
