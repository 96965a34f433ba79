"""The second route: Tasks whose preprocessors only SeqIO can run, streamed as training goes.

SeqIO gives the examples; packing, feature conversion and the state are those of the fast route. The
rows of the global batch are divided among at most eight shards (as many as divide the batch), each
a SeqIO pipeline over its share of the source, so that the batches do not depend on the number of
hosts. The state of a shard is the number of examples that it has given. A restored shard skips as
many: exact, because SeqIO's pipelines are deterministic for a seed, but it takes the time that
making them took.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from t5x_like.data import seqio_host
from t5x_like.data.batch_iterator import BatchIterator, Shard
from t5x_like.data.converters import FeatureConverter
from t5x_like.data.packing import Block, Piece
from t5x_like.data.ragged import Ragged
from t5x_like.data.seqio_host import seqio, tf
from t5x_like.data.seqio_preprocessors import output_features
from t5x_like.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from t5x_like.data.dataset import DatasetConfig

seqio_host.hide_accelerators()
_MOST_SHARDS = 8
_BLOCK = 64


class SeqioStream:
    """Examples of a `tf.data.Dataset` of the Task's features. The state is [examples passed]."""

    def __init__(
        self,
        open_dataset: Callable[[], tf.data.Dataset],
        converter: FeatureConverter,
        *,
        name: str,
        endless: bool,
    ):
        """`endless` says that an end of the dataset is an error."""
        self._open_dataset, self._converter = open_dataset, converter
        self._name, self._endless = name, endless
        self._block: Block
        self._start = 0
        self.set_state([0])

    def peek(self) -> Piece | None:
        while self._start == len(self._block):
            examples = list(itertools.islice(self._examples, _BLOCK))
            if not examples and self._endless:
                raise UserError(
                    f"Shard {self._name} of the source gives no more examples after "
                    f"{self._passed}. Use a source with more documents, or a smaller batch_size."
                )
            if not examples:
                return None
            self._block, self._start = self._to_block(examples), 0
        return Piece(self._block, self._start, len(self._block))

    def advance(self, count: int) -> None:
        self._start += count
        self._passed += count

    def get_state(self) -> list[int]:
        return [self._passed]

    def set_state(self, state: Sequence[int]) -> None:
        self._passed = state[0]
        # Opened anew: a second pass over the same dataset would be shuffled in another way.
        dataset = self._open_dataset()
        self._features = [n for n in self._converter.task_features if n in dataset.element_spec]
        # Packing leaves out what has no tokens, so it does not count either.
        dataset = dataset.filter(
            lambda example: tf.reduce_any([tf.size(example[n]) > 0 for n in self._features])
        )
        self._examples = dataset.skip(self._passed).as_numpy_iterator()
        self._block, self._start = self._to_block([]), 0

    def _to_block(self, examples: Sequence[dict[str, np.ndarray]]) -> Block:
        columns = {n: Ragged.from_rows([ex[n] for ex in examples]) for n in self._features}
        return self._converter.block(columns)


def build(config: DatasetConfig, rows: Sequence[int]) -> BatchIterator:
    """Opens the Task or Mixture of `config` for the given rows of the global batch.

    Raises:
      UserError: the module or the Task does not exist, or has no such split or vocabulary.
    """
    provider = _find(config)
    if config.split not in provider.splits:
        raise UserError(
            f"{config.mixture_or_task_name!r} has no split {config.split!r}, only "
            f"{sorted(provider.splits)}.{did_you_mean(config.split, provider.splits)}"
        )
    features = output_features(provider.output_features)
    config.check_vocabulary(features)
    num_shards = 1 if config.num_epochs else math.gcd(config.batch_size, _MOST_SHARDS)
    size = config.batch_size // num_shards
    shards = []
    for index in range(num_shards):
        filled = range(index * size, (index + 1) * size)
        if set(filled) & set(rows):
            name = f"{index}-of-{num_shards}"
            stream = SeqioStream(
                functools.partial(_open, config, provider, index, num_shards),
                config.feature_converter,
                name=name,
                endless=config.num_epochs is None,
            )
            shards.append(Shard(name, stream, filled))
    return config.iterator(
        shards,
        rows=rows,
        features=features,
        tasks={config.mixture_or_task_name: "seqio"},
    )


def _find(config: DatasetConfig) -> Any:
    if config.module is not None:
        try:
            importlib.import_module(config.module)
        except ModuleNotFoundError as error:
            raise UserError(
                f"The module {config.module!r} cannot be imported: {error}. Check "
                "MIXTURE_OR_TASK_MODULE and Python's path."
            ) from error
    name = config.mixture_or_task_name
    known = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    if name not in known:
        raise UserError(
            f"No Task or Mixture {name!r} is registered by {config.module!r}."
            f"{did_you_mean(name, known)} Check MIXTURE_OR_TASK_NAME and MIXTURE_OR_TASK_MODULE."
        )
    return seqio.get_mixture_or_task(name)


def _open(config: DatasetConfig, provider: Any, index: int, num_shards: int) -> tf.data.Dataset:
    dataset = provider.get_dataset(
        sequence_length=dict(config.task_feature_lengths),
        split=config.split,
        use_cached=False,
        shuffle=config.shuffle,
        seed=config.seed,
        shard_info=seqio.ShardInfo(index=index, num_shards=num_shards),
        num_epochs=config.num_epochs,
    )
    options = tf.data.Options()
    options.deterministic = True
    return dataset.with_options(options)
