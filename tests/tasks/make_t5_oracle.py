"""Makes t5_oracle.json: what the preprocessors of the package t5 (0.9.4) make of the fixtures.

    pip install --no-deps --target=oracle t5 babel editdistance nltk rouge-score sacrebleu ...
    PYTHONPATH=oracle:. python -m tests.tasks.make_t5_oracle

In a place of its own, because t5 asks for nightly builds of SeqIO and TFDS.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.tasks.instruct_examples import TFDS, all_examples

FILE = Path(__file__).with_name("t5_oracle.json")


def preprocessor_of(name: str, tfds_name: str) -> Any:
    """The preprocessor of T5's own Task."""
    import functools

    import tensorflow_datasets as tfds
    from t5.data import preprocessors
    from t5.data.glue_utils import get_glue_text_preprocessor

    if name.startswith(("glue", "super_glue")):
        return get_glue_text_preprocessor(tfds.builder(tfds_name).builder_config)
    if name.startswith("wmt"):
        source, target = name.split("_")[1:]
        return functools.partial(
            preprocessors.translate, source_language=source, target_language=target
        )
    if name == "squad":
        return preprocessors.squad
    keys = {"cnn_dailymail": ("article", "highlights"), "xsum": ("document", "summary")}
    article, summary = keys[name]
    return functools.partial(preprocessors.summarize, article_key=article, summary_key=summary)


def _tensor(value: Any) -> Any:
    import tensorflow as tf

    return tf.constant(value.tolist() if hasattr(value, "tolist") else value)


def main() -> None:
    import tensorflow as tf
    import tensorflow_datasets as tfds

    from tasks.instruct.schemas.all import COLLECTIONS

    oracle = {}
    for name, examples in all_examples(TFDS).items():
        collection = COLLECTIONS[name]
        kinds = {template.kind for template in collection.templates}
        if "t5" not in kinds or name in ("trivia_qa", "natural_questions"):
            continue
        features = tfds.builder(collection.tfds).info.features
        encoded = [features.encode_example(example) for example in examples]
        tensors = [tf.nest.map_structure(_tensor, example) for example in encoded]
        dataset = tf.data.Dataset.from_tensors(tensors[0])
        for example in tensors[1:]:
            dataset = dataset.concatenate(tf.data.Dataset.from_tensors(example))
        made = preprocessor_of(name, collection.tfds)(dataset)
        oracle[name] = [
            [example["inputs"].decode(), example["targets"].decode()]
            for example in made.as_numpy_iterator()
        ]
    FILE.write_text(json.dumps(oracle, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
