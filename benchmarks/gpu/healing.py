"""Stage `healing`: the converted SmolLM2-135M trains on real text, beside its dense controls (benchmarks/healing.py).

It needs lm-eval, and the model and the text of `make real` in build/real; without them it waits for a later call.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu.stage import Stage, TimeOver

REAL = Path(__file__).parents[2] / "build" / "real"


def run(stage: Stage) -> None:
    if not stage.toy and not (find_spec("lm_eval") and (REAL / "smollm2-135m").is_dir() and (REAL / "text").is_dir()):
        print(f"healing is skipped: it needs lm-eval and {REAL} (make real)", flush=True)
        raise TimeOver
    stage.measure("SmolLM2-135M, 300 training steps", healed, stage)


def healed(stage: Stage) -> dict[str, Any]:
    """Return losses before and after, and accuracies after. What is finished is kept beside the file of the stage."""
    if stage.toy:
        return {"skipped": "toy size"}
    from benchmarks.healing import heal, options  # imports lm-eval

    size = ["--steps", "300", "--batch", "16", "--tokens", "512", "--questions", "200"]
    return heal(options().parse_args([*size, "--device", "cuda", "--keep", str(stage.path.parent / "healing")]))
