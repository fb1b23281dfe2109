"""`recurrent-depth train` and train.py."""

from recurrent_depth.hub import check_folder_or_hub_name
from recurrent_depth.training.config import TrainCommand, as_yaml
from recurrent_depth.training.launch import train


def run(command: TrainCommand) -> None:
    """Train as the command says."""
    config = command.run_config()
    if command.dry_run:
        print(as_yaml(config))
        return
    if config.init_from is not None:
        check_folder_or_hub_name(config.init_from, "init_from")
    train(config, resume=command.resume, accept_changed_data=command.accept_changed_data)
