"""What the analysis in tests/analysis/conftest.py is of."""

TEXTS = ["the quick brown fox", "how many apples are there? there are 7"]
STEPS, CONVERGED = 12, 24
