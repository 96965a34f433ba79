"""Our models in EleutherAI's lm-evaluation-harness (https://github.com/EleutherAI).

    from lm_eval import simple_evaluate
    from t5x_like.evaluation.lm_eval_adapter import HarnessModel

    simple_evaluate(model=HarnessModel.load("/data/run1"), tasks=["hellaswag"])

It comes with the extra `harness`.

A model with an encoder reads the context there and is asked for the continuation; a decoder alone
reads both as one text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from t5x_like.config import model_files
from t5x_like.decoding.beam_search import BeamSearch
from t5x_like.decoding.sampling import Sampling
from t5x_like.errors import UserError
from t5x_like.evaluation.codecs import Codec
from t5x_like.evaluation.infer_run import InferRun
from t5x_like.evaluation.predictor import Decoding, Predictor, Prompt
from t5x_like.evaluation.serving import Served

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
except ModuleNotFoundError as missing:
    raise UserError(
        f"The harness is not installed ({missing}): pip install 't5x_like[harness]'."
    ) from missing

# Most tokens of a text that is scored in one piece where the model names no limit itself.
_WINDOW = 1024
_NEW_TOKENS = 256


class HarnessModel(LM):
    """An `lm_eval` model; its three kinds of requests, in the order of the requests."""

    def __init__(
        self,
        predictor: Predictor,
        params: Any,
        codec: Codec,
        *,
        window: int = _WINDOW,
        max_new_tokens: int = _NEW_TOKENS,
    ) -> None:
        """`window`: most tokens of context and continuation; a longer context loses its start."""
        super().__init__()
        self._predictor, self._params, self._codec = predictor, params, codec
        self._window = min(window, predictor.max_length or window)
        self._max_new_tokens = max_new_tokens

    @classmethod
    def load(cls, model_dir: str, *bindings: str) -> HarnessModel:
        """The latest checkpoint of a directory that training or `t5x_like convert` wrote.

        Args:
          bindings: gin bindings `NAME=VALUE` of gin/runs/infer.gin, such as `BATCH_SIZE=16`.

        Raises:
          UserError: see `t5x_like infer`.
        """
        config = model_files.parse(
            "gin/runs/infer.gin",
            model_dir=model_dir,
            bindings=[f"MODEL_DIR={model_dir!r}", *bindings],
        )
        run = config.build(InferRun)
        served = Served(run, source=run.source, batch_size=run.batch_size)
        return cls(served.predictor, served.load(run.checkpoint), served.codec)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation in nats, whether greedy decoding would write it)."""
        prompts = []
        for index, request in enumerate(requests):
            context, continuation = request.args
            inputs, targets = self._split(context, continuation)
            prompts.append(self._fitted(Prompt(index=index, inputs=inputs, targets=targets)))
        scores = self._predictor.score(self._params, prompts)
        return [(score.log_likelihood, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-likelihood of whole texts: every token once, after as much context as fits."""
        prompts: list[Prompt] = []
        owners = []
        for owner, request in enumerate(requests):
            for window in self._windows(request.args[0]):
                prompts.append(dataclasses.replace(window, index=len(prompts)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, score in zip(owners, self._predictor.score(self._params, prompts), strict=True):
            totals[owner] += score.log_likelihood
        return totals

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Text written after each context, up to the first of its stop strings."""
        answers: dict[int, str] = {}
        groups: dict[Decoding, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(self._decoding(dict(request.args[1])), []).append(index)
        for decoding, indices in groups.items():
            prompts = [self._prompt(requests[i].args[0], i, decoding) for i in indices]
            generated = self._predictor.generate(
                self._params, prompts, decoding=decoding, eos_ids=self._codec.eos_ids
            )
            for i, generation in zip(indices, generated, strict=True):
                text = self._codec.decode(generation.tokens[0])
                answers[i] = cut_at(text, _stops(requests[i].args[1]))
        return [answers[i] for i in range(len(requests))]

    # ---- Prompts.

    def _split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Spaces between the two belong to the continuation, as in the harness's own models."""
        stripped = context.rstrip()
        continuation, context = context[len(stripped) :] + continuation, stripped
        inputs = self._start(self._codec.prompt(context))
        # A decoder whose prompts end in EOS was trained on inputs and targets as two texts, too.
        two_texts = self._predictor.has_encoder or inputs[-1] in self._codec.eos_ids
        if two_texts or not context:
            return inputs, self._codec.continuation(continuation)
        # As one text, which may be cut into other tokens than its parts.
        whole = self._codec.prompt(context + continuation)
        shared = next(
            (i for i, (a, b) in enumerate(zip(inputs, whole, strict=False)) if a != b),
            min(len(inputs), len(whole)),
        )
        return whole[:shared], whole[shared:]

    def _start(self, inputs: list[int]) -> list[int]:
        """What stands before a text without context: BOS, else the end of the text before."""
        return inputs or [self._codec.eos_ids[0]]

    def _fitted(self, prompt: Prompt) -> Prompt:
        room = self._window - (0 if self._predictor.has_encoder else len(prompt.targets))
        if room < 1:
            raise UserError(
                f"A continuation has {len(prompt.targets)} tokens, and {self._window} are allowed "
                "with its context: give a larger window."
            )
        excess = len(prompt.inputs) - room
        return dataclasses.replace(prompt, inputs=prompt.inputs[max(0, excess) :])

    def _windows(self, text: str) -> list[Prompt]:
        """Cuts a text so that each token is scored once (`LM.loglikelihood_rolling`)."""
        ids = self._codec.continuation(text)
        if self._predictor.has_encoder:
            empty = self._codec.prompt("")
            pieces = [ids[i : i + self._window] for i in range(0, len(ids), self._window)]
            return [Prompt(index=0, inputs=empty, targets=piece) for piece in pieces]
        whole = self._start(self._codec.prompt("")[:1]) + ids
        windows = []
        for start in range(1, len(whole), self._window - 1):
            stop = min(start + self._window - 1, len(whole))
            first = max(0, stop - self._window)
            windows.append(Prompt(index=0, inputs=whole[first:start], targets=whole[start:stop]))
        return windows

    def _prompt(self, context: str, index: int, decoding: Decoding) -> Prompt:
        inputs = self._start(self._codec.prompt(context))
        if self._predictor.max_length is None:
            return Prompt(index=index, inputs=inputs)
        new = 0 if self._predictor.has_encoder else decoding.max_new_tokens
        room = max(1, self._predictor.max_length - new)
        return Prompt(index=index, inputs=inputs[-room:])

    def _decoding(self, settings: dict[str, Any]) -> Decoding:
        """The harness's settings, which are those of Hugging Face's `generate`."""
        new = settings.get("max_gen_toks", settings.get("max_new_tokens", self._max_new_tokens))
        if int(settings.get("num_beams", 1)) > 1:
            alpha = float(settings.get("length_penalty", 1.0))
            return BeamSearch(
                max_new_tokens=int(new),
                num_beams=int(settings["num_beams"]),
                alpha=alpha,
                length_penalty="power",
            )
        draws = bool(settings.get("do_sample", False))
        return Sampling(
            max_new_tokens=int(new),
            temperature=float(settings.get("temperature", 1.0)) if draws else 0.0,
            top_k=int(settings.get("top_k", 0) or 0) if draws else 0,
            top_p=float(settings.get("top_p", 1.0)) if draws else 1.0,
            stop_sequences=self._stop_ids(_stops(settings)),
        )

    def _stop_ids(self, stops: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Ids that spell a stop string; the text is cut at it in any case, this saves the rest."""
        spelt = [tuple(self._codec.continuation(stop)) for stop in stops]
        return tuple(ids for ids, stop in zip(spelt, stops, strict=True) if self._spells(ids, stop))

    def _spells(self, ids: Sequence[int], stop: str) -> bool:
        ends = set(ids) & set(self._codec.eos_ids)
        return bool(ids) and not ends and self._codec.decode(ids) == stop


def _stops(settings: Any) -> list[str]:
    until = settings.get("until") or []
    return [until] if isinstance(until, str) else list(until)


def cut_at(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first of the stop strings that it has."""
    return text[: min((text.find(stop) for stop in stops if stop and stop in text), default=None)]
