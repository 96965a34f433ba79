"""`t5x_like chat` in a terminal: a prompt, answers, /quit and the end of input."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest

from tests.evaluation.conftest import ROOT
from tests.evaluation.processes import ENVIRONMENT

pytestmark = pytest.mark.slow
_CODES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\r")


class Terminal:
    """A process whose standard input and output are a pseudo-terminal."""

    def __init__(self, *arguments: str) -> None:
        self._master, slave = pty.openpty()
        command = [sys.executable, "-m", "t5x_like", *arguments]
        streams = {"stdin": slave, "stdout": slave, "stderr": slave}
        self.process = subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, **streams)
        os.close(slave)

    def until(self, ending: str, *, seconds: float = 200) -> str:
        """What is shown up to `ending`; the end of the process ends it, too."""
        shown, deadline = "", time.monotonic() + seconds
        while not shown.endswith(ending):
            assert time.monotonic() < deadline, shown
            if select.select([self._master], [], [], 1.0)[0]:
                try:
                    shown += _CODES.sub("", os.read(self._master, 4096).decode("utf-8", "replace"))
                except OSError:  # Linux's way to say that the other end is closed.
                    return shown
        return shown

    def say(self, text: str) -> None:
        os.write(self._master, text.encode())

    def close(self) -> int:
        try:
            return self.process.wait(timeout=60)
        finally:
            self.process.kill()
            os.close(self._master)


def test_in_a_terminal(pretrained) -> None:
    terminal = Terminal("chat", str(pretrained), "--max_new_tokens=4")
    assert "step 4. /quit ends." in terminal.until("\n> ")
    answers = []
    for _ in range(2):
        terminal.say("say ox\n")
        echoed, *answer = terminal.until("\n> ").splitlines()
        assert echoed == "say ox"
        answers.append(answer)
    assert answers[0] == answers[1] and answers[0][-1] == "> "
    terminal.say("\x04")  # Control-D, the end of input.
    assert terminal.close() == 0
