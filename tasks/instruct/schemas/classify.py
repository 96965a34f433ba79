"""GLUE, SuperGLUE, BoolQ and ANLI. The `t5` templates are T5's (arXiv:1910.10683, appendix D)."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

from t5x_like.data.templates import Record, Template
from tasks.instruct import metrics
from tasks.instruct.register import Collection
from tasks.instruct.sources import Example

_UNLABELLED = "<unk>"  # T5's target where the label is -1
_CHOICES = "\n{choices:lines}"


def _label(index: Any, names: Sequence[str], words: Sequence[str]) -> dict[str, Any]:
    """Fields of a label: T5's name of it, and the words that the templates use."""
    known = 0 <= int(index) < len(names)
    return {
        "label_name": names[int(index)] if known else _UNLABELLED,
        "answer": words[int(index)] if known else _UNLABELLED,
        "label": int(index),
        "choices": list(words),
    }


def prepare(
    example: Example, *, texts: tuple[str, ...], names: tuple[str, ...], words: tuple[str, ...] = ()
) -> Record:
    """The features `texts`, and those of `_label`."""
    label = example["answer"] if "label" not in example else example["label"]
    return {k: example[k] for k in texts} | _label(label, names, words or names)


def _collection(
    *templates: Template, t5: str = "", prepare: Any, tfds: str, **settings: Any
) -> Collection:
    own = (Template(t5, "{label_name}", kind="t5"),) if t5 else ()
    settings = {"metric_fns": (metrics.accuracy,)} | settings
    return Collection(prepare=prepare, templates=(*templates, *own), tfds=tfds, **settings)


def _inverted(answer: str, wanted: str) -> Template:
    """The question in place of the answer."""
    return Template(answer, wanted, kind="inversion")


def _classify(
    *asks: str, inverse: tuple[str, str] | None = None, answer: str = "{answer}", **settings: Any
) -> Collection:
    templates = [Template(ask, answer) for ask in asks]
    return _collection(*templates, *([_inverted(*inverse)] if inverse else []), **settings)


_single = functools.partial(prepare, texts=("sentence",))
_pair = functools.partial(prepare, texts=("sentence1", "sentence2"))
_ENTAILS = ("entailment", "not_entailment")
_YES_NO = ("yes", "no")


def prepare_stsb(example: Example) -> Record:
    """The similarity, rounded to 0.2 as T5 has it."""
    score = f"{round(example['label'] * 5) / 5:.1f}"
    texts = {k: example[k] for k in ("sentence1", "sentence2")}
    return texts | {"answer": score, "label_name": score}


_NLI = (
    '{premise}\n\nBased on the paragraph above, can we conclude that "{hypothesis}"?' + _CHOICES,
    "Premise: {premise}\nHypothesis: {hypothesis}\nDoes the premise entail the hypothesis?"
    + _CHOICES,
    "Read this: {premise}\nIs it true that {hypothesis:lower}\nChoose {choices:or}.",
    "Given that {premise} Therefore, it must be true that {hypothesis} {choices:or}?",
)
_NLI_INVERSE = (
    '{premise}\nWrite a sentence so that the answer to "Can we conclude it?" is: {answer}.',
    "{hypothesis}",
)
_ENTAIL_WORDS = ("yes", "it is not possible to tell", "no")


def _rte(name: str, texts: tuple[str, str], words: tuple[str, ...], tfds: str) -> Collection:
    first, second = texts
    asks = [
        ask.replace("{premise", f"{{{first}").replace("{hypothesis", f"{{{second}") for ask in _NLI
    ]
    inverse = (_NLI_INVERSE[0].replace("{premise", f"{{{first}"), f"{{{second}}}")
    keys = sorted(texts)
    t5 = " ".join([name, *(f"{key}: {{{key}}}" for key in keys)])
    made = functools.partial(prepare, texts=texts, names=_ENTAILS, words=words)
    return _classify(*asks, inverse=inverse, t5=t5, prepare=made, tfds=tfds)


