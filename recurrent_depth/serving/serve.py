"""`recurrent-depth serve`: transformers' OpenAI-compatible server with our classes known to it."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from recurrent_depth.hf import RecurrentDepthForCausalLM
from recurrent_depth.hf.export import ExportConfig, export
from recurrent_depth.runs import is_run


@dataclass(frozen=True)
class ServeConfig:
    """Serve a model over the OpenAI protocol (chat completions, completions, models).

    A request sets its number of steps by `generation_config`, a JSON object in a string:
    `extra_body={"generation_config": '{"num_steps": 8, "max_new_tokens": 64}'}`.

    Args:
        model: run folder (exported to a temporary folder first), export or hub name.
        host: address to listen on.
        port: port to listen on.
        device: auto, cpu or cuda.
        dtype: of the weights; auto takes the folder's.
        continuous_batching: paged attention over requests that come and go.
    """

    model: str
    host: str = "localhost"
    port: int = 8000
    device: str = "auto"
    dtype: str = "auto"
    continuous_batching: bool = False


def serve(config: ServeConfig) -> None:
    """Serve until interrupted."""
    with servable(config.model) as folder:
        print(f"serving {config.model} as model {folder!r} on http://{config.host}:{config.port}/v1", flush=True)
        start(config, folder, background=False)


def start(config: ServeConfig, folder: str, background: bool) -> Any:
    """transformers' server over a folder; in the background it returns at once (stop it with `kill_server`)."""
    from transformers.cli.serve import Serve

    for name in ("RavenForCausalLM", "RecurrentDepthForCausalLM"):
        setattr(transformers, name, RecurrentDepthForCausalLM)  # where the server looks a model's class up
    return Serve(
        folder,
        host=config.host,
        port=config.port,
        device=config.device,
        dtype=config.dtype,
        continuous_batching=config.continuous_batching,
        non_blocking=background,
    )


@contextmanager
def servable(model: str) -> Iterator[str]:
    """A folder or hub name that transformers can load: the model itself, or a temporary export of a run."""
    if not (Path(model).exists() and is_run(model)):
        yield model
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield str(export(ExportConfig(model=model, out=f"{scratch}/{Path(model).name}")))
