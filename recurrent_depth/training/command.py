"""`recurrent-depth train` and train.py."""

from recurrent_depth.training.config import TrainCommand, as_yaml
from recurrent_depth.training.launch import train


def run(command: TrainCommand) -> None:
    """Train as the command says."""
    config = command.run_config()
    if command.dry_run:
        print(as_yaml(config))
    else:
        train(config, resume=command.resume, accept_changed_data=command.accept_changed_data)
