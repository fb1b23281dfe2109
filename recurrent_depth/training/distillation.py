"""Distillation: the loss of a run is mixed with the divergence from a teacher's next-token distribution.

Shapes: B batch, T tokens, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recurrent_depth.data.batch import Batch
from recurrent_depth.extras import require
from recurrent_depth.model.loss import IGNORE_INDEX, to_float32
from recurrent_depth.training.config import DistillationConfig


class Teacher:
    """A frozen model, dense or recurrent, on the device of its process.

    Args:
        vocab_size: rows of the student's head.
    """

    def __init__(self, config: DistillationConfig, vocab_size: int, device: torch.device, dtype: torch.dtype) -> None:
        require("transformers", "recurrent-depth[hf]", "distillation")
        from recurrent_depth.hf.loading import load_model

        self.config = config
        self.model: Any = load_model(config.teacher, dtype, device)[0].requires_grad_(False)
        self.model.config.use_cache = False  # with a cache, transformers ignores the positions of packed rows
        found = self.model.get_output_embeddings().weight.shape[0]
        if found != vocab_size:
            raise ValueError(
                f"distillation.teacher: {config.teacher} predicts {found} tokens, but model.vocab_size is "
                f"{vocab_size}; teacher and student need the same tokenizer"
            )

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return (1 - weight) * cross-entropy + weight * T² * KL(teacher, student), summed over valid targets.

        Both distributions of the divergence are softened by the temperature T.

        Args:
            logits: the student's, [B, T, V].
        """
        valid = batch.targets != IGNORE_INDEX
        logits, targets = to_float32(logits)[valid], batch.targets[valid]  # [N, V], [N]
        hard = F.cross_entropy(logits, targets, reduction="sum")
        if not self.config.weight:
            return hard
        with torch.no_grad():
            teacher = to_float32(self._logits(batch)[valid])
        T = self.config.temperature
        soft = F.kl_div(
            (logits / T).log_softmax(-1), (teacher / T).log_softmax(-1), reduction="sum", log_target=True
        )  # fmt: skip
        return (1 - self.config.weight) * hard + self.config.weight * T**2 * soft

    def _logits(self, batch: Batch) -> Tensor:
        return self.model(input_ids=batch.input_ids, position_ids=batch.position_ids).logits
