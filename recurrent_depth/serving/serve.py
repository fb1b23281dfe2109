"""`recurrent-depth serve`: load a model and serve it until a signal."""

import os
import resource
import signal
import socket
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from transformers.utils import logging as transformers_logging

from recurrent_depth.devices import choose_device, choose_dtype
from recurrent_depth.generation.config import EngineOptions
from recurrent_depth.hf.chat import stop_ids
from recurrent_depth.hf.loading import ModelError, load_model
from recurrent_depth.hf.modeling import RecurrentDepthForCausalLM
from recurrent_depth.serving.app import Service, build_app
from recurrent_depth.serving.config import KEY_VARIABLE, ServeConfig
from recurrent_depth.serving.effort import read_efforts
from recurrent_depth.serving.engine import DecoderEngine, Engine


def serve(config: ServeConfig) -> None:
    """Serve until Ctrl-C or SIGTERM; requests in progress have limits.shutdown_seconds to finish."""
    listener = listen(config.host, config.port)  # before the model is loaded, to report a port in use at once
    with listener:
        print(f"loading {config.model}", flush=True)
        service = load(config)
        port = listener.getsockname()[1]
        print(
            f"serving {service.name} on http://{config.host}:{port}/v1 (protocol: http://{config.host}:{port}/docs)",
            flush=True,
        )
        server = Server(config, service, "info")
        for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises the signal again once it has shut down
            signal.signal(number, signal.SIG_IGN)
        server.run(sockets=[listener])
    print("stopped", flush=True)
    if not service.engine.close(1.0):
        os._exit(0)  # a pass over a long prompt cannot be interrupted, and its result is not needed


def listen(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address.

    Raises:
        OSError: if the address is in use or unknown; the message says what to change.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise OSError(f"host: {host!r} cannot be listened on ({error}); use localhost or 0.0.0.0") from error
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(f"port: {host}:{port} cannot be listened on ({error.strerror}); choose another --port") from error
    return listener


def load(config: ServeConfig) -> Service:
    """Load the model, start its engine, and return the service."""
    engine, tokenizer, generation_config = (_with_vllm if chosen_engine(config) == "vllm" else _with_decoder)(config)
    folder = Path(config.model)
    name = config.served_name or (folder.resolve().name if folder.is_dir() else config.model)
    most = config.limits.num_steps or engine.max_num_steps
    if engine.default_num_steps > most:
        raise ValueError(
            f"limits.num_steps is {most}, but requests take {engine.default_num_steps} iterations by default; raise "
            "the limit, or set default_num_steps"
        )
    efforts = read_efforts(generation_config, tokenizer)
    for effort, (steps, _) in efforts.items():
        if steps is not None and steps > most:
            raise ValueError(
                f"limits.num_steps is {most}, but reasoning_effort {effort} of the model takes {steps} iterations; "
                "raise the limit"
            )
    return Service(engine, tokenizer, name, config.limits, most, efforts)


def chosen_engine(config: ServeConfig) -> str:
    """Return vllm or transformers.

    Raises:
        ValueError: if vLLM is not installed, or an option does not fit the engine.
    """
    for_decoder = [name for name in ("quantize",) if getattr(config, name) is not None]
    for_decoder += ["kernels"] if config.kernels != "auto" else []
    for_decoder += ["exit"] if config.exit not in (None, "state-change") else []
    name = config.engine
    if name == "auto":
        name = "vllm" if find_spec("vllm") is not None and not for_decoder else "transformers"
    if name == "vllm":
        if find_spec("vllm") is None:
            raise ValueError("engine is vllm, which is not installed; pip install vllm, or use --engine transformers")
        if for_decoder:
            raise ValueError(
                f"{for_decoder[0]} is {getattr(config, for_decoder[0])}, which only the engine transformers has; "
                "leave it out, or use --engine transformers"
            )
    elif config.tensor_parallel > 1:
        raise ValueError(
            f"tensor_parallel is {config.tensor_parallel}, which only the engine vllm implements; use --engine vllm"
        )
    return name


def _with_decoder(config: ServeConfig) -> tuple[Engine, Any, Any]:
    """Return the engine with the decoder of this package, the tokenizer, and the generation config."""
    device = choose_device(config.device)
    transformers_logging.disable_progress_bar()
    dtype = choose_dtype(config.dtype, device)
    model, tokenizer = load_model(config.model, dtype, device, config.kernels, config.quantize)
    if not isinstance(model, RecurrentDepthForCausalLM):
        raise ModelError(f"model: {config.model} is not a recurrent-depth model; only those are served")
    if tokenizer is None:
        raise ModelError(f"model: {config.model} has no tokenizer and cannot be served; add its tokenizer.json")
    options = EngineOptions(
        num_steps=config.default_num_steps,
        exit=config.exit,
        exit_threshold=config.exit_threshold,
        exit_prompt=config.exit_prompt,
        cache_budget=config.cache_budget,
    )
    engine = DecoderEngine(model, frozenset(stop_ids(model, tokenizer)), config.limits, options)
    return engine, tokenizer, model.generation_config


def _with_vllm(config: ServeConfig) -> tuple[Engine, Any, Any]:
    """The same with vLLM."""
    from recurrent_depth.serving.vllm.engine import start  # imported here because it takes seconds, and needs vLLM

    return start(config)


class Server(uvicorn.Server):
    """uvicorn with the application of this package. At shutdown, requests that do not finish in time are ended.

    Args:
        config: key and limits.
        service: the served model.
        log_level: log level of uvicorn: info logs requests, critical logs nothing.
    """

    def __init__(self, config: ServeConfig, service: Service, log_level: str) -> None:
        self.service, self.limits = service, config.limits
        app = build_app(service, config.api_key or os.environ.get(KEY_VARIABLE))
        _allow_many_connections()
        super().__init__(
            uvicorn.Config(
                app, log_level=log_level, lifespan="off",
                timeout_graceful_shutdown=int(config.limits.shutdown_seconds) + 5,
            )
        )  # fmt: skip

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Start the shutdown. uvicorn calls this for SIGINT and SIGTERM."""
        super().handle_exit(sig, frame)
        self._end_requests_later()

    def _end_requests_later(self) -> None:
        timer = threading.Timer(self.limits.shutdown_seconds, self.service.engine.close, args=(0.0,))
        timer.daemon = True
        timer.start()

    def start(self, listener: socket.socket) -> None:
        """Run the server in a thread; return when it answers. `stop` ends it."""
        self.thread = threading.Thread(target=self.run, kwargs={"sockets": [listener]}, name="server", daemon=True)
        self.thread.start()
        while not self.started:
            if not self.thread.is_alive():
                raise OSError("the server ended while it was starting")
            time.sleep(0.01)

    def stop(self) -> None:
        """Stop the server started by `start` and its engine, without waiting for requests in progress."""
        self.service.engine.close(0.0)
        self.should_exit = True
        self.thread.join(timeout=10)


def _allow_many_connections() -> None:
    """Raise the limit of open files to the maximum of the system, so that idle connections do not use it up."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
