"""What was prepared: manifest.json for programs, report.md for people."""

<<<<<<< HEAD
import json
from collections import Counter
from pathlib import Path
from typing import Any
=======
A row reads `cup2 turn142 turn013 ... report`, and the model writes `cup2 turn013 turn142 ... red ... end`: the start,
then every instruction of the row in the order of the vocabulary, and after every few of them the colour of the cup
under which the ball is by then. Instructions of a row differ, so that their order is fixed. While they are read nothing
can be known of the written order. Several cups share a colour, and colours are far apart, so that one does not follow
from those before it: it needs the composition of many written instructions. (With a colour after every instruction it
does follow from the last few, and four steps of the core are enough: docs/decisions.md.)
"""
>>>>>>> refs/heads/genbench

from recurrent_depth.data.filters import REASONS
from recurrent_depth.data.job import Job
from recurrent_depth.data.layout import MANIFEST

REPORT = "report.md"


<<<<<<< HEAD
def write_report(job: Job, folder: Path) -> None:
    """Write both into the folder."""
    manifest = make_manifest(job)
    with job.work.whole_file(folder / REPORT) as file:
        file.write_text(report_text(manifest))
    with job.work.whole_file(folder / MANIFEST) as file:
        file.write_text(json.dumps(manifest, indent=1))
=======
@dataclass(frozen=True)
class ReportTask:
    """State tracking that ends in a written report.

    Attributes:
        game: what is tracked; its token ids stay as they are; colours, `report`, `end` and padding follow.
        colours: names of the colours.
        colour_of: colour of each state, as a place in `colours`.
        every: instructions written between two colours; the last is always followed by one.
    """

    name: str
    game: StateTask
    colours: tuple[str, ...]
    colour_of: tuple[int, ...]
    every: int = 1

    @property
    def moves(self) -> tuple[tuple[int, ...], ...]:
        return self.game.moves

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Token names in the order of their ids; the last one is padding."""
        return (*self.game.states, *self.game.instructions, *self.colours, REPORT, END, PAD)

    @property
    def report_id(self) -> int:
        return len(self.vocabulary) - 3

    @property
    def end_id(self) -> int:
        return len(self.vocabulary) - 2

    def tokenizer(self) -> Tokenizer:
        return word_tokenizer(self.vocabulary)

    def text(self, ids: list[int]) -> str:
        """Token ids as words."""
        return " ".join(self.vocabulary[index] for index in ids)

    def prompt_length(self, length: int) -> int:
        """Tokens that are read: start, instructions, `report`."""
        return length + 2

    def written_length(self, length: int) -> int:
        """Tokens that are written: the start, instructions, colours, `end`."""
        return 2 + length + -(-length // self.every)

    def row_length(self, length: int) -> int:
        """Tokens of a row with `length` instructions; `end` is only a label."""
        return self.prompt_length(length) + self.written_length(length) - 1

    def rows(self, first_row: int, count: int, length: int, *, seed: int, split: int) -> tuple[Tensor, Tensor]:
        """Rows `first_row` ... of an endless sequence fixed by (seed, split).

        Returns input_ids and labels, each [count, row_length]. While a row is read its label is the state in the
        order of reading; from `report` on it is the next token, `end` the last. A shorter `length` reads a prefix of
        the same instructions.
        """
        if length > len(self.game.instructions):
            raise ValueError(f"{self.name} has {len(self.game.instructions)} different instructions, not {length}")
        start, chosen = self._draw(first_row, count, length, seed, split)
        first = len(self.game.states)
        column = np.ones((count, 1), dtype=np.int64)
        ordered = np.sort(chosen, axis=1)
        colours = np.array(self.colour_of)[self.game.run(start, ordered)[:, 1:]] + first + len(self.game.instructions)
        parts = [start[:, None]]
        for begin in range(0, length, self.every):
            end = min(begin + self.every, length)
            parts += [ordered[:, begin:end] + first, colours[:, end - 1 : end]]
        written = np.concatenate(parts, axis=1)
        input_ids = np.concatenate([start[:, None], chosen + first, self.report_id * column, written], axis=1)
        labels = np.concatenate([self.game.run(start, chosen), written, self.end_id * column], axis=1)
        return torch.from_numpy(input_ids), torch.from_numpy(labels)

    def _draw(self, first_row: int, count: int, length: int, seed: int, split: int) -> tuple[np.ndarray, np.ndarray]:
        """Start states [count] and different instructions [count, length]."""
        rows = torch.arange(first_row, first_row + count)[:, None]
        channels = torch.arange(1 + len(self.game.instructions))[None]
        zero = torch.zeros((1, 1), dtype=torch.int64)
        bits = philox((channels, rows & 0xFFFFFFFF, rows >> 32, zero), (seed & 0xFFFFFFFF, split))[0]
        start = (bits[:, 0] % len(self.game.states)).numpy()
        return start, bits[:, 1:].argsort(dim=1, stable=True)[:, :length].numpy()
>>>>>>> refs/heads/genbench


def make_manifest(job: Job) -> dict[str, Any]:
    """Counts of every source, split and category, and the hash of every file."""
    config = job.config
    tokenizer = job.work.result("tokenizer")
    written = [job.work.result("write", task) for task in range(config.files + job.validation_files)]
    sources = _sources(job)
    return {
        "format": 2,
        "vocab_size": tokenizer["vocab_size"],
        "tokenizer_sha256": tokenizer["sha256"],
        "sequence_length": config.sequence_length,
        "policy": config.policy,
        "sources": sources,
        "categories": _categories(sources),
        "splits": {split: _split(sources, split) for split in ("train", "validation")},
        "content": {result["file"]: result["sha256"] for result in written if result},
    }


def _sources(job: Job) -> dict[str, dict[str, Any]]:
    mix = job.work.result("mix")
    reports: dict[str, dict[str, Any]] = {}
    for source, passes in zip(job.sources, mix["passes"], strict=True):
        reports[source.name] = {
            "address": source.address,
            "category": source.category,
            "licence": source.licence,
            "machine_generated": source.machine_generated,
            "note": source.note,
            "weight": source.weight,
            "passes": passes,
            "documents_read": 0,
            "documents_dropped": dict.fromkeys(REASONS, 0),
            "splits": {"train": Counter(), "validation": Counter()},
        }
    for number, part in enumerate(job.parts):
        packed, report = job.work.result("pack", number), reports[job.sources[part.source].name]
        report["documents_read"] += packed["read"]
        for reason, count in packed["dropped"].items():
            report["documents_dropped"][reason] += count
        for split, counts in packed["splits"].items():
            rows = mix["copies"][split][number]
            final = {"final_rows": rows, "final_tokens": rows * (job.config.sequence_length + 1)}
            report["splits"][split].update(counts | final)
    return reports


<<<<<<< HEAD
def _categories(sources: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    tokens: Counter[str] = Counter()
    for report in sources.values():
        tokens[report["category"]] += report["splits"]["train"]["final_tokens"]
    total = sum(tokens.values())
    return {name: {"tokens": count, "share": count / total} for name, count in tokens.items()}


def _split(sources: dict[str, dict[str, Any]], split: str) -> dict[str, Any]:
    total: Counter[str] = Counter()
    for report in sources.values():
        total.update(report["splits"][split])
    return {
        "documents": total["documents"],
        "bytes": total["bytes"],
        "rows": total["final_rows"],
        "tokens_kept": total["tokens_kept"],
        "tokens_dropped": total["tokens_cut"] + total["tokens_unfilled"],
        "tokens_by_source": {name: report["splits"][split]["final_tokens"] for name, report in sources.items()},
    }


def report_text(manifest: dict[str, Any]) -> str:
    """The manifest as Markdown."""
    train = manifest["splits"]["train"]
    total = sum(train["tokens_by_source"].values())
    lines = [
        "# Prepared data",
        "",
        f"Rows of {manifest['sequence_length'] + 1:,} tokens, vocabulary {manifest['vocab_size']:,}, packing policy "
        f"`{manifest['policy']}`. {train['rows']:,} rows to train on and {manifest['splits']['validation']['rows']:,} "
        "held out.",
        "",
        "| category | tokens to train on | share |",
        "|---|---:|---:|",
        *(
            f"| {name} | {counts['tokens']:,} | {counts['share']:.2%} |"
            for name, counts in sorted(manifest["categories"].items(), key=lambda item: -item[1]["tokens"])
        ),
        "",
        "Tokens to train on count a row each time it is taken; tokens not packed are the rests that the policy drops "
        "and the last, unfilled rows, of one pass over both splits.",
        "",
        "| source | category | licence | machine-generated | passes | documents | "
        + " | ".join(reason.replace("_", " ") for reason in REASONS)
        + " | tokens not packed | tokens to train on | share |",
        "|---|---|---|---|" + "---:|" * (5 + len(REASONS)),
    ]
    for name, source in manifest["sources"].items():
        splits = source["splits"].values()
        not_packed = sum(counts["tokens_cut"] + counts["tokens_unfilled"] for counts in splits)
        tokens = train["tokens_by_source"][name]
        dropped = " | ".join(f"{source['documents_dropped'][reason]:,}" for reason in REASONS)
        generated = "yes" if source["machine_generated"] else "no"
        lines.append(
            f"| {name} | {source['category']} | {source['licence']} | {generated} | "
            f"{source['passes']:.3g} | {source['documents_read']:,} | {dropped} | {not_packed:,} | {tokens:,} | "
            f"{tokens / total:.2%} |"
        )
    return "\n".join(lines) + "\n"


def summary(folder: Path, manifest: dict[str, Any]) -> str:
    """A few lines for the terminal."""
    lines = [str(folder)]
    for name, split in manifest["splits"].items():
        tokens = split["tokens_kept"] + split["tokens_dropped"]
        lines.append(
            f"{name}: {split['documents']:,} documents, {split['rows']:,} rows, {split['tokens_kept']:,} tokens "
            f"packed, {split['tokens_dropped']:,} dropped, {split['bytes'] / max(tokens, 1):.2f} bytes a token"
        )
    for name, counts in manifest["categories"].items() if len(manifest["categories"]) > 1 else ():
        lines.append(f"  {name}: {counts['share']:.2%} of the training tokens")
    return "\n".join(lines)
=======
def _reports() -> list[ReportTask]:
    game, colours, colour_of = rotations(), ("red", "green", "blue"), (0, 0, 1, 1, 2)
    return [
        ReportTask("rotation_report_dense", game, colours, colour_of, every=1),
        ReportTask("rotation_report", game, colours, colour_of, every=4),
    ]


REPORTS = {task.name: task for task in _reports()}
>>>>>>> refs/heads/genbench