_PARAPHRASE = (
    "{sentence1}\n{sentence2}\nDo these two sentences mean the same thing?" + _CHOICES,
    "Is the second sentence a paraphrase of the first?\n1. {sentence1}\n2. {sentence2}" + _CHOICES,
    'Can "{sentence1}" be restated as "{sentence2}"? Answer {choices:or}.',
)
_SAME = ("no", "yes")

GLUE = {
    "cola": _classify(
        'Is the sentence "{sentence}" grammatically acceptable?' + _CHOICES,
        "Would a linguist rate this sentence as {choices:or}?\n{sentence}",
        "{sentence}\nIs the sentence above acceptable English?" + _CHOICES,
        inverse=("Write a sentence that a linguist calls {answer}.", "{sentence}"),
        t5="cola sentence: {sentence}",
        prepare=functools.partial(_single, names=("unacceptable", "acceptable")),
        metric_fns=(metrics.accuracy, metrics.named("matthews_corrcoef")),
        tfds="glue/cola:2.0.0",
    ),
    "sst2": _classify(
        "Review: {sentence}\nIs this movie review {choices:or}?",
        "How does the writer of this sentence feel about the movie?\n{sentence}" + _CHOICES,
        '"{sentence}" What is the sentiment of this phrase?' + _CHOICES,
        inverse=("Write a {answer} movie review.", "{sentence}"),
        t5="sst2 sentence: {sentence}",
        prepare=functools.partial(_single, names=("negative", "positive")),
        tfds="glue/sst2:2.0.0",
    ),
    "mrpc": _classify(
        *_PARAPHRASE,
        t5="mrpc sentence1: {sentence1} sentence2: {sentence2}",
        prepare=functools.partial(_pair, names=("not_equivalent", "equivalent"), words=_SAME),
        metric_fns=(metrics.accuracy, metrics.named("f1_binary")),
        tfds="glue/mrpc:2.0.0",
    ),
    "qqp": _classify(
        "{question1}\n{question2}\nDo these two questions ask the same thing?" + _CHOICES,
        "Would an answer to the first question answer the second?\n1. {question1}\n2. {question2}"
        + _CHOICES,
        'Are "{question1}" and "{question2}" duplicates? Answer {choices:or}.',
        t5="qqp question1: {question1} question2: {question2}",
        prepare=functools.partial(
            prepare,
            texts=("question1", "question2"),
            names=("not_duplicate", "duplicate"),
            words=_SAME,
        ),
        metric_fns=(metrics.accuracy, metrics.named("f1_binary")),
        tfds="glue/qqp:2.0.0",
    ),
    "stsb": _collection(
        Template(
            "{sentence1}\n{sentence2}\nFrom 0.0 to 5.0, how similar are these two sentences?",
            "{answer}",
        ),
        Template(
            'Rate the similarity of "{sentence1}" and "{sentence2}" on a scale from 0 to 5.',
            "{answer}",
        ),
        _inverted(
            "{sentence1}\nWrite a sentence with similarity {answer} of 5.0 to it.", "{sentence2}"
        ),
        t5="stsb sentence1: {sentence1} sentence2: {sentence2}",
        prepare=prepare_stsb,
        metric_fns=(metrics.named("pearson"), metrics.named("spearman")),
        tfds="glue/stsb:2.0.0",
    ),
    "mnli": _classify(
        *_NLI,
        inverse=_NLI_INVERSE,
        t5="mnli hypothesis: {hypothesis} premise: {premise}",
        prepare=functools.partial(
            prepare,
            texts=("premise", "hypothesis"),
            names=("entailment", "neutral", "contradiction"),
            words=_ENTAIL_WORDS,
        ),
        tfds="glue/mnli:2.0.0",
    ),
    "qnli": _classify(
        'Does the sentence "{sentence}" answer the question "{question}"?' + _CHOICES,
        "Question: {question}\nSentence: {sentence}\nIs the answer in the sentence?" + _CHOICES,
        "Can I find out {question:lower} by reading this?\n{sentence}\nAnswer {choices:or}.",
        t5="qnli question: {question} sentence: {sentence}",
        prepare=functools.partial(
            prepare, texts=("question", "sentence"), names=_ENTAILS, words=_YES_NO
        ),
        tfds="glue/qnli:2.0.0",
    ),
    "rte": _rte("rte", ("sentence1", "sentence2"), _YES_NO, "glue/rte:2.0.0"),
    "wnli": _classify(
        "{sentence1}\nDoes it follow that {sentence2:lower}" + _CHOICES,
        "If {sentence1:lower} does that mean that {sentence2:lower} Answer {choices:or}.",
        t5="wnli sentence1: {sentence1} sentence2: {sentence2}",
        prepare=functools.partial(_pair, names=("not_entailment", "entailment"), words=_SAME),
        tfds="glue/wnli:2.0.0",
    ),
}


