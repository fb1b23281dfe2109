"""The tables of docs/gpu.md and README on what one GPU does, from benchmarks/results/h200."""

from typing import Any

from benchmarks.common import markdown, read_result

Row = dict[str, Any]


def entries(stage: str) -> dict[str, Row]:
    """Return the entries of a stage of the GPU suite, measured on an H200."""
    found = read_result(f"h200/{stage}")["entries"]
    return {name: e for name, e in found.items() if not {"failure", "does_not_fit", "bytes_per_second"} & e.keys()}


def gpu_acceptance(entries: dict[str, Row]) -> str:
    """Return every check of the device with its number and limit."""
    rows = []
    for name, entry in entries.items():
        found = (
            f"{entry['error']:.1e}" if "error" in entry else f"{entry['share']:.2f}" if "share" in entry else "holds"
        )
        rows.append([name, found, f"{entry['limit']:.0e}" if "limit" in entry else ""])
    return markdown(["check", "found", "limit"], rows)


def gpu_training(entries: dict[str, Row]) -> str:
    """Return the training step by implementation and recomputation."""
    rows = [
        [e["variant"], e["recompute"], f"{1e3 * e['seconds']:,.0f}", f"{e['tokens_per_second']:,.0f}",
         f"{100 * e['mfu']:.1f}", f"{100 * e['hfu']:.1f}",
         f"{e['peak_memory_bytes'] / 2**30:.1f} ({e['planned_peak_bytes'] / 2**30:.1f})"]
        for e in entries.values()
        if e["shape"] == "huginn-3.5b"
    ]  # fmt: skip
    return markdown(["blocks", "recomputed", "ms", "tokens/s", "MFU, %", "HFU, %", "peak GiB (planned)"], rows)


def gpu_decoding(entries: dict[str, Row]) -> str:
    """Return the time per token by batch, iterations, cache and implementation, and its share of the floor."""
    rows = []
    for e in entries.values():
        share = "" if e["share_of_floor"] is None else f"{100 * e['share_of_floor']:.0f}"
        rows.append(
            [str(e["batch"]), str(e["num_steps"]), str(e["budget"] or "all"), f"{e['way']}, {e['kernels']}",
             e["exit"] or "", f"{e['ms_per_token']:.1f}", share, f"{e['tokens_per_second']:,.0f}"]
        )  # fmt: skip
    head = ["batch", "r", "cache budget", "launches, operations", "exits", "ms per token", "% of the floor", "tokens/s"]
    return markdown(head, rows)


def gpu_roofline(entries: dict[str, Row]) -> str:
    """Return the time of every element-wise operation with the kernels and compiled by torch."""
    rows = []
    for name, e in entries.items():
        if name.endswith(", triton"):
            operation = name.removesuffix(", triton")
            other = entries.get(f"{operation}, compiled")
            cells = [f"{1e6 * x['seconds']:.0f} ({100 * x['share_of_copy']:.0f}%)" if x else "" for x in (e, other)]
            rows.append([operation, *cells])
    return markdown(["operation", "kernels, µs (share of copy)", "torch.compile, µs (share of copy)"], rows)


def gpu_summary(training: dict[str, Row], decoding: dict[str, Row]) -> str:
    """Return the fastest training step, and captured decoding at some batches and iterations."""
    best = min((e for e in training.values() if e["shape"] == "huginn-3.5b"), key=lambda e: e["seconds"])
    rows = [[
        "training step, 4096 tokens, 24 iterations without and 8 with gradient",
        f"{best['seconds']:.2f} s, {best['tokens_per_second']:,.0f} tokens/s",
        f"{100 * best['mfu']:.0f}% of the peak (MFU)",
    ]]  # fmt: skip
    for batch, num_steps in ((1, 32), (1, 8), (8, 32), (64, 32)):
        way = {"batch": batch, "num_steps": num_steps, "way": "captured", "kernels": "triton", "exit": None}
        e = next(e for e in decoding.values() if way.items() <= e.items() and (batch < 64 or e["budget"] == 4))
        cache = "" if e["budget"] is None else f", cache budget {e['budget']}"
        rows.append([
            f"decoding, batch {batch}, r = {num_steps}{cache}",
            f"{e['ms_per_token']:.1f} ms per token, {e['tokens_per_second']:,.0f} tokens/s",
            f"{100 * e['share_of_floor']:.0f}% of the memory floor",
        ])  # fmt: skip
    return markdown(["3.5B model in bfloat16", "one H200", ""], rows)
