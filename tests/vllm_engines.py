"""vLLM in this process, for tests, and models that show a wrong token."""

import gc
import os
from contextlib import contextmanager

import torch

from recurrent_depth.generation.engine import Decoder
from recurrent_depth.generation.request import Decoding
from recurrent_depth.hf.loading import load_model, wrap
from recurrent_depth.model.config import ModelConfig
from recurrent_depth.model.transformer import RecurrentDepthModel

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


def write_model(folder, tokenizer=None, dtype=torch.float32, **shape):
    """Write a random model whose tokens depend on the depth, and in which rounding does not change a token.

    Larger weights would be chaotic: a change of 1e-6 in an embedding would change logits by 3.
    """
    defaults = {
        "n_embd": 128, "n_heads": 2, "intermediate_size": 192, "n_layers_in_recurrent_block": 2, "vocab_size": 320,
        "block_size": 256, "mean_recurrence": 8,
    }  # fmt: skip
    model = RecurrentDepthModel(ModelConfig(**(defaults | shape)))
    model.initialise(seed=5)
    draw = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm_" in name or "ln_f" in name:
                p.add_(0.2 * torch.randn(p.shape, generator=draw))
            elif name.endswith("qk_bias"):
                p.copy_(0.3 * torch.randn(p.shape, generator=draw))
    wrap(model).to(dtype).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def prompts(count=12, longest=160, vocabulary=320):
    """Return ragged prompts of 3 to `longest` tokens."""
    draw = torch.Generator().manual_seed(1)
    lengths = torch.linspace(3, longest, count).long()[torch.randperm(count, generator=draw)].tolist()
    return [torch.randint(vocabulary, (n,), generator=draw).tolist() for n in lengths]


def expected(folder, asked, dtype=torch.float32, **options):
    """Return the tokens that the decoder of this package writes."""
    model, _ = load_model(folder, dtype)
    return Decoder(model).generate(asked, Decoding(**options)).tokens


@contextmanager
def served(folder, **options):
    """Yield a `vllm.LLM` of a folder in this process."""
    os.environ.update(SETTINGS, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults = {
        "dtype": "float32", "max_model_len": 256, "enforce_eager": True, "skip_tokenizer_init": True,
        "disable_log_stats": False, "max_num_seqs": 16,
    }  # fmt: skip
    llm = LLM(str(folder), **(defaults | options))
    torch.set_num_threads(1)  # vLLM takes all cores, which is slow where other tests run
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def written(llm, asked, num_steps=None, max_tokens=24, salted=True):
    """Return the tokens that vLLM writes greedily after every prompt, at a depth per prompt (None: the default)."""
    from vllm import SamplingParams, TokensPrompt

    steps = num_steps or [None] * len(asked)
    inputs = [
        TokensPrompt(prompt_token_ids=ids, **({"cache_salt": str(r)} if salted else {}))
        for ids, r in zip(asked, steps, strict=True)
    ]
    params = [
        SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False,
            extra_args=None if r is None else {"num_steps": r},
        )
        for r in steps
    ]  # fmt: skip
    return [list(output.outputs[0].token_ids) for output in llm.generate(inputs, params, use_tqdm=False)]


def counted(llm, name):
    """Return a counter of vLLM, for example num_preemptions."""
    return sum(metric.value for metric in llm.get_metrics() if metric.name == f"vllm:{name}")
