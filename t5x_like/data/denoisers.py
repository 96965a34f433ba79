"""Steps between the token cache and the model's features: denoising, cutting, EOS.

A step is a frozen dataclass. A Task lists it among its `preprocessors`, where SeqIO may call it on
a `tf.data.Dataset`; the cache stores it as `{"op": name, "args": {...}}`; training rebuilds it from
that and calls `apply` on numpy arrays, without TensorFlow. One call handles a group of documents.
"""

from __future__ import annotations

import dataclasses
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int

from t5x_like.data import spans
from t5x_like.data.cache_format import OutputFeature
from t5x_like.data.ragged import Examples, Ragged
from t5x_like.errors import UserError, did_you_mean

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """What a step may know of its Task.

    Attributes:
      lengths: most tokens of each feature (T5X's `task_feature_lengths`).
      features: the Task's output features, with their vocabularies.
      trimmed: tokens that did not fit into `lengths`, by feature; counted up by the steps.
    """

    lengths: Mapping[str, int]
    features: Mapping[str, OutputFeature]
    trimmed: Counter[str] = dataclasses.field(default_factory=Counter)
    warned: set[str] = dataclasses.field(default_factory=set)

    def length(self, feature: str) -> int:
        if feature not in self.lengths:
            raise UserError(
                f"task_feature_lengths has no length for {feature!r}, only for "
                f"{sorted(self.lengths)}. Add it."
            )
        return self.lengths[feature]

    def trim(self, feature: str, tokens: Ragged, limit: int) -> Ragged:
        """Cuts rows to `limit` tokens; what is lost is counted, and logged the first time."""
        trimmed = tokens.trim(limit)
        lost = len(tokens.values) - len(trimmed.values)
        self.trimmed[feature] += lost
        if lost:
            self.warn_once(
                f"{feature}: {lost} of {len(tokens.values)} tokens lie beyond the length {limit} "
                "and are dropped."
            )
        return trimmed

    def warn_once(self, message: str) -> None:
        """Logs a warning unless one whose first word is the same was logged before."""
        kind = message.split(maxsplit=1)[0]
        if kind not in self.warned:
            self.warned.add(kind)
            log.warning("%s (Said once.)", message)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocessor(ABC):
    """A step after the cache point. `keeps_examples` says that it gives one example for each.

    Attributes:
      sequence_length, output_features: arguments of a call by SeqIO, which sets the fields of a
        preprocessor that is a dataclass; no part of the step.
    """

    sequence_length: Any = dataclasses.field(default=None, repr=False, compare=False)
    output_features: Any = dataclasses.field(default=None, repr=False, compare=False)
    keeps_examples: ClassVar[bool] = False

    @abstractmethod
    def apply(self, examples: Examples, context: Context, rng: np.random.Generator) -> Examples:
        """Turns the examples of one group of documents into examples.

        Raises:
          UserError: the lengths or the vocabulary of `context` do not suit this step.
        """

    def __call__(
        self, dataset: Any, sequence_length: Any = None, output_features: Any = None
    ) -> Any:
        """Runs the same code as a SeqIO preprocessor on a `tf.data.Dataset`."""
        from t5x_like.data import seqio_preprocessors

        return seqio_preprocessors.apply(
            self,
            dataset,
            sequence_length or self.sequence_length,
            output_features or self.output_features,
        )

    def to_dict(self) -> dict[str, Any]:
        """The form in which the cache's manifest stores a step."""
        args = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.compare}
        return {"op": type(self).__name__, "args": args}


def from_dict(step: Mapping[str, Any]) -> Preprocessor:
    """Inverse of `Preprocessor.to_dict`."""
    from t5x_like.data import chat, choices, encoder_steps, templates  # which import this module

    ours = (SpanCorruption, IIDDenoising, PrefixLM, FullLM, AppendEos)
    steps = (*ours, *encoder_steps.STEPS, *templates.STEPS, *choices.STEPS, *chat.STEPS)
    known: dict[str, type[Preprocessor]] = {cls.__name__: cls for cls in steps}
    if step["op"] not in known:
        raise UserError(
            f"The cache asks for the step {step['op']!r}, which this version does not have."
            f"{did_you_mean(step['op'], known)} Cache the task again with this version."
        )
    return known[step["op"]](**step["args"])


