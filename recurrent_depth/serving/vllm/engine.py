"""The engine of `recurrent-depth serve` with vLLM: the same protocol, limits and errors as with the decoder.

vLLM computes in a separate process. Every request has a cache salt with its num_steps, so that prefixes are shared
only between requests of the same depth.
"""

import asyncio
import atexit
import logging
import os
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from vllm import SamplingParams, TokensPrompt
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.engine.async_llm import AsyncLLM

from recurrent_depth.devices import choose_device, choose_dtype
from recurrent_depth.generation.config import Thinking
from recurrent_depth.generation.forcing import Forcing
from recurrent_depth.hf import RecurrentDepthConfig
from recurrent_depth.hf.chat import stop_ids
from recurrent_depth.hf.loading import ModelError, load_model
from recurrent_depth.runs import is_run
from recurrent_depth.serving.config import ServeConfig
from recurrent_depth.serving.effort import read_efforts
from recurrent_depth.serving.engine import EngineStopped, Generation, TokenQueue, Tokens
from recurrent_depth.serving.vllm.options import REQUEST_FIELD, DepthOptions

_log = logging.getLogger(__name__)


def start(config: ServeConfig) -> tuple["VllmEngine", Any, Any]:
    """Return the engine, the tokenizer, and the generation config of a model."""
    folder = Path(config.model) if not is_run(config.model) else _exported(config.model)
    hf_config = AutoConfig.from_pretrained(str(folder))
    if not isinstance(hf_config, RecurrentDepthConfig):
        raise ModelError(f"model: {config.model} is not a recurrent-depth model; only those are served")
    if folder.is_dir() and not any(folder.glob("tokenizer*")):
        raise ModelError(f"model: {config.model} has no tokenizer and cannot be served; add its tokenizer.json")
    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    try:
        generation_config = GenerationConfig.from_pretrained(str(folder))
    except OSError:  # the folder has none
        generation_config = GenerationConfig()
    ends = stop_ids(SimpleNamespace(generation_config=generation_config), tokenizer)
    default = config.default_num_steps or hf_config.num_steps or hf_config.mean_recurrence
    options = DepthOptions(
        num_steps=config.limits.num_steps or default,
        default_num_steps=default,
        cache_budget=config.cache_budget,
        exit=config.exit,
        exit_threshold=config.exit_threshold,
        exit_prompt=config.exit_prompt,
        salted=True,
    )
    thinks = any(effort.thinking for effort in read_efforts(generation_config, tokenizer).values())
    arguments = _engine_arguments(config, str(folder), hf_config, options, thinks)
    try:
        llm = AsyncLLM.from_engine_args(arguments)
    except (RuntimeError, ValueError) as error:
        raise ModelError(
            f"model: vLLM cannot serve {config.model} ({error}); its messages above say why. Change the options, or "
            "use --engine transformers"
        ) from error
    return VllmEngine(llm, hf_config, options, frozenset(ends)), tokenizer, generation_config


def _engine_arguments(config: ServeConfig, folder: str, hf_config: Any, options: DepthOptions, thinks: bool) -> Any:
    """Return the arguments of vLLM's engine."""
    device = choose_device(config.device)
    size, sizes = hf_config.to_model_config().head_dim, CPUAttentionBackend.get_supported_head_sizes()
    if device.type == "cpu" and size not in sizes:
        raise ModelError(
            f"model: {config.model} has heads of size {size}; on a CPU vLLM takes {', '.join(map(str, sizes))}. Use "
            "--engine transformers"
        )
    thinking = Thinking()
    delimiters = {"reasoning_start_str": thinking.begin, "reasoning_end_str": thinking.end}
    fields = ("num_steps", "default_num_steps", "cache_budget", "exit", "exit_threshold", "exit_prompt", "salted")
    defaults = {"NO_USAGE_STATS": "1", "LOGGING_LEVEL": "WARNING", "WORKER_MULTIPROCESSING_METHOD": "spawn"}
    for name, value in defaults.items():  # spawn: the server has threads, which a forked process would lack
        os.environ.setdefault(f"VLLM_{name}", value)
    return AsyncEngineArgs(
        model=folder,
        dtype=str(choose_dtype(config.dtype, device)).removeprefix("torch."),
        max_model_len=hf_config.block_size,
        max_num_seqs=config.limits.batch,
        kv_cache_memory_bytes=int(config.limits.cache_gib * 2**30),
        hf_overrides={name: getattr(options, name) for name in fields},
        tensor_parallel_size=config.tensor_parallel,
        enforce_eager=True,
        enable_log_requests=False,
        disable_log_stats=True,
        **({"reasoning_config": delimiters} if thinks else {}),
    )


