"""SeqIO's side of text sources: documents of files as a `seqio.DataSource`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from t5x_like.data import sources
from t5x_like.data.seqio_host import seqio, tf
from t5x_like.errors import UserError, did_you_mean


class DocumentSource(seqio.DataSource):
    """Documents {"text": bytes} of files in any of the formats of `sources`.

    Args:
      files: globs by split. If "validation" is not among them and `validation_fraction` is not 0,
        that share of the documents of "train" makes the validation split.
      format: one of `sources.FORMATS` but "tfds"; "" to go by each file's suffix.
      key: field, column or feature that holds the text.

    Raises:
      UserError: on first use, if a glob matches nothing.
    """

    def __init__(
        self,
        files: Mapping[str, Sequence[str]],
        *,
        format: str = "",
        key: str = "text",
        validation_fraction: float = 0.0,
    ):
        self._files = dict(files)
        self._format = format
        self._key = key
        self._fraction = 0.0 if "validation" in files else validation_fraction
        super().__init__(splits=(*files, "validation") if self._fraction else tuple(files))

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return False

    def list_shards(self, split: str) -> list[str]:
        holds_out = self._fraction and split == "validation"
        return sources.expand(self._files["train" if holds_out else split])

    def identity(self, split: str) -> dict[str, object]:
        """JSON-able description of the documents of `split`."""
        return {
            "files": [sources.file_identity(path) for path in self.list_shards(split)],
            "format": self._format,
            "key": self._key,
            "validation_fraction": self._fraction,
        }

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        *,
        sequence_length: Mapping[str, int] | None = None,
        use_cached: bool = False,
        num_epochs: int | None = 1,
    ) -> tf.data.Dataset:
        """Documents of every `num_shards`-th file from `index` on; `shuffle` shuffles the files."""
        del sequence_length, use_cached, num_epochs  # of the base class, unused there too
        files = self.list_shards(split)
        if shard_info is not None:
            files = files[shard_info.index :: shard_info.num_shards]
        if shuffle:
            np.random.default_rng(seed).shuffle(files)
        return tf.data.Dataset.from_generator(
            lambda: ({"text": document} for document in self._documents(files, split)),
            output_signature={"text": tf.TensorSpec((), tf.string)},
        )

    def _documents(self, files: Sequence[str], split: str) -> Iterator[bytes]:
        for path in files:
            format = self._format or sources.format_of(path)
            if format == "tfrecord":
                documents = _read_tfrecord(path, self._key)
            else:
                documents = sources.read_documents(path, format=format, key=self._key)
            for document in documents:
                held_out = self._fraction and sources.held_out(document, self._fraction)
                if not self._fraction or held_out == (split == "validation"):
                    yield document


def _read_tfrecord(path: str, key: str) -> Iterator[bytes]:
    compression = "GZIP" if path.endswith(".gz") else ""
    try:
        for record in tf.data.TFRecordDataset(path, compression).as_numpy_iterator():
            features = tf.train.Example.FromString(record).features.feature
            if key not in features:
                hint = did_you_mean(key, features)
                raise UserError(f"A tf.Example of {path} has no feature {key!r}.{hint}")
            yield features[key].bytes_list.value[0]
    except tf.errors.DataLossError as error:
        raise UserError(f"{path} is not a TFRecord file, or is damaged: {error.message}") from None


def clean_text(dataset: tf.data.Dataset, *, key: str = "text") -> tf.data.Dataset:
    """Preprocessor: {key: raw bytes} to {"targets": valid UTF-8, "replaced_bytes": i32[]}.

    A document of only whitespace becomes empty. `t5x_like cache` sums "replaced_bytes", drops and
    counts empty documents.
    """

    def clean(raw: bytes) -> tuple[bytes, np.int32]:
        text, replaced = sources.clean_text(raw)
        return text.encode(), np.int32(replaced)

    def clean_example(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        text, replaced = tf.numpy_function(clean, [example[key]], [tf.string, tf.int32])
        return {
            "targets": tf.ensure_shape(text, []),
            "replaced_bytes": tf.ensure_shape(replaced, []),
        }

    # Threads would only wait for each other's turn in Python.
    return dataset.map(clean_example)


def source_of(corpus: sources.TextCorpus) -> tuple[seqio.DataSource, str]:
    """The data source of `corpus`, and the feature that holds its text."""
    if corpus.format == "tfds":
        if len(corpus.files) != 1:
            raise UserError("A TFDS corpus is one name, such as 'c4/en:3.0.1'.")
        return seqio.TfdsDataSource(tfds_name=corpus.files[0]), corpus.key
    splits = {"train": corpus.files}
    if corpus.validation_files:
        splits["validation"] = corpus.validation_files
    source = DocumentSource(
        splits,
        format=corpus.format,
        key=corpus.key,
        validation_fraction=corpus.validation_fraction,
    )
    return source, "text"
