"""Scores against the model's own logits; prompts get alone what they get in a batch."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from t5x_like.config import gin_config
from t5x_like.decoding.sampling import Sampling
from t5x_like.errors import UserError
from t5x_like.evaluation.infer_run import InferRun
from t5x_like.evaluation.predictor import Predictor, Prompt
from t5x_like.evaluation.serving import Served


def serve(model_dir, batch_size: int = 8) -> tuple[Served, Predictor, dict]:
    files = ["gin/runs/infer.gin", str(model_dir / "config.gin")]
    run = gin_config.parse(files, [f"MODEL_DIR={model_dir}"]).build(InferRun)
    served = Served(run, source=run.source, batch_size=batch_size)
    return served, served.predictor, served.load(run.checkpoint)


RNG = np.random.default_rng(0)
PROMPTS = [
    Prompt(
        index=i,
        inputs=[0, *RNG.integers(3, 250, 3 + 5 * i % 17).tolist()],
        targets=RNG.integers(3, 250, 1 + i % 4).tolist(),
    )
    for i in range(11)
]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def one_by_one(served: Served, params: dict, prompt: Prompt, *, encoder: bool) -> float:
    """The score of one prompt, unpadded, from the logits of the model itself."""
    before = [0] if encoder else list(prompt.inputs)
    whole = np.array([[*before, *prompt.targets]], np.int32)
    batch = {"decoder_input_tokens": whole[:, :-1], "decoder_target_tokens": whole[:, 1:]}
    if encoder:
        batch["encoder_input_tokens"] = np.array([prompt.inputs], np.int32)
    forward = jax.jit(lambda params, batch: served._model_def.bind(params)(batch))
    logits = np.asarray(forward(params, batch))[0]
    values = log_softmax(logits)[np.arange(whole.shape[1] - 1), whole[0, 1:]]
    return float(values[len(before) - 1 :].sum())


@pytest.mark.parametrize("kind", ["pretrained", "decoder"])
def test_scores(kind, request) -> None:
    served, predictor, params = serve(request.getfixturevalue(kind))
    encoder = kind == "pretrained"
    prompts = [
        Prompt(index=p.index, inputs=p.inputs[1:] if encoder else p.inputs, targets=p.targets)
        for p in PROMPTS
    ]
    scores = predictor.score(params, prompts)
    host = jax.device_get(params)
    for prompt, score in list(zip(prompts, scores, strict=True))[:9:4]:
        expected = one_by_one(served, host, prompt, encoder=encoder)
        # float32, summed over at most four tokens.
        assert score.log_likelihood == pytest.approx(expected, abs=1e-4)
        assert score.num_tokens == len(prompt.targets)


@pytest.mark.parametrize("kind", ["pretrained", "decoder"])
def test_greedy_is_what_scoring_calls_greedy(kind, request) -> None:
    _, predictor, params = serve(request.getfixturevalue(kind))
    greedy = Sampling(max_new_tokens=3)
    prompts = [Prompt(index=p.index, inputs=p.inputs[-9:]) for p in PROMPTS[:4]]
    generated = predictor.generate(params, prompts, decoding=greedy, eos_ids=(1,))
    again = [
        Prompt(index=p.index, inputs=p.inputs, targets=g.tokens[0])
        for p, g in zip(prompts, generated, strict=True)
    ]
    scores = predictor.score(params, again)
    assert all(score.is_greedy for score in scores)
    for score, generation in zip(scores, generated, strict=True):
        assert score.log_likelihood == pytest.approx(generation.scores[0], abs=1e-4)
    other = [Prompt(index=0, inputs=again[0].inputs, targets=[again[0].targets[0] ^ 1])]
    assert not predictor.score(params, other)[0].is_greedy


def test_alone_as_in_a_batch_sampled(decoder) -> None:
    _, predictor, params = serve(decoder)
    drawn = Sampling(max_new_tokens=4, temperature=1.0, num_samples=2)
    settings = {"decoding": drawn, "eos_ids": (1,), "seed": 5}
    together = predictor.generate(params, PROMPTS, **settings)
    for place in (0, 7):
        (alone,) = predictor.generate(params, [PROMPTS[place]], **settings)
        assert alone.tokens == together[place].tokens


def test_limits(decoder, pretrained) -> None:
    _, predictor, params = serve(decoder)
    assert predictor.max_length == 48
    with pytest.raises(UserError, match=r"46 tokens and 3 to follow are more than the 48"):
        predictor.generate(
            params,
            [Prompt(index=0, inputs=[5] * 46)],
            decoding=Sampling(max_new_tokens=3),
            eos_ids=(1,),
        )
    fits = Prompt(index=0, inputs=[5] * 46, max_new_tokens=2)
    (done,) = predictor.generate(params, [fits], decoding=Sampling(max_new_tokens=3), eos_ids=())
    assert len(done.tokens[0]) == 2
    assert serve(pretrained)[1].max_length is None
