"""Evaluation over test-time steps."""

from recurrent_depth.evaluation.sweep import EvalConfig, evaluate

__all__ = ["EvalConfig", "evaluate"]
