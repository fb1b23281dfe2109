"""`recurrent-depth train` and train.py."""

import dataclasses
from dataclasses import dataclass

from recurrent_depth.training.launch import train
from recurrent_depth.training.run import RunConfig, as_yaml


@dataclass(frozen=True, kw_only=True)
class TrainCommand(RunConfig):
    """Pretrain or fine-tune a recurrent-depth model.

    Args:
        resume: continue from the newest checkpoint in `out`, or start if there is none.
        accept_changed_data: resume although the data set has changed.
        dry_run: print the resolved configuration and stop.
    """

    resume: bool = False
    accept_changed_data: bool = False
    dry_run: bool = False

    def run_config(self) -> RunConfig:
        names = [field.name for field in dataclasses.fields(RunConfig)]
        return RunConfig(**{name: getattr(self, name) for name in names})


def run(command: TrainCommand) -> None:
    """Train as the command says."""
    config = command.run_config()
    if command.dry_run:
        print(as_yaml(config))
    else:
        train(config, resume=command.resume, accept_changed_data=command.accept_changed_data)
