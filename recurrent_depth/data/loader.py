"""Open the source of rows that a configuration names."""

from recurrent_depth.data.batch import Source
from recurrent_depth.data.config import DataConfig
from recurrent_depth.data.layout import Split
from recurrent_depth.data.packed import PackedSource
from recurrent_depth.data.tasks.source import PuzzleSource, TaskSource


def open_source(config: DataConfig, split: Split, seed: int, total_steps: int) -> Source:
    """Return the training or validation rows of a configuration.

    Args:
        seed: fixes the order of the rows, and generated rows.
        total_steps: training steps of the run, over which a curriculum grows.
    """
    if config.task is not None:
        return TaskSource(config.task, split, seed, total_steps)
    if config.puzzles is not None:
        return PuzzleSource(config.puzzles, split, seed, total_steps)
    assert config.packed is not None
    return PackedSource(config.packed, split, seed)
