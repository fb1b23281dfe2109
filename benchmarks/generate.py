"""Generation through transformers: a looped model against a Llama of the same width unrolled to the same depth.

    python -m benchmarks generate            # 35M shape, one thread, by turns; writes results/generate_cpu.json

All use `generate()` with a dynamic cache and random weights. The Llama has as many layers as the looped model
passes, so their work per token is nearly the same (the looped model adds its adapter), but its weights are distinct.
`int8` is the looped model as `--quantize int8` loads it; the Llama stays in fp32.
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
from recurrent_depth.hf.quantization import quantize
from recurrent_depth.model.config import ModelConfig
from recurrent_depth.model.transformer import RecurrentDepthModel

SHAPE = ModelConfig(
    n_embd=512, n_heads=8, intermediate_size=1792, n_layers_in_prelude=2, n_layers_in_recurrent_block=4,
    n_layers_in_coda=2, vocab_size=8192, block_size=2048, mean_recurrence=8,
)  # fmt: skip
CASES = [(batch, 64, steps) for batch in (1, 8) for steps in (4, 8, 16)] + [(1, 1024, 8), (1, 1024, 4), (1, 1024, 16)]
"""(batch, prompt tokens, iterations). Prompts of 1024 tokens at batch 8 would take an hour."""


def looped(int8: bool = False) -> Any:
    model = RecurrentDepthModel(SHAPE)
    model.initialise(seed=0)
    wrapped = wrap(model).eval()
    if int8:
        quantize(wrapped)
    return wrapped


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


def measure(
    models: dict[str, Any], batch: int, prompt: int, num_steps: int, new_tokens: int, repeats: int
) -> dict[str, Any]:
    ids = torch.randint(SHAPE.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(1))
    everyone = models | {"llama": unrolled(num_steps)}
    runs: dict[str, list[float]] = {name: [] for name in everyone}
    prefill: dict[str, list[float]] = {name: [] for name in everyone}
    held = {}
    for _ in range(repeats):  # by turns, so that all meet the same machine
        for name, m in everyone.items():
            options = {} if name == "llama" else {"num_steps": num_steps}
            prefill[name].append(seconds(m, ids, 1, **options)[0])
            elapsed, held[name] = seconds(m, ids, new_tokens, **options)
            runs[name].append(elapsed)
    row: dict[str, Any] = {"batch": batch, "prompt": prompt, "num_steps": num_steps, "new_tokens": new_tokens}
    for name in runs:
        total = median(runs[name])
        row[f"{name}_tokens_per_s"] = batch * new_tokens / total
        row[f"{name}_decode_tokens_per_s"] = batch * (new_tokens - 1) / (total - median(prefill[name]))
        row[f"{name}_cache_bytes"] = held[name]
    for name, field in (("looped", "time_over_llama"), ("int8", "int8_time_over_llama")):
        row[field] = median(a / b for a, b in zip(runs[name], runs["llama"], strict=True))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    models = {"looped": looped(), "int8": looped(int8=True)}
    rows = []
    print("| batch | prompt | r | looped, int8, Llama tok/s | without prompt | time over Llama | cache MiB (all) |")
    print("|---|---|---|---|---|---|---|")
    for batch, prompt, num_steps in CASES:
        row = measure(models, batch, prompt, num_steps, args.new_tokens, args.repeats)
        rows.append(row)
        names = (*models, "llama")
        speeds, decode = (
            [f"{row[f'{name}{kind}_per_s']:.1f}" for name in names] for kind in ("_tokens", "_decode_tokens")
        )
        ratios = f"{row['time_over_llama']:.2f}, {row['int8_time_over_llama']:.2f}"
        caches = ", ".join(f"{row[f'{name}_cache_bytes'] / 2**20:.1f}" for name in names)
        print(
            f"| {batch} | {prompt} | {num_steps} | {', '.join(speeds)} | {', '.join(decode)} | {ratios} | {caches} |",
            flush=True,
        )
        settings = {"repeats": args.repeats, "transformers": transformers.__version__, "shape": asdict(SHAPE)}
        write_result("generate_cpu", settings | {"rows": rows})  # after every row: the last ones take long


if __name__ == "__main__":
    main()
