"""Conversations with roles, in the forms in which they are published."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from t5x_like.data.chat import ChatFormat, Message
from t5x_like.data.templates import Record
from t5x_like.errors import UserError
from tasks.instruct.sources import Example

_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}


def prepare(example: Example, *, format: ChatFormat) -> Record:
    """{"messages": [{"role", "content"}]}, or ShareGPT's {"conversations": [{"from", "value"}]}.

    Raises:
      UserError: there are no messages, no answer, or the format cannot hold them.
    """
    messages = [_message(m) for m in example.get("messages") or example.get("conversations") or ()]
    if not any(message.role == "assistant" for message in messages):
        raise UserError(
            f"A conversation with the fields {sorted(example)} has no assistant's turn. Give "
            '{"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}]}.'
        )
    format.pieces(messages)
    return {
        "roles": [message.role for message in messages],
        "contents": [message.content for message in messages],
    }


def _message(message: Mapping[str, Any]) -> Message:
    role = str(message.get("role") or message.get("from"))
    content = message.get("content", message.get("value"))
    if not isinstance(content, str):
        raise UserError(f"A message of {role!r} has no text: {content!r}. Give a string.")
    return Message(_ROLES.get(role, role), content)
