"""Longer texts out: WMT translation, CNN/DailyMail and XSum summaries."""

from __future__ import annotations

import functools

from t5x_like.data.templates import Record, Template
from tasks.instruct import metrics
from tasks.instruct.register import Collection
from tasks.instruct.sources import Example

LANGUAGES = {
    "cs": "Czech",
    "de": "German",
    "en": "English",
    "et": "Estonian",
    "fi": "Finnish",
    "fr": "French",
    "gu": "Gujarati",
    "hi": "Hindi",
    "kk": "Kazakh",
    "lt": "Lithuanian",
    "lv": "Latvian",
    "ro": "Romanian",
    "ru": "Russian",
    "tr": "Turkish",
    "zh": "Chinese",
}


def prepare_translation(example: Example, *, source: str, target: str) -> Record:
    """TFDS has the languages as features, Hugging Face below "translation"."""
    texts = example.get("translation") or example
    return {
        "text": texts[source],
        "translation": texts[target],
        "source": LANGUAGES[source],
        "target": LANGUAGES[target],
    }


def translation(source: str, target: str, *, tfds: str = "") -> Collection:
    """Translation between two languages of `LANGUAGES`, named by their codes."""
    return Collection(
        prepare=functools.partial(prepare_translation, source=source, target=target),
        templates=(
            Template("{text}\n\nTranslate to {target}.", "{translation}"),
            Template("Translate from {source} to {target}:\n\n{text}", "{translation}"),
            Template('How is "{text}" said in {target}?', "{translation}"),
            Template("{source}: {text}\n{target}:", "{translation}"),
            Template(
                "Translate from {target} to {source}:\n\n{translation}", "{text}", kind="inversion"
            ),
            Template("translate {source} to {target}: {text}", "{translation}", kind="t5"),
        ),
        metric_fns=(metrics.named("bleu"),),
        tfds=tfds,
    )


def prepare_cnn_dailymail(example: Example) -> Record:
    return {"article": example["article"], "summary": example["highlights"]}


def prepare_xsum(example: Example) -> Record:
    return {"article": example["document"], "summary": example["summary"]}


def _summary(prepare: functools.partial[Record] | object, *asks: str, tfds: str) -> Collection:
    return Collection(
        prepare=prepare,  # type: ignore[arg-type]
        templates=(
            *(Template(ask, "{summary}") for ask in asks),
            Template(
                "Write an article for this summary:\n{summary}", "{article}", kind="inversion"
            ),
            Template("summarize: {article}", "{summary}", kind="t5"),
        ),
        shots=(1,),
        metric_fns=(metrics.named("rouge"),),
        tfds=tfds,
    )


# The language pairs that T5 was tuned on, and those of the other years' news test sets.
_WMT = {
    "wmt14_en_de": ("en", "de", "wmt14_translate/de-en:1.0.0"),
    "wmt14_en_fr": ("en", "fr", "wmt14_translate/fr-en:1.0.0"),
    "wmt15_en_fr": ("en", "fr", "wmt15_translate/fr-en:1.0.0"),
    "wmt16_en_ro": ("en", "ro", "wmt16_translate/ro-en:1.0.0"),
    "wmt19_en_de": ("en", "de", "wmt19_translate/de-en:1.0.0"),
    "wmt14_de_en": ("de", "en", "wmt14_translate/de-en:1.0.0"),
    "wmt16_ro_en": ("ro", "en", "wmt16_translate/ro-en:1.0.0"),
}
COLLECTIONS = {
    **{name: translation(a, b, tfds=tfds) for name, (a, b, tfds) in _WMT.items()},
    "cnn_dailymail": _summary(
        prepare_cnn_dailymail,
        "Write highlights for this article:\n\n{article}",
        "{article}\n\nWhat are the important parts of this article?",
        "Summarize this article:\n{article}",
        tfds="cnn_dailymail:3.4.0",
    ),
    "xsum": _summary(
        prepare_xsum,
        "Summarize in one sentence:\n\n{article}",
        "{article}\n\nWhat is this text about, in one sentence?",
        "{article}\nTL;DR:",
        tfds="xsum:1.1.0",
    ),
}
