"""Generated tasks whose difficulty is known."""
