"""SeqIO's side of `task_examples`: Tasks that only SeqIO can run, and the functions that score."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from t5x_like.data import seqio_cache, seqio_host
from t5x_like.data.seqio_host import seqio, tf
from t5x_like.data.seqio_preprocessors import output_features
from t5x_like.data.task_examples import Fields, TaskExamples, TaskFunctions
from t5x_like.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from t5x_like.data.dataset import DatasetConfig

log = logging.getLogger(__name__)
seqio_host.hide_accelerators()


def open_tasks(config: DatasetConfig, name: str) -> list[TaskExamples]:
    """The Task or the Tasks of the Mixture `name`, run by SeqIO as they are read.

    Raises:
      UserError: the module, the Task or the split does not exist, or another vocabulary.
    """
    provider = seqio_cache.load_provider(name, config.module)
    tasks = getattr(provider, "tasks", [provider])
    for task in tasks:
        if config.split not in task.splits:
            raise UserError(
                f"{task.name!r} has no split {config.split!r}, only {sorted(task.splits)}."
                f"{did_you_mean(config.split, task.splits)}"
            )
        config.check_vocabulary(output_features(task.output_features))
    return [_examples(config, task) for task in tasks]


def _examples(config: DatasetConfig, task: seqio.Task) -> TaskExamples:
    def read() -> Iterator[Fields]:
        dataset = task.get_dataset(
            sequence_length=dict(config.task_feature_lengths),
            split=config.split,
            use_cached=False,
            shuffle=config.shuffle,
            seed=config.seed,
            num_epochs=1,
        )
        options = tf.data.Options()
        options.deterministic = True
        yield from dataset.with_options(options).as_numpy_iterator()

    return TaskExamples(
        name=task.name,
        module=config.module,
        features=output_features(task.output_features),
        read=read,
    )


def load_functions(name: str, module: str | None) -> TaskFunctions:
    """The metric functions of the Task `name` and its postprocess function.

    Raises:
      UserError: the module or the Task does not exist.
    """
    task: Any = seqio_cache.load_provider(name, module)
    if len(task.metric_objs) > len(task.metric_fns):
        log.warning("%s has metric_objs, which are left out; metric_fns are computed.", name)
    return TaskFunctions(metric_fns=tuple(task.metric_fns), postprocess=task.postprocess_fn)
