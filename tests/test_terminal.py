"""Progress of long work: a bar on a terminal, lines elsewhere."""

import subprocess
import sys

from recurrent_depth import terminal
from terminals import shown_on_terminal

WORK = """
from recurrent_depth.terminal import progress
with progress("stones", 3) as advance:
    for _ in range(3):
        advance()
"""


def test_progress_prints_lines_without_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(terminal, "LINE_SECONDS", 0.0)
    with terminal.progress("stones", 3) as advance:
        for _ in range(3):
            advance()
    assert capsys.readouterr().err.splitlines() == ["stones: 1 of 3", "stones: 2 of 3", "stones: 3 of 3"]


def test_progress_is_silent_for_short_work_without_a_terminal():
    done = subprocess.run([sys.executable, "-c", WORK], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_progress_shows_a_bar_on_a_terminal():
    shown = shown_on_terminal(WORK)
    assert b"stones" in shown
    assert b"3/3" in shown


def test_stage_prints_a_line_without_a_terminal_and_a_moving_sign_on_one(capsys):
    with terminal.stage("reading stones"):
        pass
    assert capsys.readouterr().err == "reading stones\n"
    shown = shown_on_terminal(
        "import time\nfrom recurrent_depth.terminal import stage\nwith stage('reading stones'):\n    time.sleep(0.3)\n"
    )
    assert b"reading stones" in shown
    assert b"0:00:00" in shown
