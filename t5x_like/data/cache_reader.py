"""Reads the records of a cache by index, and finds out early what is wrong with them."""

from __future__ import annotations

import dataclasses
import functools
from bisect import bisect_right
from collections.abc import Sequence

import grain
import numpy as np

from t5x_like.data import cache_format
from t5x_like.data.cache_format import CorpusManifest
from t5x_like.data.ragged import Examples, Ragged
from t5x_like.errors import UserError, did_you_mean

# A split of up to so many tokens is read once and kept (as int32).
_TOKENS_IN_MEMORY = 2**25


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Records:
    """The records [skip, skip + take) of a file, in the form that ArrayRecord asks for."""

    filename: str
    take: int
    examples_in_shard: int
    skip: int = 0


class SplitReader:
    """The documents of a split of a corpus, by index.

    Attributes:
      num_documents: number of records.
      mean_tokens: mean number of tokens in a record, all features together.
    """

    def __init__(self, cache_dir: str, corpus: CorpusManifest, split: str):
        """Checks the files against the manifest.

        Raises:
          UserError: there is no such split, it is empty, or a file is missing or of another size.
        """
        directory = cache_format.corpus_dir(cache_dir, corpus.fingerprint)
        if split not in corpus.splits:
            raise UserError(
                f"The cache {directory} has no split {split!r}, only {sorted(corpus.splits)}."
                f"{did_you_mean(split, corpus.splits)}"
            )
        manifest = corpus.splits[split]
        if not manifest.records or not sum(manifest.tokens.values()):
            raise UserError(
                f"Split {split!r} of {directory} is empty ({manifest.records} documents, "
                f"{sum(manifest.tokens.values())} tokens). Give it text and cache it again."
            )
        self.num_documents = manifest.records
        self.mean_tokens = sum(manifest.tokens.values()) / manifest.records
        self._features = {
            name: feature
            for name, feature in corpus.features.items()
            if feature.rank == 1 and np.dtype(feature.dtype).kind in "iu"
        }
        self._stored = corpus.features
        files = []
        for shard in (shard for shard in manifest.shards if shard.records):
            path = cache_format.record_file(directory, split, shard.name)
            size = path.stat().length if path.exists() else None
            if size != shard.bytes:
                found = "is missing" if size is None else f"has {size} bytes"
                raise UserError(
                    f"The record file {path} {found}; its manifest says {shard.bytes} bytes. "
                    f"Delete {directory} and run `t5x_like cache` again."
                )
            files.append(
                _Records(filename=str(path), take=shard.records, examples_in_shard=shard.records)
            )
        self._files = files
        self._ends = np.cumsum([file.take for file in files]).tolist()
        self._source = grain.sources.ArrayRecordDataSource(files)

    def read(self, indices: Sequence[int]) -> Examples:
        """Returns the token features of the given documents.

        Raises:
          UserError: a record cannot be read.
        """
        if self.num_documents * self.mean_tokens > _TOKENS_IN_MEMORY:
            return self._read(indices)
        rows = np.asarray(indices)
        return {name: tokens.take(rows) for name, tokens in self._all.items()}

    def nothing(self) -> Examples:
        """The same without any document; reads nothing."""
        return {name: Ragged.from_rows([]) for name in self._features}

    @functools.cached_property
    def _all(self) -> Examples:
        return self._read(range(self.num_documents))

    def _read(self, indices: Sequence[int]) -> Examples:
        documents = [self.read_one(index) for index in indices]
        return {
            name: Ragged.from_rows([document[name] for document in documents])
            for name in self._features
        }

    def read_one(self, index: int) -> dict[str, np.ndarray]:
        """All that the cache has of a document, features of bytes included.

        Raises:
          UserError: the record cannot be read.
        """
        try:
            return cache_format.decode_record(self._source[index], self._stored)
        # ArrayRecord raises RuntimeError or IndexError, msgpack and numpy ValueError.
        except (RuntimeError, ValueError, IndexError) as error:
            file = bisect_right(self._ends, index)
            record = index - (self._ends[file] - self._files[file].take)
            raise UserError(
                f"Record {record} of {self._files[file].filename} cannot be read: "
                f"{' '.join(str(error).split())}. Delete the file's corpus and run "
                "`t5x_like cache` again."
            ) from error
