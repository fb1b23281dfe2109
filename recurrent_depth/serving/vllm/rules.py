"""What vLLM must not do with a model: the rules for its configuration, and the scheduler without preemption.

Whatever would silently give other tokens is switched off with a message, or refused.
"""

from typing import Any

from vllm.config import CompilationMode, CUDAGraphMode
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from recurrent_depth.serving.vllm.options import DepthOptions

_log = init_logger(__name__)
_PACKAGE = "recurrent_depth.serving.vllm"


class Rules(VerifyAndUpdateConfig):
    """vLLM calls this for every model of this package, before it chooses a runner."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Check the options and change vLLM's configuration."""
        from recurrent_depth.serving.vllm.rows import Limits

        options = DepthOptions.of(vllm_config.model_config.hf_config)
        _check(vllm_config, options)
        _run_eagerly(vllm_config)
        if options.needs_one_pass:
            _compute_prompts_in_one_pass(vllm_config)
        elif vllm_config.cache_config.enable_prefix_caching and not (options.fixed_depth or options.salted):
            vllm_config.cache_config.enable_prefix_caching = False
            _log.warning(
                "Prefix caching is switched off: requests with other num_steps would share their entries. If every "
                'request has a cache_salt with its num_steps, set "salted": true in --hf-overrides.'
            )
        Limits.options = options
        name = "slots:SlotDepths" if vllm_config.use_v2_model_runner else "rows:RowDepths"
        model_config = vllm_config.model_config
        model_config.logits_processors = [*(model_config.logits_processors or []), f"{_PACKAGE}.{name}"]


def _check(vllm_config: Any, options: DepthOptions) -> None:
    """Raise for what is not implemented."""
    parallel, config = vllm_config.parallel_config, vllm_config.model_config.hf_config
    if parallel.pipeline_parallel_size > 1:
        raise ValueError(
            f"pipeline_parallel_size is {parallel.pipeline_parallel_size}, but the core is one module; use tensor or "
            "data parallelism"
        )
    tp = parallel.tensor_parallel_size
    for name in ("n_heads", "intermediate_size"):
        if getattr(config, name) % tp:
            raise ValueError(
                f"tensor_parallel_size is {tp}, but the model has {name} {getattr(config, name)}; it must divide "
                "n_heads and intermediate_size"
            )
    if tp > 1 and config.qk_norm == "full":
        raise ValueError(
            f"tensor_parallel_size is {tp}, but this model has a norm over all heads (qk_norm: full); set it to 1"
        )
    if vllm_config.speculative_config is not None and (options.shares_entries or options.exit):
        raise ValueError(
            "speculative decoding computes tokens in other passes, which changes the result with cache_budget or exit; "
            "leave it out, or leave them out"
        )


def _run_eagerly(vllm_config: Any) -> None:
    """Switch compilation and CUDA graphs off: a captured graph would repeat the iterations of another batch."""
    vllm_config.compilation_config.mode = CompilationMode.NONE
    vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE


def _compute_prompts_in_one_pass(vllm_config: Any) -> None:
    """Switch off what computes the tokens of a prompt in several passes, or again later."""
    scheduler, cache = vllm_config.scheduler_config, vllm_config.cache_config
    scheduler.enable_chunked_prefill = cache.enable_prefix_caching = False
    length = vllm_config.model_config.max_model_len
    scheduler.max_num_batched_tokens = max(scheduler.max_num_batched_tokens, length)
    if scheduler.scheduler_cls is not None:
        raise ValueError("scheduler_cls is given; cache_budget and exit_prompt need the scheduler of recurrent-depth")
    scheduler.scheduler_cls = f"{_PACKAGE}.rules.scheduler_without_preemption"
    _log.warning(
        "Chunked prefill, prefix caching and preemption are switched off: with this cache_budget or exit_prompt the "
        "tokens of a prompt must be computed in one pass. Requests wait until their longest length fits in the cache."
    )


def scheduler_without_preemption(*, vllm_config: Any, kv_cache_config: Any, **options: Any) -> Any:
    """Return vLLM's scheduler, running only as many requests as fit in the cache at the longest length."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    kind = AsyncScheduler if vllm_config.scheduler_config.async_scheduling else Scheduler
    scheduler = kind(vllm_config=vllm_config, kv_cache_config=kv_cache_config, **options)
    per_request = -(-vllm_config.model_config.max_model_len // options["block_size"])
    together = max(1, (kv_cache_config.num_blocks - 1) // per_request)  # one block is vLLM's own
    scheduler.max_num_active_reqs = min(scheduler.max_num_active_reqs, together)
    return scheduler