def prepare_multirc(example: Example) -> Record:
    """Without the mark-up, as T5 has it."""
    clean = lambda text: re.sub("</?b>", "", text.replace("<br>", " "))  # noqa: E731
    texts = {k: clean(example[k]) for k in ("question", "answer", "paragraph")}
    candidate = {"candidate": texts.pop("answer")}
    return texts | candidate | _label(example["label"], ("False", "True"), ("no", "yes"))


def prepare_record(example: Example) -> list[Record]:
    """A record for each answer, as T5 has it; highlights become sentences."""
    passage = re.sub(r"([.?!\"'])\n@highlight\n", r"\1 ", example["passage"])
    shared = {
        "query": example["query"],
        "entities": list(example["entities"]),
        "passage": passage.replace("\n@highlight\n", ". "),
        "answers": list(example["answers"]),
    }
    answers = example["answers"] or [_UNLABELLED]
    return [shared | {"answer": answer, "label_name": answer} for answer in answers]


def prepare_wsc(example: Example) -> Record:
    """The noun between asterisks, the pronoun between hashes, as T5 has it."""
    first, second = int(example["span1_index"]), int(example["span2_index"])
    marked = _mark(example["text"], first, example["span1_text"], "*")
    # Each mark counts as a word.
    marked = _mark(marked, second + 2 * (first < second), example["span2_text"], "#")
    spans = {"noun": example["span1_text"], "pronoun": example["span2_text"]}
    fields = {"text": example["text"], "marked": marked, **spans}
    return fields | _label(example["label"], ("False", "True"), ("no", "yes"))


def _mark(text: str, index: int, span: str, mark: str) -> str:
    pattern = rf"^((?:\S+\s){{{index}}})({re.escape(span)})"
    return re.sub(pattern, rf"\1{mark} \2 {mark}", text)


def prepare_copa(example: Example) -> Record:
    alternatives = [example["choice1"], example["choice2"]]
    fields = {k: example[k] for k in ("premise", "question", "choice1", "choice2")}
    return fields | _label(example["label"], ("choice1", "choice2"), alternatives)


_BOOLQ = (
    "{passage}\n\nCan we conclude that the answer to this question is yes?\n{question}" + _CHOICES,
    "Text: {passage}\nQuestion: {question}?\nAnswer {choices:or}.",
    "{passage}\nAnswer based on the passage: {question}?" + _CHOICES,
)
_BOOLQ_INVERSE = ("{passage}\nAsk a question about it whose answer is {answer}.", "{question}")
_boolq = functools.partial(
    prepare, texts=("question", "passage"), names=("False", "True"), words=("no", "yes")
)

