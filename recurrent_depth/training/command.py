"""`recurrent-depth train` and train.py."""

from importlib.util import find_spec

from recurrent_depth.hub import check_folder_or_hub_name
from recurrent_depth.runs import is_run
from recurrent_depth.training.config import TrainCommand, as_yaml
from recurrent_depth.training.launch import train


def run(command: TrainCommand) -> None:
    """Train as the command says."""
    config = command.run_config()
    if command.dry_run:
        print(as_yaml(config))
        return
    if config.init_from is not None and not is_run(config.init_from):
        check_folder_or_hub_name(config.init_from, "init_from")
        if find_spec("transformers") is None:  # before the model is built
            raise ModuleNotFoundError("init_from reads a Hugging Face folder", name="transformers")
    train(config, resume=command.resume, accept_changed_data=command.accept_changed_data)
