"""Runs a model over prompts: text to be generated, or targets to be scored, in batches.

Prompts are sorted by length before they are cut into batches, and padded to one of few lengths, so
that little is computed for padding and few programs are compiled. What a prompt gets does not
depend on its neighbours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5x_like.data.converters import FeatureConverter, PrefixLMConverter
from t5x_like.data.instruct_converters import TargetsLMConverter
from t5x_like.decoding.beam_search import BeamSearch
from t5x_like.decoding.generate import Generator, example_keys
from t5x_like.decoding.sampling import Sampling
from t5x_like.errors import UserError
from t5x_like.kernels.cross_entropy import cross_entropy
from t5x_like.layers.positions import LearnedPositionsConfig
from t5x_like.models.base import ModelDef
from t5x_like.models.decoder_only import DecoderOnlyConfig
from t5x_like.models.encoder_decoder import EncoderDecoderConfig
from t5x_like.parallel import logical

Decoding = Sampling | BeamSearch
Ids = Sequence[int]
_SHORTEST = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """One request.

    Attributes:
      index: names it; random draws depend on it, and not on the batch that it is in.
      inputs: what an encoder reads; for a decoder alone what it reads before it writes, its first
        token (such as BOS) included.
      targets: what is scored.
      max_new_tokens: most tokens to write; None for what the decoding says.
    """

    index: int
    inputs: Ids
    targets: Ids = ()
    max_new_tokens: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """What was written for a prompt, the best sample first.

    Attributes:
      tokens: ids of each sample, the end of sequence included if it came.
      scores: the log-probability of each in nats, penalised by length for beams.
    """

    tokens: list[list[int]]
    scores: list[float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """The targets' log-likelihood in nats; their number; whether each was the likeliest token."""

    log_likelihood: float
    num_tokens: int
    is_greedy: bool


