"""Shared servers, for tests that only send requests."""

import pytest

from recurrent_depth.serving.config import Limits
from servers import BOTH_ENGINES, running


@pytest.fixture(scope="session", params=BOTH_ENGINES)
def server(chat_folder, request):
    """The address of a server with large limits; its model is named `small`. Of each engine."""
    limits = Limits(num_steps=64, cache_gib=2)
    with running(chat_folder, served_name="small", limits=limits, engine=request.param) as (url, _):
        yield url


@pytest.fixture(scope="session", params=BOTH_ENGINES)
def strict_server(chat_folder, request):
    """The address of a server with small limits and a key. Of each engine."""
    limits = Limits(num_steps=8, new_tokens=100, body_bytes=2000, requests=2, body_seconds=0.5, cache_gib=1)
    options = {"served_name": "small", "limits": limits, "api_key": "secret", "engine": request.param}
    with running(chat_folder, **options) as (url, _):
        yield url
