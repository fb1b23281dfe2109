"""Messages of a command to its user."""

from rich.console import Console


def print_line(text: str) -> None:
    """Print a line to stderr; stdout is for results."""
    Console(stderr=True, highlight=False).print(text, soft_wrap=True, markup=False)
