"""What a program shows on a terminal."""

import os
import pty
import subprocess
import sys


def shown_on_terminal(code: str, *arguments: str) -> bytes:
    """Run Python code whose stderr is a terminal of 120 columns; return what it showed there."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 1024):
            shown += part
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert process.wait() == 0
    return shown
