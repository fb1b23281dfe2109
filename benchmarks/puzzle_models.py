"""What the two benchmarks on puzzles share: a base model a seed, fine-tuning on rows, questions to ask."""

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import trained_run
from recurrent_depth.data.config import DataConfig, PackedDataConfig
from recurrent_depth.data.tasks.puzzles import Puzzle, draw_puzzle, puzzle_tokenizer
from recurrent_depth.evaluation.budgets import Examiner, Question
from recurrent_depth.model.transformer import RecurrentDepthModel
from recurrent_depth.parsing import parse_options
from recurrent_depth.reasoning.config import ReasoningDataConfig, SourceConfig, ThinkingFormat
from recurrent_depth.reasoning.dataset import prepare_reasoning
from recurrent_depth.reasoning.format import Formatter
from recurrent_depth.runs import load_run_model
from recurrent_depth.training.config import TrainCommand

CONFIGS = Path(__file__).parents[1] / "configs"
Row = dict[str, str]


def train_base(seed: int, out: Path) -> Path:
    """The base model of a seed: about three minutes of one core."""
    arguments = ["--config", str(CONFIGS / "pretrain" / "reasoning" / "puzzles.yaml")]
    return trained_run(parse_options(TrainCommand, [*arguments, "--seed", str(seed), "--out", str(out)]).run_config())


def options_of(description: str | None) -> argparse.Namespace:
    """The command line of both benchmarks."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--bases", nargs="*", help="run folders of base models, one a seed; default: train them")
    parser.add_argument("--keep", help="folder that keeps what each seed gave, so that an interrupted run goes on")
    options = parser.parse_args()
    options.seeds = [int(seed) for seed in options.seeds.split(",")]
    torch.set_num_threads(1)
    return options


def each_base(options: argparse.Namespace) -> Iterator[tuple[int, Path]]:
    """Seeds with their base models."""
    with tempfile.TemporaryDirectory() as scratch:
        for index, seed in enumerate(options.seeds):
            yield seed, Path(options.bases[index]) if options.bases else train_base(seed, Path(scratch) / str(seed))


def row_of(puzzle: Puzzle, trace: Sequence[str]) -> Row:
    """A puzzle as a row of a reasoning set."""
    return {
        "question": " ".join(puzzle.question),
        "trace": " ".join(trace),
        "answer": puzzle.answer,
        "domain": puzzle.domain,
    }


def fine_tune(base: Path, rows: Sequence[Row], steps: int, seed: int, unlearned: list[str]) -> RecurrentDepthModel:
    """Train `base` on rows for `steps` steps of 16 examples, by configs/finetune/puzzles.yaml."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        puzzle_tokenizer().save(str(folder / "tokenizer.json"))
        prepare_reasoning(
            ReasoningDataConfig(
                out=str(folder / "data"),
                rows=[SourceConfig(str(folder / "rows.jsonl"))],
                tokenizer=str(folder),
                block=128,
                pack=False,
                unlearned=unlearned,
            )
        )
        arguments = ["--config", str(CONFIGS / "finetune" / "puzzles.yaml"), "--seed", str(seed)]
        arguments += ["--init_from", str(base), "--out", str(folder / "run")]
        config = parse_options(TrainCommand, arguments).run_config()
        optimizer = dataclasses.replace(config.optimizer, warmup_steps=steps // 20, cooldown_steps=steps // 2)
        data = DataConfig(packed=PackedDataConfig(str(folder / "data")))
        return load_run_model(trained_run(dataclasses.replace(config, steps=steps, optimizer=optimizer, data=data)))


def examiner(model: RecurrentDepthModel, puzzles: Sequence[Puzzle]) -> Examiner:
    """Asks puzzles; an answer is right if it is the very word."""
    questions = [Question(" ".join(puzzle.question), puzzle.answer) for puzzle in puzzles]

    def grade(asked: Sequence[Question], answers: Sequence[str]) -> list[bool]:
        return [question.answer == answer for question, answer in zip(asked, answers, strict=True)]

    return Examiner(model, Formatter(puzzle_tokenizer(), ThinkingFormat()), questions, grade, 4, batch_size=256)


def draw(count: int, domains: Sequence[str], fewest: int, most: int, seed: int) -> list[Puzzle]:
    """Puzzles whose domains take turns."""
    rng = np.random.default_rng([seed, 77])
    return [draw_puzzle(rng, domains[i % len(domains)], int(rng.integers(fewest, most + 1))) for i in range(count)]
