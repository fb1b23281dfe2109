"""Shared servers, for tests that only send requests."""

import pytest

from recurrent_depth.serving.config import Limits
from servers import running


@pytest.fixture(scope="session")
def server(chat_folder):
    """The address of a server with the default limits; its model is named `small`."""
    with running(chat_folder, served_name="small") as (url, _):
        yield url


@pytest.fixture(scope="session")
def strict_server(chat_folder):
    """The address of a server with small limits and a key."""
    limits = Limits(num_steps=8, new_tokens=100, body_bytes=2000, requests=2, body_seconds=0.5)
    with running(chat_folder, served_name="small", limits=limits, api_key="secret") as (url, _):
        yield url
