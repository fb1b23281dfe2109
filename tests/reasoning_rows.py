"""Write puzzles as files of rows with question, trace and answer."""

import json

import numpy as np

from recurrent_depth.data.tasks.puzzles import draw_puzzle, puzzle_tokenizer
from recurrent_depth.reasoning.config import SourceConfig


def write_rows(folder, rows):
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    puzzle_tokenizer().save(str(folder / "tokenizer.json"))
    return {"rows": [SourceConfig(str(folder / "rows.jsonl"))], "tokenizer": str(folder)}


def puzzles(count, longest=6, seed=0):
    rng = np.random.default_rng(seed)
    drawn = [draw_puzzle(rng, "swap", int(rng.integers(2, longest + 1))) for _ in range(count)]
    return [{"question": " ".join(p.question), "trace": " ".join(p.steps(0, 99)), "answer": p.answer} for p in drawn]
