"""The chat layout of Huginn: the only place that says how a conversation is written.

    <|begin_text|><|begin_header|>user<|end_header|>\n\nHi<|end_turn|><|begin_header|>Huginn<|end_header|>\n\n...

Preparation encodes `pieces`, transformers applies `CHAT_TEMPLATE`, the thinking format asks with `PROMPT`. Imports
nothing outside the standard library.
"""

from collections.abc import Iterable, Iterator

BEGIN_TEXT = "<|begin_text|>"
BEGIN_HEADER, END_HEADER, END_TURN = "<|begin_header|>", "<|end_header|>", "<|end_turn|>"
CHAT_TOKENS = (BEGIN_TEXT, BEGIN_HEADER, END_HEADER, END_TURN)
"""What a tokenizer must hold to write conversations."""

THINK_TOKENS = ("<|begin_think|>", "<|end_think|>", "<|begin_answer|>", "<|end_answer|>")
"""Delimiters of a trace and an answer, inside the assistant's message."""

ASSISTANT = "Huginn"
"""How the role of the assistant is written."""


def pieces(turns: Iterable[tuple[str, str]]) -> Iterator[tuple[str, bool]]:
    """Yield the pieces of a conversation after `<|begin_text|>`, each with whether it is a special token.

    Args:
        turns: (role, message) of each turn.
    """
    for role, message in turns:
        yield BEGIN_HEADER, True
        yield ASSISTANT if role == "assistant" else role, False
        yield END_HEADER, True
        yield "\n\n" + message.strip(), False
        yield END_TURN, True


def header(role: str) -> str:
    """Return what is written before the text of a message."""
    return f"{BEGIN_HEADER}{role}{END_HEADER}\n\n"


PROMPT = BEGIN_TEXT + header("user") + "{question}" + END_TURN + header(ASSISTANT)
"""A question for the assistant, with the header of its answer."""

CHAT_TEMPLATE = (
    BEGIN_TEXT + "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}" + header(ASSISTANT) + "{% generation %}"
    "{{ message['content'] | trim }}" + END_TURN + "{% endgeneration %}"
    "{% else %}" + header("{{ message['role'] }}") + "{{ message['content'] | trim }}" + END_TURN + "{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}" + header(ASSISTANT) + "{% endif %}"
)
"""The layout as a template of transformers; `generation` marks what the assistant writes."""