SUPER_GLUE = {
    "boolq": _classify(
        *_BOOLQ,
        inverse=_BOOLQ_INVERSE,
        t5="boolq passage: {passage} question: {question}",
        prepare=_boolq,
        tfds="super_glue/boolq:1.0.2",
    ),
    "cb": _classify(
        *_NLI,
        inverse=_NLI_INVERSE,
        t5="cb hypothesis: {hypothesis} premise: {premise}",
        prepare=functools.partial(
            prepare,
            texts=("premise", "hypothesis"),
            names=("entailment", "contradiction", "neutral"),
            words=("yes", "no", "it is not possible to tell"),
        ),
        metric_fns=(metrics.accuracy, metrics.named("f1_macro")),
        tfds="super_glue/cb:1.0.2",
    ),
    "copa": _classify(
        "{premise} What was the {question}?" + _CHOICES,
        "What is the {question} of this?\n{premise}" + _CHOICES,
        "{premise}\nThe {question} is that {choices:or}?",
        inverse=("{answer}\nIt is the {question} of something else. Of what?", "{premise}"),
        t5="copa choice1: {choice1} choice2: {choice2} premise: {premise} question: {question}",
        prepare=prepare_copa,
        tfds="super_glue/copa:1.0.2",
    ),
    "multirc": _classify(
        "{paragraph}\n\nQuestion: {question}\nIs this a correct answer: {candidate}" + _CHOICES,
        '{paragraph}\nIs "{candidate}" an answer to "{question}"? Answer {choices:or}.',
        t5="multirc question: {question} answer: {candidate} paragraph: {paragraph}",
        prepare=prepare_multirc,
        tfds="super_glue/multirc:1.0.2",
    ),
    "record": _classify(
        "{passage}\n\n{query}\nWhat is @placeholder?" + "\n{entities:lines}",
        "Complete the sentence with one of: {entities:commas}.\n{query}\nContext: {passage}",
        t5="record query: {query} entities: {entities:commas} passage: {passage}",
        prepare=prepare_record,
        metric_fns=(metrics.named("squad"),),
        postprocess_fn=metrics.all_answers,
        tfds="super_glue/record:1.0.2",
    ),
    "rte": _rte("rte", ("premise", "hypothesis"), _YES_NO, "super_glue/rte:1.0.2"),
    "wic": _classify(
        '{sentence1}\n{sentence2}\nDoes "{word}" mean the same in these two sentences?' + _CHOICES,
        "Is the word {word} used in the same sense?\n1. {sentence1}\n2. {sentence2}" + _CHOICES,
        t5="wic sentence1: {sentence1} sentence2: {sentence2} word: {word}",
        prepare=functools.partial(
            prepare,
            texts=("word", "sentence1", "sentence2"),
            names=("False", "True"),
            words=("no", "yes"),
        ),
        tfds="super_glue/wic:1.0.2",
    ),
    "wsc": _classify(
        '{text}\nDoes "{pronoun}" refer to {noun}?' + _CHOICES,
        "{marked}\nAre the things between * and # the same? Answer {choices:or}.",
        t5="wsc text: {marked}",
        prepare=prepare_wsc,
        tfds="super_glue/wsc.fixed:1.0.2",
    ),
}


def prepare_anli(example: Example) -> Record:
    """TFDS calls the premise "context"; the reason, if there is one, is a chain of thought."""
    names = ("entailment", "neutral", "contradiction")
    fields = {
        "premise": example.get("premise") or example["context"],
        "hypothesis": example["hypothesis"],
        "reason": example.get("reason") or "",
    }
    return fields | _label(example["label"], names, _ENTAIL_WORDS)


def _anli(round_: int) -> Collection:
    return _collection(
        *(Template(ask, "{answer}") for ask in _NLI),
        Template(
            "{premise}\nCan we conclude that {hypothesis} Think step by step, then choose "
            "{choices:or}.",
            "{reason} So the answer is: {answer}",
            kind="chain_of_thought",
        ),
        _inverted(*_NLI_INVERSE),
        prepare=prepare_anli,
        tfds=f"anli/r{round_}:0.1.0",
    )


COLLECTIONS = (
    {f"glue_{name}": collection for name, collection in GLUE.items()}
    | {f"super_glue_{name}": collection for name, collection in SUPER_GLUE.items()}
    | {
        "bool_q": _classify(*_BOOLQ, inverse=_BOOLQ_INVERSE, prepare=_boolq, tfds="bool_q:1.0.0"),
    }
    | {f"anli_r{i}": _anli(i) for i in (1, 2, 3)}
)
