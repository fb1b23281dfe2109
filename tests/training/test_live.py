"""The live view of a run on a terminal, and plain lines elsewhere."""

import io

from rich.console import Console

from recurrent_depth.training.live import LiveView
from terminals import shown_on_terminal

TRAIN = {
    "type": "train", "loss": 1.25, "gradient_norm": 0.5, "lr": 2e-3, "num_steps": 9, "tokens_per_second": 12345.0,
    "mfu": 0.413, "peak_memory_bytes": 2.5e9, "eta_seconds": 3700.0,
}  # fmt: skip
VALIDATION = {"type": "validation", "loss_1": 2.0, "loss_16": 1.5, "loss_one_step": 2.0, "warnings": ["[collapsed]"]}


def text_of(view):
    console = Console(file=io.StringIO(), width=120)
    console.print(view.render())
    return console.file.getvalue()


def test_live_view_shows_the_newest_numbers():
    view = LiveView(Console(file=io.StringIO()), 20, 100)
    try:
        assert "20/100" in text_of(view)
        view.add(30, TRAIN)
        view.add(30, VALIDATION)
        view.add(40, {**TRAIN, "loss": 1.125})
        view.add(40, {"type": "rewind"})
    finally:
        view.stop()
    text = text_of(view)
    for part in ("40/100", "1.1250", "0.50", "2.00e-03", "12,345", "41.3%", "2.50 GB", "1:01:40", "at step 30"):
        assert part in text
    lines = text.splitlines()
    head = next(line for line in lines if "r=16" in line)
    assert lines[lines.index(head) + 1].split() == ["2.0000", "1.5000"]
    assert head.split() == ["r=1", "r=16"]
    assert "[collapsed]" in text


RUN = """
import sys
from pathlib import Path
from recurrent_depth.training.launch import train
from support import small_run
train(small_run(Path(sys.argv[1])))
"""


def test_training_shows_the_live_view_on_a_terminal(tmp_path):
    shown = shown_on_terminal(RUN, str(tmp_path / "run"))
    for part in (b"12/12", b"gradient", b"by iterations", b"r=4"):
        assert part in shown
