"""Evaluation over test-time iterations: lm-eval tasks, generated tasks, thinking budgets; tables and the report."""
