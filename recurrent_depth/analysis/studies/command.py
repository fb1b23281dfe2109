"""`recurrent-depth study`: one study of depth."""

from pathlib import Path

from recurrent_depth.analysis.studies.config import StudyConfig
from recurrent_depth.files import atomic_folder, check_new_folder


def study(config: StudyConfig) -> None:
    """Run the study that is given and write its folder."""
    check_new_folder(config.out)
    with atomic_folder(config.out) as folder:
        _run(config, folder)


def _run(config: StudyConfig, folder: Path) -> None:
    if config.depths is not None:
        from recurrent_depth.analysis.studies.depths import study_depths

        return study_depths(config.depths, folder)
    if config.fewshot is not None:
        from recurrent_depth.analysis.studies.fewshot import study_fewshot

        return study_fewshot(config.fewshot, folder, config.device, config.dtype)
    section = config.categories or config.loss
    assert section is not None
    from recurrent_depth.devices import choose_device, choose_dtype
    from recurrent_depth.hf import RecurrentDepthForCausalLM
    from recurrent_depth.hf.loading import load_model

    device = choose_device(config.device)
    model, tokenizer = load_model(section.model, choose_dtype(config.dtype, device), device)
    if not isinstance(model, RecurrentDepthForCausalLM):
        raise ValueError(f"model: {section.model} is a {type(model).__name__}; give a recurrent-depth model")
    if config.categories is not None:
        from recurrent_depth.analysis.studies.categories import study_categories

        return study_categories(config.categories, folder, model, tokenizer)
    from recurrent_depth.analysis.studies.loss import study_loss

    assert config.loss is not None
    return study_loss(config.loss, folder, model, tokenizer)
