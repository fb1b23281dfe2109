"""A worker of torchrun that kills itself: `elastic_run.py OUT '[["backward", 5, 1], ...]'`, one kill per attempt.

Attempt n (torchrun counts restarts) dies in the given call of the phase, on the given rank.
"""

import json
import os
import sys
from pathlib import Path

from kills import plant_kill
from recurrent_depth.training.launch import train
from support import small_run

if __name__ == "__main__":
    out, plan = Path(sys.argv[1]), json.loads(sys.argv[2])
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if attempt < len(plan):
        plant_kill(*plan[attempt])
    with (out / f"attempts-{os.environ['RANK']}.txt").open("a") as file:
        file.write(f"{attempt}\n")
    train(small_run(out / "run"))
