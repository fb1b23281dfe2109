"""Rows per second that the loader gives, beside the fastest consumer: a training step of the tiny model.

python -m benchmarks loader

Both run in one thread and alternate, so that other work on the machine hits both; memory is read after the first
batches and at the end.
"""

import argparse
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks.common import write_result
from recurrent_depth.data.config import DataConfig, PackedDataConfig
from recurrent_depth.data.loader import open_source
from recurrent_depth.data.preparation.packing import Row
from recurrent_depth.data.preparation.rows import row_batch, row_schema, write_parquet
from recurrent_depth.model.config import SHAPES
from recurrent_depth.model.transformer import RecurrentDepthModel
from recurrent_depth.training.config import OptimizerConfig
from recurrent_depth.training.optimizer import build_optimizer


def write_rows(folder: Path, tokens: int, vocab_size: int, files: int = 4, rows: int = 2000) -> None:
    """Random rows with three documents each."""
    generator = np.random.default_rng(0)
    schema = row_schema(vocab_size)
    folder.mkdir()
    for file in range(files):
        ids = generator.integers(0, vocab_size, (rows, tokens + 1))
        batch = row_batch([Row(row, [0, tokens // 3, tokens // 2]) for row in ids], schema)
        write_parquet(pa.Table.from_batches([batch]), folder / f"{file}.parquet")


def loader_rate(folder: Path, tokens: int, masking: bool, batch: int, batches: int) -> dict[str, Any]:
    """Tokens/s over several epochs, and resident memory before and after."""
    config = DataConfig(packed=PackedDataConfig(str(folder), document_masking=masking, restart_positions=masking))
    source = open_source(config, "train", seed=0, total_steps=1)
    for number in range(batches // 4):
        source.batch(number * batch, batch, 0)
    before = resident_bytes()
    times = []
    for number in range(batches):
        began = time.perf_counter()
        source.batch(number * batch, batch, 0)
        times.append(time.perf_counter() - began)
    return {
        "tokens": tokens,
        "document_masking": masking,
        "batches": batches,
        "epochs": round(batches * batch / source.rows_per_epoch, 2),
        "mean_tokens_per_second": round(batches * batch * tokens / sum(times)),
        "resident_bytes_after_a_fifth": before,
        "resident_bytes_at_the_end": resident_bytes(),
    }


def consumer_rate(tokens: int, batch: int, steps: int) -> float:
    """Tokens/s of a whole step of the tiny model at one recurrence: the fastest training there is."""
    config = SHAPES["tiny"]
    model = RecurrentDepthModel(config)
    model.initialise(seed=0)
    optimizer = build_optimizer(model, OptimizerConfig(name="adamw", lr=1e-4))
    ids = torch.randint(0, config.vocab_size, (batch, tokens))
    times = []
    for _ in range(steps + 2):
        began = time.perf_counter()
        model(ids, targets=ids, num_steps=(0, 1), loss_chunk_size=4096).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - began)
    return batch * tokens / statistics.median(times[2:])


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for tokens, batch, batches in ((SHAPES["tiny"].block_size, 32, options.batches), (4096, 4, options.batches)):
            folder = Path(name) / str(tokens)
            write_rows(folder, tokens, vocab_size=4096, files=4 if tokens < 4096 else 2)
            for masking in (False, True):
                rates = []
                for _ in range(options.repeats):
                    rates.append(loader_rate(folder, tokens, masking, batch, batches))
                    rates[-1]["consumer_tokens_per_second"] = consumer_rate(SHAPES["tiny"].block_size, 32, 20)
                    rates[-1]["loader_over_consumer"] = (
                        rates[-1]["mean_tokens_per_second"] / rates[-1]["consumer_tokens_per_second"]
                    )
                rows.append(sorted(rates, key=lambda rate: rate["loader_over_consumer"])[len(rates) // 2])
                print(rows[-1])
    write_result("loader", {"consumer": "tiny shape, one recurrence, AdamW, eager, one thread", "rows": rows})


if __name__ == "__main__":
    main()
