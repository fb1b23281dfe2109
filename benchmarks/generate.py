"""Generation through transformers: a looped model against a Llama of the same width unrolled to the same depth.

    python -m benchmarks generate            # 35M shape, one thread, by turns; writes results/generate_cpu.json

Both use `generate()` with a dynamic cache and random weights. The Llama has as many layers as the looped model
passes, so their work per token is nearly the same (the looped model adds its adapter), but its weights are distinct.
"""

import argparse
import time
from dataclasses import asdict
from statistics import median
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import write_result
from recurrent_depth.hf.loading import wrap
from recurrent_depth.model.config import ModelConfig
from recurrent_depth.model.transformer import RecurrentDepthModel

SHAPE = ModelConfig(
    n_embd=512, n_heads=8, intermediate_size=1792, n_layers_in_prelude=2, n_layers_in_recurrent_block=4,
    n_layers_in_coda=2, vocab_size=8192, block_size=2048, mean_recurrence=8,
)  # fmt: skip
CASES = [(1, 64, 4), (1, 64, 8), (1, 64, 16), (8, 64, 4), (8, 64, 8), (8, 64, 16), (1, 1024, 8), (8, 1024, 8)]
"""(batch, prompt tokens, steps)"""


def looped() -> Any:
    model = RecurrentDepthModel(SHAPE)
    model.initialise(seed=0)
    return wrap(model).eval()


def unrolled(num_steps: int) -> Any:
    config = LlamaConfig(
        hidden_size=SHAPE.n_embd, intermediate_size=SHAPE.intermediate_size, num_attention_heads=SHAPE.n_heads,
        num_hidden_layers=SHAPE.unrolled_layers(num_steps), vocab_size=SHAPE.vocab_size, tie_word_embeddings=True,
        max_position_embeddings=SHAPE.block_size, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.inference_mode()
def seconds(model: Any, ids: torch.Tensor, new_tokens: int, **options: Any) -> tuple[float, int]:
    """Wall time of one call, and the bytes its cache holds at the end."""
    start = time.perf_counter()
    output = model.generate(
        ids, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, return_dict_in_generate=True,
        pad_token_id=0, **options,
    )  # fmt: skip
    elapsed = time.perf_counter() - start
    entries = [t for layer in output.past_key_values.layers for t in (layer.keys, layer.values)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in entries}  # shared ones once
    return elapsed, sum(storages.values())


def measure(model: Any, batch: int, prompt: int, num_steps: int, new_tokens: int, repeats: int) -> dict[str, Any]:
    ids = torch.randint(SHAPE.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(1))
    llama = unrolled(num_steps)
    runs: dict[str, list[float]] = {"looped": [], "llama": []}
    prefill: dict[str, list[float]] = {"looped": [], "llama": []}
    held = {}
    for _ in range(repeats):  # by turns, so that both meet the same machine
        for name, m, options in (("looped", model, {"num_steps": num_steps}), ("llama", llama, {})):
            prefill[name].append(seconds(m, ids, 1, **options)[0])
            elapsed, held[name] = seconds(m, ids, new_tokens, **options)
            runs[name].append(elapsed)
    row: dict[str, Any] = {"batch": batch, "prompt": prompt, "num_steps": num_steps, "new_tokens": new_tokens}
    for name in runs:
        total = median(runs[name])
        row[f"{name}_tokens_per_s"] = batch * new_tokens / total
        row[f"{name}_decode_tokens_per_s"] = batch * (new_tokens - 1) / (total - median(prefill[name]))
        row[f"{name}_cache_bytes"] = held[name]
    row["time_over_llama"] = median(a / b for a, b in zip(runs["looped"], runs["llama"], strict=True))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = looped()
    rows = []
    print("| batch | prompt | r | looped tok/s | Llama tok/s | time over Llama | cache MiB (looped, Llama) |")
    print("|---|---|---|---|---|---|---|")
    for batch, prompt, num_steps in CASES:
        row = measure(model, batch, prompt, num_steps, args.new_tokens, args.repeats)
        rows.append(row)
        print(
            f"| {batch} | {prompt} | {num_steps} | "
            f"{row['looped_tokens_per_s']:.1f} | {row['llama_tokens_per_s']:.1f} | "
            f"{row['time_over_llama']:.2f} | {row['looped_cache_bytes'] / 2**20:.1f}, "
            f"{row['llama_cache_bytes'] / 2**20:.1f} |",
            flush=True,
        )
        settings = {"repeats": args.repeats, "transformers": transformers.__version__, "shape": asdict(SHAPE)}
        write_result("generate_cpu", settings | {"rows": rows})  # after every row: the last ones take long


if __name__ == "__main__":
    main()