# Denoisers. They read the feature "targets" and write "inputs" and "targets".


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Denoiser(Preprocessor):
    """What the denoisers share.

    Attributes:
      prefix: ids put before the inputs, such as a mode token of UL2 (Tay et al. 2022,
        https://arxiv.org/abs/2205.05131).
    """

    prefix: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "prefix", tuple(self.prefix))  # JSON has lists only

    def apply(self, examples: Examples, context: Context, rng: np.random.Generator) -> Examples:
        inputs, targets = self._denoise(documents_of(examples, context), context, rng)
        for token in reversed(self.prefix):
            inputs = inputs.prepend(token)
        return {"inputs": inputs, "targets": targets}

    @abstractmethod
    def _denoise(
        self, documents: Ragged, context: Context, rng: np.random.Generator
    ) -> tuple[Ragged, Ragged]: ...

    def _inputs_length(self, context: Context) -> int:
        return context.length("inputs") - len(self.prefix)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpanCorruption(_Denoiser):
    """T5's objective: random spans become sentinels, the targets spell them out.

    The documents of a group are put end to end, without a separator, and cut into the longest
    sequences whose corruption fits the inputs' length; the last one of a group is shorter.

    Attributes:
      noise_density: fraction of the tokens that are noise.
      mean_noise_span_length: in tokens.
    """

    noise_density: float = 0.15
    mean_noise_span_length: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_density("SpanCorruption", self.noise_density)
        if self.mean_noise_span_length < 1:
            raise UserError(
                f"SpanCorruption.mean_noise_span_length is {self.mean_noise_span_length}; "
                "it must be at least 1 token."
            )

    def tokens_length(self, context: Context) -> int:
        """Number of tokens in an uncorrupted sequence.

        Raises:
          UserError: the lengths are too short for one span, or for the targets.
        """
        law, inputs = self._law(), self._inputs_length(context)
        length, needed = spans.span_corruption_lengths(inputs, **law)
        if inputs < 3 or length < 2:
            raise UserError(
                f"The inputs' length {context.length('inputs')} is too short for one span: a "
                f"token, a sentinel, EOS and {len(self.prefix)} prefix tokens take "
                f"{3 + len(self.prefix)}. Give longer task_feature_lengths."
            )
        # The counts of a mask are rounded in float32, the lengths above in float64.
        noise, num_spans = spans.noise_counts(length, **law)
        length -= max(0, length - noise + num_spans + 1 - inputs)
        needed = max(needed, sum(spans.noise_counts(length, **law)) + 1)
        if context.length("targets") < needed:
            raise UserError(
                f"The targets' length {context.length('targets')} is too short: span corruption of "
                f"{length} tokens (noise_density {self.noise_density}, mean_noise_span_length "
                f"{self.mean_noise_span_length}, inputs' length {context.length('inputs')}) needs "
                f"{needed}. Give longer targets or shorter inputs in task_feature_lengths."
            )
        return length

    def _denoise(
        self, documents: Ragged, context: Context, rng: np.random.Generator
    ) -> tuple[Ragged, Ragged]:
        length = self.tokens_length(context)
        tokens = concatenate(documents).split_rows(length)
        num_full, rest = divmod(len(tokens.values), length)
        masks = [
            spans.random_spans_mask(rng, rows=rows, length=size, **self._law()).ravel()
            for rows, size in ((num_full, length), (1, rest))
        ]
        return _to_sentinels(tokens, np.concatenate(masks), context)

    def _law(self) -> dict[str, float]:
        return {
            "noise_density": self.noise_density,
            "mean_noise_span_length": self.mean_noise_span_length,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class IIDDenoising(_Denoiser):
    """Every token is noise with the same probability; a run of noise becomes one sentinel.

    Documents are joined and cut as for `SpanCorruption`, to the inputs' length less EOS.

    Attributes:
      noise_density: that probability.
    """

    noise_density: float = 0.15

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_density("IIDDenoising", self.noise_density)

    def _denoise(
        self, documents: Ragged, context: Context, rng: np.random.Generator
    ) -> tuple[Ragged, Ragged]:
        length = self._inputs_length(context) - 1
        _check_room("IIDDenoising", length, context)
        # Noise tokens, a sentinel for each run of the others, and EOS: the mean of that and four
        # standard deviations of the noise, each counted twice for its sentinel.
        p = self.noise_density
        most = length * p * (2 - p) + 8 * np.sqrt(length * p * (1 - p))
        needed = min(length + 1, int(np.ceil(most))) + 1
        if context.length("targets") < needed:
            raise UserError(
                f"The targets' length {context.length('targets')} is too short: IIDDenoising of "
                f"{length} tokens at density {p} needs about {needed}. Give longer targets or "
                "shorter inputs in task_feature_lengths."
            )
        tokens = concatenate(documents).split_rows(length)
        mask = rng.random(len(tokens.values)) < p
        return _to_sentinels(tokens, mask, context)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixLM(_Denoiser):
    """The inputs are the first part of a sequence, the targets are the rest.

    Attributes:
      suffix_density: fraction of a sequence that becomes the targets (UL2's S-denoiser: 0.25);
        None draws the length of the prefix uniformly, as T5's prefix_lm does.
      concatenate: put the documents of a group end to end before cutting; if not, no sequence
        holds parts of two documents.
    """

    suffix_density: float | None = None
    concatenate: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.suffix_density is not None:
            _check_density("PrefixLM", self.suffix_density)

    def tokens_length(self, context: Context) -> int:
        """Longest sequence of which both parts, with EOS, always fit.

        Raises:
          UserError: the lengths are too short for one token in each part.
        """
        inputs, targets = self._inputs_length(context) - 1, context.length("targets") - 1
        _check_room("PrefixLM", min(inputs, targets) + 1, context)
        if self.suffix_density is None:
            return max(2, min(inputs, targets))
        sizes = np.arange(2, inputs + targets + 1)
        suffix = self._suffix_lengths(sizes)
        return int(sizes[(suffix <= targets) & (sizes - suffix <= inputs)].max())

    def _denoise(
        self, documents: Ragged, context: Context, rng: np.random.Generator
    ) -> tuple[Ragged, Ragged]:
        length = self.tokens_length(context)
        documents = concatenate(documents) if self.concatenate else documents
        tokens = documents.split_rows(length)
        sizes = tokens.lengths
        if self.suffix_density is None:
            # Uniform on [1, size - 1]; a sequence of one token has an empty prefix.
            drawn = 1 + (rng.random(len(sizes)) * (sizes - 1)).astype(np.int64)
            prefix = np.minimum(drawn, sizes - 1)
        else:
            prefix = sizes - self._suffix_lengths(sizes)
        in_prefix = tokens.position_of_value < np.repeat(prefix, sizes)
        return tokens.select(in_prefix), tokens.select(~in_prefix)

    def _suffix_lengths(self, sizes: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        assert self.suffix_density is not None
        suffix = np.rint(sizes * self.suffix_density).astype(np.int64)
        return np.clip(suffix, 1, np.maximum(sizes - 1, 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullLM(Preprocessor):
    """Language modelling: documents, each with EOS, put end to end and cut to targets' length."""

    def apply(self, examples: Examples, context: Context, rng: np.random.Generator) -> Examples:
        eos_id = context.features["targets"].vocabulary.eos_id
        documents = documents_of(examples, context).append(eos_id)
        return {"targets": concatenate(documents).split_rows(context.length("targets"))}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AppendEos(Preprocessor):
    """Appends EOS to each feature that has `add_eos`, after trimming it to its length less one."""

    keeps_examples: ClassVar[bool] = True

    def apply(self, examples: Examples, context: Context, rng: np.random.Generator) -> Examples:
        done = dict(examples)
        for name, feature in context.features.items():
            if name in examples and feature.add_eos:
                tokens = examples[name]
                if name in context.lengths:
                    tokens = context.trim(name, tokens, context.lengths[name] - 1)
                done[name] = tokens.append(feature.vocabulary.eos_id)
        return done


def documents_of(examples: Examples, context: Context) -> Ragged:
    """The documents in "targets", without padding that their source may have put between."""
    documents = examples["targets"]
    real = documents.values != 0
    if real.all() or context.features["targets"].vocabulary.zero_is_token:
        return documents
    return documents.select(real)


def concatenate(documents: Ragged) -> Ragged:
    """One row with the tokens of all documents."""
    return Ragged(documents.values, np.array([0, len(documents.values)]))


def _to_sentinels(tokens: Ragged, mask: np.ndarray, context: Context) -> tuple[Ragged, Ragged]:
    vocabulary = context.features["targets"].vocabulary
    inputs, num_spans = spans.replace_spans(tokens, mask, first_sentinel=vocabulary.size - 1)
    targets, _ = spans.replace_spans(tokens, ~mask, first_sentinel=vocabulary.size - 1)
    most = num_spans.max(initial=0)
    if most > vocabulary.extra_ids:
        context.warn_once(
            f"sentinels: the vocabulary has {vocabulary.extra_ids}, a sequence has {most} noise "
            "spans. Ordinary ids serve as the others, as in T5."
        )
    return inputs, targets


def _check_density(name: str, density: float) -> None:
    if not 0 < density < 1:
        raise UserError(f"{name}: the density is {density}; it must lie between 0 and 1.")


def _check_room(name: str, tokens: int, context: Context) -> None:
    if tokens < 2:
        raise UserError(
            f"task_feature_lengths {dict(context.lengths)} are too short for {name}: no room for "
            "two tokens beside EOS. Give longer ones."
        )
