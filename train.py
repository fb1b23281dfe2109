"""torchrun --nproc_per_node N train.py --config configs/pretrain/NAME.yaml [--section.field value ...]"""

import sys

from recurrent_depth.cli import VERBS, run_verb

if __name__ == "__main__":
    sys.exit(run_verb(VERBS["train"], "train.py", sys.argv[1:]))
