"""Compare two answers: numbers, fractions, LaTeX (by the library math-verify), letters of multiple choice.

Imports little, since a separate process runs the comparisons.
"""

import logging
import multiprocessing
import re
from decimal import Decimal
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

_LETTER = re.compile(r"\(?([A-H])\)?\.?")
_LONE_LETTER = re.compile(r"(?<![A-Za-z])\(?([A-H])\)?(?![A-Za-z])")
_LATEX = re.compile(r"[\\^_{}]|[A-Za-z]")
_NUMBER = re.compile(r"-?\$?(?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d+)?")
_START_S = 120.0  # of the worker, which imports sympy


def agree(reference: str, attempt: str) -> bool:
    """Return whether the final answer of `attempt` equals the reference. Has no time limit; `Checker` has."""
    letter = _LETTER.fullmatch(final_part(reference))
    if letter is not None:
        return letter.group(1) == _chosen_letter(final_part(attempt))
    from math_verify import verify

    gold = _parsed(final_part(reference))
    return bool(gold) and verify(gold, _parsed(final_part(attempt)), timeout_seconds=None)


def final_part(text: str) -> str:
    """Return what follows the last `####` on its line (GSM8K's mark), or the whole text; the library finds boxes."""
    _, mark, final = text.rpartition("####")
    return final.strip().split("\n")[0].strip() if mark else text.strip()


def _value(number: str) -> Decimal:
    return Decimal(number.replace(",", "").replace("$", ""))


def _chosen_letter(text: str) -> str | None:
    """Return the letter of multiple choice: the whole text, or the first one after the last "answer" or box."""
    whole = _LETTER.fullmatch(text)
    marks = [mark.end() for mark in re.finditer(r"answer|\\boxed|\\text", text, re.IGNORECASE)]
    chosen = whole or (_LONE_LETTER.search(text, marks[-1]) if marks else None)
    return None if chosen is None else chosen.group(1)


def _parsed(text: str) -> list[Any]:
    """Return the expressions in a text: as it is, and as a formula if a short text looks like bare LaTeX or algebra."""
    from math_verify import parse

    bare = len(text) < 200 and "$" not in text and r"\boxed" not in text and _LATEX.search(text)
    formula = parse(f"${text}$", parsing_timeout=None) if bare else []
    return [*formula, *parse(text, parsing_timeout=None)]


class Checker:
    """Compares everything but plain numbers in another process: computer algebra may never end on an odd expression.

    A context manager. A comparison that takes too long is stopped, and the process replaced.

    Args:
        timeout_s: seconds for one comparison.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.process: BaseProcess | None = None

    def __enter__(self) -> "Checker":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def check(self, reference: str, attempt: str) -> tuple[bool | None, str]:
        """Return whether they agree (None if that cannot be decided), and a note."""
        if not attempt.strip():
            return False, "no answer"
        ours, theirs = final_part(reference), final_part(attempt)
        if ours == theirs:
            return True, ""
        if _NUMBER.fullmatch(ours) and _NUMBER.fullmatch(theirs):
            return _value(ours) == _value(theirs), ""
        if self.process is None:
            self._start()
        self.pipe.send((reference, attempt))
        if not self.pipe.poll(self.timeout_s):
            self._stop()
            return None, f"no verdict within {self.timeout_s:g} s"
        try:
            return self.pipe.recv(), ""
        except EOFError:
            self._stop()
            return None, "the comparison crashed"

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_compare_forever, args=(other,), daemon=True)
        self.process.start()
        other.close()
        try:
            started = self.pipe.poll(_START_S) and self.pipe.recv()
        except EOFError:
            started = False
        if not started:
            self._stop()
            raise ValueError("the answer checker did not start; run pip install 'recurrent-depth[curate]'")

    def _stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.pipe.close()
            self.process = None


def _compare_forever(pipe: Connection) -> None:
    """Compare each received (reference, attempt) and send whether they agree; runs in a separate process."""
    import math_verify  # noqa: F401

    logging.disable(logging.WARNING)  # it warns that the caller must handle timeouts; the parent does
    pipe.send(True)
    while True:
        try:
            reference, attempt = pipe.recv()
        except EOFError:
            return
        pipe.send(agree(reference, attempt))
