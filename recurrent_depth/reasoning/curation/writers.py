"""The model that a stage of curation asks: behind a server, or in this process."""

import re
from dataclasses import dataclass
from typing import Any

from recurrent_depth.checks import one_section
from recurrent_depth.files import json_hash
from recurrent_depth.reasoning.curation.endpoint import EndpointConfig
from recurrent_depth.reasoning.curation.local import LocalConfig
from recurrent_depth.reasoning.curation.replies import Reply, ReplyCache, Writer
from recurrent_depth.reasoning.curation.stages import Context


@dataclass(frozen=True)
class WriterConfig:
    """A model that answers prompts; exactly one section is given.

    Args:
        endpoint: a chat model behind a server, as {endpoint: {url: http://localhost:8000/v1, model: NAME}}.
        local: a model that this process loads, as {local: {model: runs/first}}.
    """

    endpoint: EndpointConfig | None = None
    local: LocalConfig | None = None

    def __post_init__(self) -> None:
        one_section(self)

    def fingerprint(self) -> Any:
        """Return plain JSON that changes when its replies may change. Raise if the model or a package is missing."""
        chosen = one_section(self)[1]
        chosen.check()
        return chosen.fingerprint()

    def open(self) -> Writer:
        """Load the model, or open the client."""
        return one_section(self)[1].open()


def ask(writer: WriterConfig, prompts: list[str], context: Context) -> list[Reply]:
    """Return the replies of a model, from the cache where it has them. Without prompts the model is not loaded."""
    if not prompts:
        return []
    name = json_hash(writer.fingerprint())[:12]
    return writer.open().write(prompts, ReplyCache(context.cache / f"{context.stage}-{name}.jsonl"))


def check_prompt(prompt: str, *names: str) -> None:
    """Raise unless a prompt contains each `{name}`."""
    missing = [name for name in names if "{" + name + "}" not in prompt]
    if missing:
        raise ValueError(f"prompt is {prompt!r}; it lacks {', '.join('{' + name + '}' for name in missing)}")


def fill(prompt: str, **values: str) -> str:
    """Return a prompt with each `{name}` replaced by its value. Other braces (LaTeX) stay; values are not searched."""
    return re.sub(r"\{(" + "|".join(values) + r")\}", lambda match: values[match.group(1)], prompt)
