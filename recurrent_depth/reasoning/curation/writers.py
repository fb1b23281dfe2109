"""Which model a stage of curation asks."""

from dataclasses import dataclass
from typing import Any

from recurrent_depth.checks import one_section
from recurrent_depth.reasoning.curation.endpoint import EndpointConfig
from recurrent_depth.reasoning.curation.local import LocalConfig
from recurrent_depth.reasoning.curation.replies import Writer


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
        """Return plain JSON that changes when its answers may change. Raise if the model or a package is missing."""
        chosen = one_section(self)[1]
        chosen.check()
        return chosen.fingerprint()

    def open(self) -> Writer:
        """Load the model, or prepare the client."""
        return one_section(self)[1].open()
