"""Stage `healing`: the converted SmolLM2-135M trains on real text, beside its dense controls (benchmarks/healing.py).

It needs lm-eval, and the model and the text of `make real` in build/real; without these it is skipped.
"""

from pathlib import Path
from typing import Any

from benchmarks.gpu.stage import Stage

MODEL = Path(__file__).parents[2] / "build" / "real" / "smollm2-135m"


def run(stage: Stage) -> None:
    stage.measure("SmolLM2-135M, 300 training steps", healed, stage)


def healed(stage: Stage) -> dict[str, Any]:
    """Return the losses and accuracies before and after. What is finished is kept beside the file of the stage."""
    if stage.toy or not MODEL.is_dir():
        return {"skipped": "toy size" if stage.toy else f"{MODEL} does not exist; run make real"}
    from benchmarks.healing import heal, parser  # imports lm-eval

    size = ["--steps", "300", "--batch", "16", "--tokens", "512", "--questions", "200"]
    return heal(parser().parse_args([*size, "--device", "cuda", "--keep", str(stage.path.parent / "healing")]))
