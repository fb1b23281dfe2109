"""What a run cost and reached, read from its folder."""

import json
from dataclasses import dataclass
from pathlib import Path

import yaml

from recurrent_depth.runs import find_checkpoint, load_run_model, read_details


@dataclass(frozen=True)
class RunSummary:
    """Totals of a run: seconds are those of training steps alone, flops include recomputation."""

    name: str
    steps: int
    parameters: int
    tokens: float
    flops: float
    seconds: float
    validation_loss: dict[int, float]


def summarise(run: str | Path) -> RunSummary:
    """Totals over metrics.jsonl, and the last validation loss (nats a token) at every depth."""
    run = Path(run)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [record for record in records if record["type"] == "train"]
    validations = [record for record in records if record["type"] == "validation"]
    last = validations[-1] if validations else {}
    losses = {int(key[5:]): value for key, value in last.items() if key.startswith("loss_") and key[5:].isdigit()}
    return RunSummary(
        name=run.name,
        steps=read_details(find_checkpoint(run))["step"],
        parameters=load_run_model(run).num_parameters,
        tokens=sum(record["tokens"] for record in train),
        flops=sum(record["flops"] for record in train),
        seconds=sum(record["seconds"] for record in train),
        validation_loss=losses,
    )


def bytes_per_token(run: str | Path) -> float | None:
    """Of the validation text a run was trained beside; None for generated tasks and sets without a manifest."""
    data = yaml.safe_load((Path(run) / "run.yaml").read_text())["data"]
    manifest = Path(data["packed"]["path"]) / "manifest.json" if data["packed"] else None
    if manifest is None or not manifest.is_file():
        return None
    split = json.loads(manifest.read_text())["splits"]["validation"]
    return split["bytes"] / (split["tokens_kept"] + split["tokens_dropped"])
