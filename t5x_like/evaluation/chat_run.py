"""`t5x_like chat`: reads prompts from a terminal, or a pipe, and answers each."""

from __future__ import annotations

import sys
from typing import IO

from rich.console import Console

from t5x_like.data.chat import Message, find_format
from t5x_like.errors import UserError
from t5x_like.evaluation.infer_run import InferRun
from t5x_like.evaluation.predictor import Prompt
from t5x_like.evaluation.serving import Served, step_of

PROMPT = "> "


def chat(run: InferRun, *, stream: IO[str] | None = None) -> int:
    """Answers line after line until the end of the input or "/quit"; returns 0.

    Args:
      stream: where prompts come from; None for standard input, with a prompt if it is a terminal.

    Raises:
      UserError: no checkpoint, no vocabulary, an unknown chat format. What is wrong with one prompt
        is said, and the chat goes on.
    """
    console = Console(highlight=False, soft_wrap=True)
    served = Served(run, source=run.source, batch_size=run.batch_size)
    session = _Session(run, served)
    console.print(f"{run.checkpoint}, step {step_of(run.checkpoint)}. /quit ends.", markup=False)
    interactive = stream is None and sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  `input` then has a history, and arrow keys.
    while True:
        try:
            line = input(PROMPT) if interactive else next(iter(stream or sys.stdin))
        except (EOFError, StopIteration):
            return 0
        text = line.strip()
        if text == "/quit":
            return 0
        if text == "/reset":
            session.messages.clear()
        elif text:
            try:
                for answer in session.answer(text):
                    console.print(answer, markup=False)
            except UserError as error:
                console.print(f"({error})", markup=False)


class _Session:
    """The model and, with a chat format, the conversation so far."""

    def __init__(self, run: InferRun, served: Served) -> None:
        self._run, self._served = run, served
        self._codec = served.codec
        self._format = find_format(run.chat_format) if run.chat_format else None
        self._params = served.load(run.checkpoint)
        self._count = 0
        self.messages: list[Message] = []

    def answer(self, text: str) -> list[str]:
        """The samples for a prompt; the first becomes part of the conversation."""
        asked = [*self.messages, Message("user", text)]
        ids = (
            self._codec.conversation(asked, self._format)
            if self._format
            else self._codec.prompt(text)
        )
        (generation,) = self._served.predictor.generate(
            self._params,
            [Prompt(index=self._count, inputs=ids)],
            decoding=self._run.decoding,
            eos_ids=self._codec.eos_ids,
            seed=self._run.seed,
        )
        self._count += 1
        answers = [self._codec.decode(tokens).strip() for tokens in generation.tokens]
        if self._format:
            self.messages = [*asked, Message("assistant", answers[0])]
        return answers