class Predictor:
    """A model on a mesh; compiles a program for each shape that comes up.

    Attributes:
      has_encoder: whether inputs are read by an encoder.
      max_length: most positions that the decoder (and encoder) can have; None for no limit.
    """

    def __init__(
        self,
        model_def: ModelDef,
        *,
        mesh: Mesh,
        rules: logical.Rules,
        batch_size: int,
        bidirectional_prompt: bool = False,
    ) -> None:
        """`bidirectional_prompt`: a prefix language model, whose prompt sees itself both ways.

        Raises:
          UserError: a model without a decoder.
        """
        config = model_def.config
        if not isinstance(config, EncoderDecoderConfig | DecoderOnlyConfig):
            raise UserError(
                f"{type(config).__name__} has no decoder: it cannot write, nor score what follows. "
                "Take an encoder-decoder or decoder-only model."
            )
        positions = config.positions
        self.has_encoder = isinstance(config, EncoderDecoderConfig)
        self.max_length = (
            positions.max_length if isinstance(positions, LearnedPositionsConfig) else None
        )
        self._model_def, self._mesh, self._rules = model_def, mesh, rules
        self._bidirectional = bidirectional_prompt
        shards = logical.batch_sharding(mesh, rules).shard_shape((mesh.size,))[0]
        # As many rows as the devices can share.
        degree = mesh.size // shards
        self._batch_size = -(-batch_size // degree) * degree
        self._generators: dict[Any, Generator] = {}
        self._score = self._make_score()

    def generate(
        self,
        params: Any,
        prompts: Sequence[Prompt],
        *,
        decoding: Decoding,
        eos_ids: tuple[int, ...],
        seed: int = 0,
    ) -> list[Generation]:
        """Writes for every prompt; in the order of `prompts`.

        Args:
          eos_ids: tokens that end a sequence.
          seed: of sampling; what a prompt draws depends on it and on `index`.

        Raises:
          UserError: a prompt, with what is to be written, is longer than the model allows.
        """
        generator = self._generator(decoding, eos_ids)
        results: dict[int, Generation] = {}
        for places, rows in self._batches(prompts, lambda p: len(p.inputs)):
            limits = [self._limit(row, decoding.max_new_tokens) for row in rows]
            limits[len(places) :] = [0] * (len(rows) - len(places))  # Rows that fill up the batch.
            done = generator(
                params,
                self._prompt_batch(rows),
                keys=example_keys(seed, np.array([row.index for row in rows])),
                max_new_tokens=np.array(limits),
            )
            host = jax.device_get((done.tokens, done.lengths, done.scores))
            for place, tokens, lengths, scores in zip(places, *host, strict=False):
                results[place] = Generation(
                    tokens=[t[:n].tolist() for t, n in zip(tokens, lengths, strict=True)],
                    scores=[float(score) for score in scores],
                )
        return [results[place] for place in range(len(prompts))]

    def score(self, params: Any, prompts: Sequence[Prompt]) -> list[Score]:
        """The log-likelihood of every prompt's targets; in the order of `prompts`.

        Raises:
          UserError: inputs and targets are longer than the model allows.
        """
        for prompt in prompts:
            self._limit(dataclasses.replace(prompt, max_new_tokens=len(prompt.targets)), 0)
        results: dict[int, Score] = {}
        for places, rows in self._batches(prompts, lambda p: len(p.inputs) + len(p.targets)):
            host = jax.device_get(self._score(params, self._place(self._score_batch(rows))))
            for place, row, total, greedy in zip(places, rows, *host, strict=False):
                results[place] = Score(
                    log_likelihood=float(total),
                    num_tokens=len(row.targets),
                    is_greedy=bool(greedy),
                )
        return [results[place] for place in range(len(prompts))]

    def room(self, following: int) -> int | None:
        """Tokens that a prompt may have if `following` come after it; None for no limit.

        Below 1 if these alone are too many.
        """
        if self.max_length is None:
            return None
        left = self.max_length - following
        return left if not self.has_encoder or left < 0 else self.max_length

    def check_room(self, decoding: Decoding) -> None:
        """Raises a UserError if what is to be written leaves no position for any prompt."""
        room = self.room(decoding.max_new_tokens)
        if room is not None and room < 1:
            raise UserError(
                f"MAX_NEW_TOKENS = {decoding.max_new_tokens} leaves no room for a prompt among the "
                f"{self.max_length} positions of the model: lower it."
            )

    # ---- Batches.

    def _batches(
        self, prompts: Sequence[Prompt], length: Callable[[Prompt], int]
    ) -> Iterator[tuple[list[int], list[Prompt]]]:
        """Places of the prompts of each batch, and its rows: the last of them repeated to fill."""
        order = sorted(range(len(prompts)), key=lambda i: (length(prompts[i]), i))
        for start in range(0, len(order), self._batch_size):
            places = order[start : start + self._batch_size]
            rows = [prompts[place] for place in places]
            yield places, rows + rows[-1:] * (self._batch_size - len(rows))

    def _prompt_batch(self, rows: Sequence[Prompt]) -> dict[str, np.ndarray]:
        if self.has_encoder:
            return {"encoder_input_tokens": self._pad([row.inputs for row in rows])}
        lengths = np.array([len(row.inputs) for row in rows], np.int32)
        tokens = self._pad([row.inputs for row in rows])
        batch = {"decoder_prompt_tokens": tokens, "decoder_prompt_lengths": lengths}
        if self._bidirectional:
            seen = np.arange(tokens.shape[1]) < lengths[:, None]
            batch["decoder_causal_attention"] = seen.astype(np.int32)
        return batch

    def _score_batch(self, rows: Sequence[Prompt]) -> dict[str, np.ndarray]:
        """Decoder inputs, targets, loss weights and the prefix; ids 0 of targets are kept."""
        if self.has_encoder:
            before = [[0]] * len(rows)  # The decoder begins with id 0.
            batch = {"encoder_input_tokens": self._pad([row.inputs for row in rows])}
        else:
            before, batch = [list(row.inputs) for row in rows], {}
        whole = [[*b, *row.targets] for b, row in zip(before, rows, strict=True)]
        targets = self._pad([ids[1:] for ids in whole])
        place = np.arange(targets.shape[1])
        sizes = np.array([len(ids) - 1 for ids in whole])[:, None]
        first = np.array([len(b) - 1 for b in before])[:, None]
        batch |= {
            "decoder_input_tokens": self._pad([ids[:-1] for ids in whole]),
            "targets": targets,
            # Says which positions are there; an id 0 is one of them.
            "decoder_target_tokens": np.where(place < sizes, np.maximum(targets, 1), 0),
            "weights": ((place >= first) & (place < sizes)).astype(np.float32),
        }
        if self._bidirectional and not self.has_encoder:
            batch["decoder_causal_attention"] = (place <= first).astype(np.int32)
        return batch

    def _pad(self, rows: Sequence[Ids]) -> np.ndarray:
        """i32[rows, length] padded with 0 to 16, 32, 64, ... or to the model's limit."""
        longest, length = max(len(row) for row in rows), _SHORTEST
        while length < longest:
            length *= 2
        if self.max_length is not None and longest <= self.max_length:
            length = min(length, self.max_length)
        padded = np.zeros((len(rows), length), np.int32)
        for i, row in enumerate(rows):
            padded[i, : len(row)] = row
        return padded

    def _limit(self, prompt: Prompt, default: int) -> int:
        """Tokens to write for a prompt, if there are as many positions."""
        new = default if prompt.max_new_tokens is None else prompt.max_new_tokens
        sides = [len(prompt.inputs), new] if self.has_encoder else [len(prompt.inputs) + new]
        if self.max_length is not None and max(sides) > self.max_length:
            raise UserError(
                f"A prompt of {len(prompt.inputs)} tokens and {new} to follow are more than the "
                f"{self.max_length} positions of the model: shorten it or allow fewer new tokens."
            )
        return new

    # ---- Devices.

    def _place(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """All rows, which every process has -> the global batch on the mesh."""
        rows = logical.local_rows(self._mesh, self._rules, self._batch_size)
        local = {name: array[rows] for name, array in batch.items()}
        return logical.to_global(self._mesh, self._rules, local, self._batch_size)

    def _generator(self, decoding: Decoding, eos_ids: tuple[int, ...]) -> Generator:
        wanted = (decoding, eos_ids)
        if wanted not in self._generators:
            self._generators[wanted] = Generator(
                self._model_def, decoding, eos_ids=eos_ids, mesh=self._mesh, rules=self._rules
            )
        return self._generators[wanted]

    def _make_score(self) -> Callable[..., Any]:
        def score(params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            with logical.use_rules(self._mesh, self._rules):
                logits = self._model_def.bind(params)(batch)
                loss, _, likeliest = cross_entropy(logits, batch["targets"])
            counts = batch["weights"] > 0
            return -jnp.sum(loss * counts, -1), jnp.all(likeliest | ~counts, -1)

        return jax.jit(score, out_shardings=NamedSharding(self._mesh, PartitionSpec()))


def is_prefix_lm(converter: FeatureConverter | None) -> bool:
    """Whether a decoder alone sees its inputs in both directions, as training lays them out."""
    return isinstance(converter, PrefixLMConverter) and not isinstance(
        converter, TargetsLMConverter
    )
