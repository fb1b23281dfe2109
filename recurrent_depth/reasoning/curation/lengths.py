"""Measure traces in tokens: s1's second signal of difficulty, and what must fit into a block."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recurrent_depth.checks import check_at_least, check_not_empty
from recurrent_depth.extras import require
from recurrent_depth.files import file_hash
from recurrent_depth.hub import check_folder_or_hub_name
from recurrent_depth.reasoning.curation.local import model_fingerprint
from recurrent_depth.reasoning.curation.stages import Context, Outcome, Stage, stage
from recurrent_depth.reasoning.pool import Example
from recurrent_depth.runs import is_run, run_tokenizer


@stage("lengths")
@dataclass(frozen=True)
class Lengths(Stage):
    """Measure `trace_tokens`; drop traces that are too short or too long.

    Args:
        tokenizer: a tokenizer.json, a run folder, or a folder or hub name of transformers.
        at_least: fewest tokens of a trace.
        at_most: most tokens of a trace; null for no limit.
    """

    tokenizer: str
    at_least: int = 1
    at_most: int | None = None

    def __post_init__(self) -> None:
        check_not_empty("tokenizer", self.tokenizer, "tokenizer.json")
        check_at_least("at_least", self.at_least, 0)
        check_at_least("at_most", self.at_most, self.at_least)

    def inputs(self, context: Context) -> list[Any]:
        file = _tokenizer_file(self.tokenizer)
        if file is not None:
            return [file_hash(file)]
        require("transformers", "recurrent-depth[curate]", f"the tokenizer {self.tokenizer}")
        check_folder_or_hub_name(self.tokenizer, "tokenizer")
        return [model_fingerprint(self.tokenizer)]

    def apply(self, examples: list[Example], context: Context) -> Outcome:
        lengths = count_tokens([example.trace for example in examples], self.tokenizer)
        outcome = Outcome([])
        for example, length in zip(examples, lengths, strict=True):
            measured = replace(example, trace_tokens=length)
            if length < self.at_least:
                outcome.drops.append(context.drop(measured, "trace too short", f"{length} tokens"))
            elif self.at_most is not None and length > self.at_most:
                outcome.drops.append(context.drop(measured, "trace too long", f"{length} tokens"))
            else:
                outcome.examples.append(measured)
        return outcome


def _tokenizer_file(name: str) -> Path | None:
    """Return the tokenizer.json that `name` means; None if transformers must look for it."""
    if Path(name).is_file():
        return Path(name)
    if name.endswith(".json"):
        raise FileNotFoundError(f"{name} does not exist; name a tokenizer.json, or the folder or model it belongs to")
    folder = Path(name) / "tokenizer.json"
    return run_tokenizer(name) if is_run(name) else (folder if folder.is_file() else None)


def count_tokens(texts: list[str], name: str) -> list[int]:
    """Return the number of tokens of each text, without special tokens."""
    file = _tokenizer_file(name)
    if file is not None:
        from recurrent_depth.data.tokenizer import load_tokenizer

        return [len(encoding.ids) for encoding in load_tokenizer(file).encode_batch(texts, add_special_tokens=False)]
    from transformers import AutoTokenizer

    encoded = AutoTokenizer.from_pretrained(name)(texts, add_special_tokens=False)["input_ids"] if texts else []
    return [len(ids) for ids in encoded]
