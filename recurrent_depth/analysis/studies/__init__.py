"""Depth studies: what iterations buy, by model, task, category and position."""
