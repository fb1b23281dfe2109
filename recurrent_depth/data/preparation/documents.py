"""Documents: plain text or a conversation, made from the fields of a record."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recurrent_depth.data.records import without_surrogates

ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "chatgpt": "assistant", "bot": "assistant"}
"""Names that data sets use for roles besides system, user and assistant."""


@dataclass(frozen=True)
class Document:
    """One text and where it came from.

    Attributes:
        text: the whole text; of a conversation, its messages one after the other.
        origin: the file or data set that it was read from.
        turns: (role, message) of a conversation; empty for plain text.
        not_utf8: the file holds bytes that are not UTF-8; each became U+FFFD.
    """

    text: str
    origin: str
    turns: tuple[tuple[str, str], ...] = ()
    not_utf8: bool = False


class FieldError(ValueError):
    """A record without the fields that its source names."""


def document_from(record: Mapping[str, Any], fields: Sequence[str], chat_formatted: bool, origin: str) -> Document:
    """Return the document of a record. It is empty where the record is: null counts as empty text.

    Args:
        record: field names and values.
        fields: what to read; `a/b` takes the first of both that holds something. A value is text, a list of texts, or
            a list of messages ({role, content} or {from, value}). Texts of plain sources are joined by an empty line.
        chat_formatted: a list of messages becomes a conversation as it stands; of several texts the first is the
            user's message and the others, joined, the assistant's; a single text is the assistant's. A conversation
            without a question or without an answer is empty.
        origin: stored with the document.

    Raises:
        FieldError: naming the field and what the record has instead.
    """
    values = [_value(record, field) for field in fields]
    messages = [message for value in values if _is_conversation(value) for message in value]
    if chat_formatted and messages:
        turns = tuple(_turn(message) for message in messages)
        return Document("\n\n".join(text for _, text in turns), origin, turns)
    texts = [_text(value, field) for value, field in zip(values, fields, strict=True)]
    whole = "\n\n".join(text for text in texts if text)
    if not chat_formatted:
        return Document(whole, origin)
    question, answer = texts[0], "\n\n".join(text for text in texts[1:] if text)
    if not question.strip() or (len(texts) > 1 and not answer.strip()):
        return Document("", origin)
    turns = (("user", question), ("assistant", answer)) if len(texts) > 1 else (("assistant", question),)
    return Document(whole, origin, turns)


def _value(record: Mapping[str, Any], field: str) -> Any:
    names = [name for name in field.split("/") if name in record]
    if not names:
        raise FieldError(f"nothing in field {field!r} (the record has {sorted(record)})")
    return next((record[name] for name in names if record[name] is not None), None)


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)


def _text(value: Any, field: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return without_surrogates(value)
    if isinstance(value, list) and all(isinstance(item, str | None) for item in value):
        return without_surrogates("\n".join(item for item in value if item is not None))
    if _is_conversation(value):
        return "\n\n".join(text for _, text in map(_turn, value))
    raise FieldError(f"no text in field {field!r} but {type(value).__name__}")


def _turn(message: dict[str, Any]) -> tuple[str, str]:
    role, text = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if not isinstance(role, str) or not isinstance(text, str):
        raise FieldError(f"a message needs role and content, or from and value (it has {sorted(message)})")
    return ROLES.get(role, role), without_surrogates(text)
