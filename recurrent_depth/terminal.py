"""Lines for the user of a command."""

from rich.console import Console


def print_line(text: str) -> None:
    """Print a line to stderr as it is, so that stdout stays free for results."""
    Console(stderr=True, highlight=False).print(text, soft_wrap=True, markup=False)
