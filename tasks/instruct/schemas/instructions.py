"""Collections that bring their own instructions: P3, Super-NaturalInstructions."""

from __future__ import annotations

from t5x_like.data.templates import Record, Template
from tasks.instruct import metrics
from tasks.instruct.register import Collection
from tasks.instruct.sources import Example


def prepare_p3(example: Example) -> Record:
    """Prompts of bigscience/P3, before its tokenization."""
    answers = [choice for choice in example.get("answer_choices") or ()]
    return {
        "prompt": example["inputs_pretokenized"].strip(),
        "answer": example["targets_pretokenized"].strip(),
        "choices": answers,
    }


def prepare_natural_instructions(example: Example) -> list[Record]:
    """An instance, in any of the forms that it is published in.

    The task files of the repository (through `RecordSource`), TFDS's `natural_instructions`, and
    the rows of Hugging Face's Muennighoff/natural-instructions.
    """
    definition = example.get("Definition") or example.get("definition") or ""
    if isinstance(definition, list):
        definition = " ".join(definition)
    outputs = example.get("output", example.get("targets"))
    answers = outputs if isinstance(outputs, list) else [outputs]
    shown = (example.get("Positive Examples") or [])[:2]
    solved = [f"Input: {e['input']}\nOutput: {e['output']}" for e in shown]
    return [
        {
            "definition": definition.strip(),
            "input": str(example.get("input", example.get("inputs"))),
            "answer": str(answers[0]),
            "answers": [str(answer) for answer in answers],
            "solved": "\n\n".join(solved),
            "explanation": str(shown[0].get("explanation", "")) if shown else "",
            "explained": solved[0] if solved else "",
        }
    ]


COLLECTIONS = {
    "p3": Collection(prepare=prepare_p3, templates=(Template("{prompt}", "{answer}"),), shots=()),
    "natural_instructions": Collection(
        prepare=prepare_natural_instructions,
        templates=(
            Template("{definition}\n\n{input}", "{answer}"),
            Template("Definition: {definition}\nInput: {input}\nOutput:", "{answer}"),
            Template("You are given a task.\n{definition}\n\n{input}\nAnswer:", "{answer}"),
            # The solved examples are the task's own, so the prompt is made of one record.
            Template(
                "{definition}\n\n{solved}\n\nInput: {input}\nOutput:", "{answer}", kind="few_shot"
            ),
            Template(
                "{definition}\n\n{explained}\nExplanation: {explanation}\n\n"
                "Input: {input}\nOutput:",
                "{answer}",
                kind="few_shot",
            ),
            Template(
                "Input: {input}\nOutput: {answer}\nWhat was the task?",
                "{definition}",
                kind="inversion",
            ),
        ),
        shots=(),
        metric_fns=(metrics.exact_match, metrics.named("rouge")),
        tfds="natural_instructions:1.0.1",
    ),
}
