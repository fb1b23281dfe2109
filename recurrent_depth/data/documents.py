"""Documents: plain text or a conversation, made from the fields of a row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "chatgpt": "assistant", "bot": "assistant"}
"""Names of roles that data sets use beside system, user and assistant."""


@dataclass(frozen=True)
class Document:
    """One text and where it came from.

    Attributes:
        text: the whole text; of a conversation, its messages one after the other.
        origin: file or data set it was read from.
        turns: (role, message) of a conversation; empty for plain text.
    """

    text: str
    origin: str
    turns: tuple[tuple[str, str], ...] = ()


class FieldError(ValueError):
    """A row without the fields that its source names."""


def document_from(row: Any, fields: Sequence[str], chat_formatted: bool, origin: str) -> Document:
    """The document of a row.

    Args:
        row: a mapping of field names to values.
        fields: what to read; `a/b` takes the first of both that is there. A value is text, a list of texts, or a list
            of messages ({role, content} or {from, value}). Texts of plain sources are joined by an empty line.
        chat_formatted: a list of messages becomes a conversation as it stands; of several texts the first is the
            user's message and the others, joined, the assistant's; a single text is the assistant's.
        origin: stored with the document.

    Raises:
        FieldError: naming the field and what the row has instead.
    """
    if not isinstance(row, dict):
        raise FieldError(f"the row is a {type(row).__name__}, not a record with fields")
    values = [_value(row, field) for field in fields]
    messages = [message for value in values if _is_conversation(value) for message in value]
    if chat_formatted and messages:
        turns = tuple(_turn(message) for message in messages)
        return Document("\n\n".join(text for _, text in turns), origin, turns)
    texts = [_text(value, field) for value, field in zip(values, fields, strict=True)]
    whole = "\n\n".join(text for text in texts if text)
    if not chat_formatted or not whole.strip():
        return Document(whole, origin)
    first, *rest = texts
    answer = "\n\n".join(text for text in rest if text)
    return Document(whole, origin, (("user", first), ("assistant", answer)) if rest else (("assistant", first),))


def _value(row: dict[str, Any], field: str) -> Any:
    found = [row[name] for name in field.split("/") if row.get(name) is not None]
    if not found:
        raise FieldError(f"nothing in field {field!r} (the row has {sorted(row)})")
    return found[0]


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)


def _text(value: Any, field: str) -> str:
    if isinstance(value, str):
        return _clean(value)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return _clean("\n".join(value))
    if _is_conversation(value):
        return "\n\n".join(text for _, text in map(_turn, value))
    raise FieldError(f"no text in field {field!r} but {type(value).__name__}")


def _turn(message: dict[str, Any]) -> tuple[str, str]:
    role, text = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if not isinstance(role, str) or not isinstance(text, str):
        raise FieldError(f"a message needs role and content, or from and value (it has {sorted(message)})")
    return ROLES.get(role, role), _clean(text)


def _clean(text: str) -> str:
    """Without halves of surrogate pairs, which JSON may hold and UTF-8 may not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode(errors="replace").decode()
    return text
