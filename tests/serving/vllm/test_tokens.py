"""Greedy tokens of vLLM equal those of the decoder of this package, token for token."""

import pytest
import torch

from vllm_engines import counted, expected, prompts, served, write_model, written

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

ASKED = prompts()
DEPTHS = [1 + i % 8 for i in range(12)]
NEW = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with two heads of size 64."""
    return write_model(tmp_path_factory.mktemp("heads-64"))


def test_full_cache_writes_the_decoders_tokens_however_passes_are_cut(folder):
    """Mixed depths, chunked prefill, prefix hits and preemption in one engine."""
    full, mixed = expected(folder, ASKED, max_new_tokens=NEW), expected(folder, ASKED, max_new_tokens=90, num_steps=DEPTHS)
    assert sum(a != b[:NEW] for a, b in zip(full, mixed, strict=True)) > 6  # depth changes tokens
    options = {"max_num_batched_tokens": 64, "hf_overrides": {"salted": True}, "num_gpu_blocks_override": 36, "block_size": 32}
    with served(folder, **options) as llm:
        assert written(llm, ASKED) == full
        assert written(llm, ASKED) == full
        assert counted(llm, "prefix_cache_hits") > 0
        assert written(llm, ASKED, DEPTHS, max_tokens=90) == mixed
        assert counted(llm, "num_preemptions") > 0
        for wrong in (9, 0, -1, 10**6, "8", 1.5, True):
            with pytest.raises(ValueError, match="num_steps is .*must be an integer from 1 to 8"):
                written(llm, ASKED[:1], [wrong])
        assert written(llm, ASKED[:2]) == full[:2]
