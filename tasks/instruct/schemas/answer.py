"""Questions with an answer in words: SQuAD, TriviaQA, Natural Questions, GSM8K."""

from __future__ import annotations

from t5x_like.data.templates import Record, Template
from tasks.instruct import metrics
from tasks.instruct.register import Collection
from tasks.instruct.sources import Example


def prepare_squad(example: Example) -> Record | None:
    """The first answer is the target. Questions without an answer (SQuAD 2) say so."""
    answers = list(example["answers"]["text"])
    fields = {k: example[k] for k in ("context", "question", "title")}
    return fields | {"answer": answers[0] if answers else "unanswerable", "answers": answers}


def prepare_trivia_qa(example: Example) -> Record:
    answer = example["answer"]
    aliases = [answer["value"], *answer["aliases"], *answer["normalized_aliases"]]
    return {
        "question": example["question"],
        "answer": answer["value"],
        "answers": list(dict.fromkeys(aliases)),
    }


def prepare_natural_questions(example: Example) -> Record:
    answers = list(example["answer"])
    return {"question": example["question"], "answer": answers[0], "answers": answers}


def prepare_gsm8k(example: Example) -> Record:
    """The reasoning before "####" is the chain of thought, without its calculator notes."""
    reasoning, _, answer = example["answer"].partition("####")
    steps = "".join(part.partition(">>")[2] or part for part in reasoning.split("<<"))
    return {
        "question": example["question"],
        "reasoning": " ".join(steps.split()),
        "answer": answer.strip().replace(",", ""),
    }


_ASK_FREE = (
    "Question: {question}\nAnswer:",
    "{question}",
    "Answer this question: {question}",
    "What is the answer to this trivia question?\n{question}",
)
_ASK_BACK = Template("Write a question whose answer is: {answer}", "{question}", kind="inversion")

COLLECTIONS = {
    "squad": Collection(
        prepare=prepare_squad,
        templates=(
            Template("{context}\n\n{question}", "{answer}"),
            Template("Read this and answer the question.\n{context}\n{question}", "{answer}"),
            Template('{question}\nAnswer from the text about "{title}":\n{context}', "{answer}"),
            Template("Context: {context}\nQuestion: {question}\nAnswer:", "{answer}"),
            Template(
                "{context}\n\nAsk a question about it whose answer is: {answer}",
                "{question}",
                kind="inversion",
            ),
            Template(
                "question: {question:padded} context: {context:padded}",
                "{answer:padded}",
                kind="t5",
            ),
        ),
        metric_fns=(metrics.named("squad"),),
        postprocess_fn=metrics.all_answers,
        tfds="squad/v1.1:3.0.0",
    ),
    "trivia_qa": Collection(
        prepare=prepare_trivia_qa,
        templates=(
            *(Template(ask, "{answer}") for ask in _ASK_FREE),
            _ASK_BACK,
            # The closed-book form of Roberts et al. (arXiv:2002.08910).
            Template("trivia question: {question}", "{answer}", kind="t5"),
        ),
        shots=(2, 5),
        metric_fns=(metrics.named("trivia_qa"),),
        postprocess_fn=metrics.all_answers,
        tfds="trivia_qa/rc.nocontext:1.1.0",
    ),
    "natural_questions": Collection(
        prepare=prepare_natural_questions,
        templates=(
            *(Template(ask, "{answer}") for ask in _ASK_FREE),
            _ASK_BACK,
            Template("nq question: {question}", "{answer}", kind="t5"),
        ),
        shots=(2, 5),
        metric_fns=(metrics.named("squad"),),
        postprocess_fn=metrics.all_answers,
        tfds="natural_questions_open:1.0.0",
    ),
    "gsm8k": Collection(
        prepare=prepare_gsm8k,
        templates=(
            Template("{question}", "{answer}"),
            Template("Question: {question}\nAnswer with a number.", "{answer}"),
            Template("Solve this: {question}\nGive only the result.", "{answer}"),
            Template(
                "{question}\nLet's think step by step.",
                "{reasoning} The answer is {answer}.",
                kind="chain_of_thought",
            ),
            Template(
                "Reason first, then answer.\nQ: {question}\nA:",
                "{reasoning} The answer is {answer}.",
                kind="chain_of_thought",
            ),
            Template(
                "Solve this and give your work.\n{question}",
                "{reasoning} So the result is {answer}.",
                kind="chain_of_thought",
            ),
            Template(
                "Solution: {reasoning}\nWrite the problem that it solves.",
                "{question}",
                kind="inversion",
            ),
        ),
        tfds="gsm8k:1.0.0",
    ),
}