class VllmTokens(TokenQueue):
    """The tokens of a request, which a task reads from vLLM."""

    task: asyncio.Task[None]

    def cancel(self) -> None:
        super().cancel()
        self.task.cancel()  # vLLM ends the request


class VllmEngine:
    """An `Engine` over vLLM.

    Args:
        llm: vLLM's asynchronous engine.
        stop_ids: tokens that end a request.
    """

    def __init__(self, llm: AsyncLLM, hf_config: Any, options: DepthOptions, stop_ids: frozenset[int]) -> None:
        self.llm, self.stop_ids = llm, stop_ids
        self.context, self.vocab_size = hf_config.block_size, hf_config.vocab_size
        self.default_num_steps, self.max_num_steps = options.default, options.num_steps
        self.running: set[VllmTokens] = set()
        self.count = 0
        self.closed = False

    def submit(self, generation: Generation) -> Tokens:
        if not self.healthy():
            raise EngineStopped(
                "the server is shutting down" if self.closed else "vLLM has failed; see the server's log"
            )
        self.count += 1
        tokens = VllmTokens(generation, self.stop_ids)
        tokens.task = asyncio.ensure_future(self._generate(tokens, str(self.count)))
        tokens.task.add_done_callback(lambda task: self.running.discard(tokens))
        self.running.add(tokens)
        return tokens

    def cache_tokens(self, num_steps: int) -> int:
        return self.context  # vLLM has checked at start that the cache holds a request of this length

    def load(self) -> tuple[int, int]:
        return len(self.running), 0  # vLLM does not say which of them wait

    def healthy(self) -> bool:
        return not self.closed and not self.llm.errored

    def close(self, seconds: float) -> bool:
        self.closed = True
        for tokens in list(self.running):
            tokens.end(EngineStopped("the server is shutting down"))
        self.llm.shutdown(timeout=seconds)
        return True

    async def _generate(self, tokens: VllmTokens, name: str) -> None:
        """Read the tokens of a request from vLLM and add them to its queue."""
        try:
            opening = _opening(tokens.generation)
            if not any(tokens.take(token) for token in opening):
                prompt = _prompt(tokens.generation, opening)
                async for output in self.llm.generate(prompt, self._params(tokens.generation, len(opening)), name):
                    for token in output.outputs[0].token_ids:
                        tokens.take(token)
            tokens.end(StopAsyncIteration())
        except Exception as error:
            if not self.closed:
                _log.exception("a request failed in vLLM")
            tokens.end(EngineStopped(f"decoding failed ({type(error).__name__}); see the server's log"))

    def _params(self, generation: Generation, opening: int) -> SamplingParams:
        g = generation
        return SamplingParams(
            temperature=g.temperature,
            top_p=g.top_p,
            top_k=g.top_k or 0,
            seed=g.seed,
            max_tokens=g.max_new_tokens - opening,
            stop_token_ids=list(self.stop_ids),
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            thinking_token_budget=None if g.thinking is None else g.thinking.at_most,
            extra_args={REQUEST_FIELD: g.num_steps},
        )


def _opening(generation: Generation) -> list[int]:
    """Return the ids that open the thinking part; none if there is no part, or the prompt has opened it."""
    return [] if generation.thinking is None else Forcing(generation.thinking, list(generation.prompt)).queue


def _prompt(generation: Generation, opening: list[int]) -> TokensPrompt:
    return TokensPrompt(prompt_token_ids=[*generation.prompt, *opening], cache_salt=str(generation.num_steps))


def _exported(run: str) -> Path:
    """Return a temporary folder with an export of a run or checkpoint; it is removed at exit."""
    folder = Path(tempfile.mkdtemp(prefix="recurrent-depth-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    model, tokenizer = load_model(run)
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder
