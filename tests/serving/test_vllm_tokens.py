"""Greedy tokens of vLLM equal those of the decoder of this package, token for token."""

import pytest
import torch

from recurrent_depth.generation.exits import StateChange
from recurrent_depth.model.config import RopeScaling
from vllm_engines import counted, expected, prompts, served, write_model, written

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

ASKED = prompts()
DEPTHS = [1 + i % 8 for i in range(12)]
FEW = ASKED[:8]
NEW, LONG = 24, 90
FEW_BLOCKS = {"num_gpu_blocks_override": 36, "block_size": 32}
"""Too few for the requests at their full length, so that vLLM preempts some."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with two heads of size 64."""
    return write_model(tmp_path_factory.mktemp("heads-64"))


def test_full_cache_writes_the_decoders_tokens_however_passes_are_cut(folder):
    """Mixed depths, chunked prefill, prefix hits and preemption in one engine."""
    from vllm.exceptions import VLLMValidationError

    full = expected(folder, ASKED, max_new_tokens=NEW)
    mixed = expected(folder, ASKED, max_new_tokens=LONG, num_steps=DEPTHS)
    assert sum(a != b[:NEW] for a, b in zip(full, mixed, strict=True)) > 6  # depth changes tokens
    with served(folder, max_num_batched_tokens=64, hf_overrides={"salted": True}, **FEW_BLOCKS) as llm:
        assert written(llm, ASKED) == full
        assert written(llm, ASKED) == full
        assert counted(llm, "prefix_cache_hits") > 0
        assert written(llm, ASKED, DEPTHS, max_tokens=LONG) == mixed
        assert counted(llm, "num_preemptions") > 0
        for wrong in (9, 0, -1, 10**6, "8", 1.5, True):
            with pytest.raises(VLLMValidationError, match=r"num_steps is .*must be an integer from 1 to 8"):
                written(llm, ASKED[:1], [wrong])
        assert written(llm, ASKED[:2]) == full[:2]


def test_prefixes_are_not_shared_between_depths_without_salts(folder):
    """Without salts vLLM's prefix cache is switched off, so that a prefix of depth 2 is not read at depth 8."""
    with served(folder, hf_overrides={"num_steps": 12, "default_num_steps": 8}) as llm:
        written(llm, ASKED, [2] * 12, salted=False)
        deep = written(llm, ASKED, [12] * 12, salted=False)
        assert deep == expected(folder, ASKED, max_new_tokens=NEW, num_steps=12)
        assert written(llm, ASKED, salted=False) == expected(folder, ASKED, max_new_tokens=NEW, num_steps=8)
        assert counted(llm, "prefix_cache_hits") == 0


def test_budget_of_one_writes_the_decoders_tokens_at_mixed_depths(tmp_path):
    """Long prompts with few blocks: nothing is chunked, read from a prefix cache, or preempted."""
    write_model(tmp_path, n_embd=64, n_heads=2, n_layers_in_prelude=2)  # heads of size 32
    mixed = expected(tmp_path, ASKED, max_new_tokens=LONG, num_steps=DEPTHS, cache_budget=1)
    assert mixed != expected(tmp_path, ASKED, max_new_tokens=LONG, num_steps=DEPTHS)
    options = {"hf_overrides": {"cache_budget": 1, "salted": True}, "max_num_batched_tokens": 64}
    with served(tmp_path, **options, **FEW_BLOCKS) as llm:
        assert written(llm, ASKED, DEPTHS, max_tokens=LONG) == mixed
        assert written(llm, ASKED, DEPTHS, max_tokens=LONG) == mixed
        assert counted(llm, "num_preemptions") == counted(llm, "prefix_cache_hits") == 0


@pytest.mark.parametrize("kind", ["llama", "olmo"])
def test_converted_shapes_write_the_decoders_tokens(tmp_path, kind):
    """Grouped heads, biases and norms of q and k, other places of norms, rotary scaling."""
    shapes = {
        "llama": {
            "block": "pre", "n_heads": 4, "n_kv_heads": 2, "head_size": 32, "qkv_bias": True, "qk_norm": "head",
            "rotary_scaling": RopeScaling("llama3", 8.0, original_max_position_embeddings=64),
        },
        "olmo": {"block": "branch", "n_heads": 4, "n_kv_heads": 2, "qk_norm": "full"},
    }  # fmt: skip
    write_model(tmp_path, qk_bias=False, ln_f_before_coda=False, **shapes[kind])
    with served(tmp_path, hf_overrides={"salted": True}, max_num_batched_tokens=64, enable_chunked_prefill=True) as llm:
        found = written(llm, ASKED, DEPTHS)
        assert found == expected(tmp_path, ASKED, max_new_tokens=NEW, num_steps=DEPTHS)


def test_budget_of_two_writes_the_decoders_tokens_at_one_depth(tmp_path):
    from vllm.exceptions import VLLMValidationError

    write_model(tmp_path, n_embd=192, n_heads=2, norm="layer", tie_embeddings=False)  # heads of size 96
    with served(tmp_path, hf_overrides={"cache_budget": 2, "num_steps": 4}) as llm:
        assert written(llm, ASKED) == expected(tmp_path, ASKED, max_new_tokens=NEW, num_steps=4, cache_budget=2)
        with pytest.raises(VLLMValidationError, match=r"must be an integer from 4 to 4"):
            written(llm, ASKED[:1], [2])


def test_exit_after_the_prompt_does_not_depend_on_how_passes_are_cut(folder):
    """Chunked prefill, prefix hits and preemption in one engine; the prompt takes all iterations."""
    options = {"max_new_tokens": 60, "exit": StateChange(0.4), "exit_prompt": False, "num_steps": DEPTHS[:8]}
    stopping = expected(folder, FEW, **options)
    assert stopping != expected(folder, FEW, **(options | {"exit": None}))
    overrides = {"exit": "state-change", "exit_threshold": 0.4, "salted": True}
    with served(
        folder, hf_overrides=overrides, max_num_batched_tokens=64, **FEW_BLOCKS | {"num_gpu_blocks_override": 20}
    ) as llm:
        first = [tokens[:NEW] for tokens in stopping]
        assert written(llm, FEW[:4], DEPTHS[:4]) == first[:4]
        assert written(llm, FEW[:4], DEPTHS[:4]) == first[:4]
        assert counted(llm, "prefix_cache_hits") > 0
        assert written(llm, FEW, DEPTHS[:8], max_tokens=60) == stopping
        assert counted(llm, "num_preemptions") > 0


@pytest.mark.parametrize("budget", [None, 1])
def test_exit_in_order_writes_the_decoders_tokens_in_one_pass(folder, budget):
    """Tokens of the prompt stop early too, each after those before it; chunking and preemption are switched off."""
    options = {"max_new_tokens": 60, "exit": StateChange(0.6), "cache_budget": budget}
    stopping = expected(folder, FEW, **options)
    assert stopping != expected(folder, FEW, **(options | {"exit_prompt": False}))
    overrides = {"exit": "state-change", "exit_threshold": 0.6, "exit_prompt": True}
    overrides |= {} if budget is None else {"cache_budget": budget}
    with served(
        folder, hf_overrides=overrides, max_num_batched_tokens=64, **FEW_BLOCKS | {"num_gpu_blocks_override": 20}
    ) as llm:
        assert written(llm, FEW, max_tokens=60) == stopping
        assert counted(llm, "num_preemptions") == 0


def test_bfloat16_differs_from_the_decoder_only_by_rounding(tmp_path):
    """Rule: at most 3 of 12 requests differ. A sum in another order may change a token, and then all later ones."""
    write_model(tmp_path, dtype=torch.bfloat16)
    reference = expected(tmp_path, ASKED, torch.bfloat16, max_new_tokens=NEW)
    with served(tmp_path, dtype="bfloat16") as llm:
        found = written(llm, ASKED)
    assert sum(a == b for a, b in zip(found, reference, strict=True)) >= 9


@pytest.mark.slow
def test_two_ranks_write_the_decoders_tokens(folder):
    """Tensor parallelism: each process has half of the heads and of the MLP."""
    asked, depths = ASKED[:4], [2, 8, 5, 1]
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", "hf_overrides": {"salted": True}}
    with served(folder, **options) as llm:
        assert written(llm, asked, depths) == expected(folder, asked, max_new_tokens=NEW, num_steps=depths)
