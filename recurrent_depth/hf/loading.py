"""Load a model and its tokenizer from a run, a checkpoint, an export, a Hugging Face folder or a hub name.

Weights are read only from safetensors, never from a pickle.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from huggingface_hub import HfApi
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from recurrent_depth.devices import choose_device
from recurrent_depth.hf import RecurrentDepthConfig, RecurrentDepthForCausalLM, quantization
from recurrent_depth.hf.chat import CHAT_TEMPLATE, CHAT_TOKENS, set_generation_tokens
from recurrent_depth.hf.conversion.retrofit import is_retrofit, load_retrofit
from recurrent_depth.hub import check_folder_or_hub_name, in_hub_cache
from recurrent_depth.model.config import Kernels
from recurrent_depth.model.transformer import RecurrentDepthModel
from recurrent_depth.runs import CheckpointError, is_run, load_run_model, run_tokenizer

T = TypeVar("T")
_HUB_SECONDS = 5
_OPTIONAL = re.compile(r"qk_bias$|^freqs_cis$")
"""Tensors that a folder may lack: the bias of q and k (zero then), and the rotary table (computed)."""


class ModelError(ValueError):
    """A model that cannot be loaded; the message names the cause and the fix."""


def load_model(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    kernels: Kernels = "auto",
    quantize: Literal["int8"] | None = None,
) -> tuple[RecurrentDepthForCausalLM, Any]:
    """Return a model in evaluation mode and its tokenizer (None if the folder has none).

    Args:
        path: run folder, checkpoint, export, Hugging Face folder or hub name.
        dtype: dtype of the weights; None: float32.
        device: auto, cpu, cuda or cuda:N.
        kernels: implementation of the element-wise operations: auto, triton, torch.
        quantize: int8: quantise the weights of linear layers (see `recurrent_depth.hf.quantization`).

    Raises:
        ModelError: if the model does not exist or is damaged; the message names the file and the fix.
        CheckpointError: the same for a run.
    """
    chosen = choose_device(str(device))
    if quantize is not None:
        quantization.require_torchao()  # before the weights are read
    model: Any
    if is_run(path):
        inner = _explained(f"{path}: the checkpoint cannot be loaded", lambda: load_run_model(path))
        model, tokenizer = wrap(inner), fast_tokenizer(run_tokenizer(path))
    else:
        options = _where(path)
        model = _load_weights(path, dtype or torch.float32, options)
        tokenizer = _load_tokenizer(path, options, model.config)
    _check_vocabulary(path, model, tokenizer)
    model = model.to(device=chosen, dtype=dtype).eval()
    if isinstance(model, RecurrentDepthForCausalLM):  # dense models are allowed, to measure difficulty with them
        set_generation_tokens(model, tokenizer)
        model.set_kernels(kernels)
    if quantize is not None:
        quantization.quantize(model)
    return model, tokenizer


def wrap(model: RecurrentDepthModel) -> RecurrentDepthForCausalLM:
    """Return the transformers class around the modules of a training model, without a copy."""
    with torch.device("meta"):
        wrapped = RecurrentDepthForCausalLM(RecurrentDepthConfig.from_model_config(model.config))
    wrapped.transformer, wrapped.lm_head = model.transformer, model.lm_head
    wrapped.register_buffer("freqs_cis", model.freqs_cis)
    return wrapped


def fast_tokenizer(file: Path | None) -> Any:
    """Return the transformers tokenizer of a run's tokenizer.json, with its special tokens and chat template.

    These are read from the settings beside it, if there are any; else they are those of `recurrent-depth prepare`.
    """
    if file is None:
        return None
    message = f"{file} is not a tokenizer of the tokenizers library"
    if (file.parent / "tokenizer_config.json").is_file():
        return _explained(message, lambda: PreTrainedTokenizerFast.from_pretrained(file.parent))
    tokenizer: Any = _explained(
        message, lambda: PreTrainedTokenizerFast(tokenizer_file=str(file), clean_up_tokenization_spaces=False)
    )
    known = tokenizer.get_vocab()
    names = {"bos_token": "<|begin_text|>", "eos_token": "<|end_text|>", "pad_token": "<|pad|>"}
    tokenizer.add_special_tokens({role: token for role, token in names.items() if token in known})
    if all(token in known for token in CHAT_TOKENS):
        tokenizer.chat_template = CHAT_TEMPLATE
    if tokenizer.eos_token is None:  # tokenizers of generated tasks have padding only; lm-eval needs an end of text
        tokenizer.eos_token = tokenizer.pad_token
    return tokenizer


def _where(path: str | Path) -> dict[str, Any]:
    """Return the options of `from_pretrained` for a folder or hub name, after checking that it exists.

    One short request shows whether the hub has the model; `from_pretrained` would retry for over a minute.
    """
    name = str(path)
    check_folder_or_hub_name(name)
    if Path(path).is_dir():
        if not (Path(path) / "config.json").is_file():
            raise ModelError(
                f"model: {name} holds neither config.json nor checkpoints; give a run, a checkpoint, an export or a "
                "Hugging Face folder"
            )
        return {"local_files_only": True}
    try:
        HfApi().model_info(name, timeout=_HUB_SECONDS)
    except Exception as error:  # offline, unreachable or unknown: the classes differ between library versions
        if in_hub_cache(name):
            return {"local_files_only": True}
        raise ModelError(
            f"model: no such folder {name!r}, and it cannot be loaded from the hub ({_first_line(error)}); correct "
            "the path or the name"
        ) from error
    return {}


def _load_weights(path: str | Path, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    folder = Path(path)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        pickles = sorted(p.name for kind in ("*.bin", "*.pt", "*.pth") for p in folder.glob(kind))
        found = f"only {', '.join(pickles)}, a pickle, which is never read" if pickles else "none"
        raise ModelError(f"model: {path} holds no weights as .safetensors: {found}. Save the model as safetensors")
    config = _explained(f"model: config.json of {path} cannot be read", lambda: _config_dict(path, options))
    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise ModelError(
            f"model: config.json of {path} has model_type {kind!r}, which neither this package nor transformers knows; "
            f"a recurrent-depth model has {RecurrentDepthConfig.model_type!r}"
        )
    if is_retrofit(config):
        return _explained(f"model: {path} cannot be loaded", lambda: load_retrofit(path, dtype, **options))
    model, info = _explained(
        f"model: {path} cannot be loaded",
        lambda: AutoModelForCausalLM.from_pretrained(
            str(path), dtype=dtype, use_safetensors=True, output_loading_info=True, trust_remote_code=False, **options
        ),
    )
    if isinstance(model, RecurrentDepthForCausalLM):
        missing = sorted(name for name in info["missing_keys"] if not _OPTIONAL.search(name))
        for kind, names in (("lack", missing), ("have, beyond its config.json,", sorted(info["unexpected_keys"]))):
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                raise ModelError(
                    f"model: the weights of {path} {kind} {', '.join(names[:3])}{more}; config.json and weights are of "
                    "different models, take both from one folder"
                )
    return model


def _config_dict(path: str | Path, options: dict[str, Any]) -> dict[str, Any]:
    config = PreTrainedConfig.get_config_dict(str(path), **options)[0]
    if not isinstance(config, dict):
        raise ValueError("it is not a mapping of fields")
    return config


def _load_tokenizer(path: str | Path, options: dict[str, Any], config: PreTrainedConfig) -> Any:
    if Path(path).is_dir() and not any(Path(path).glob("tokenizer*")):
        return None
    return _explained(
        f"model: the tokenizer of {path} cannot be loaded",
        lambda: AutoTokenizer.from_pretrained(str(path), trust_remote_code=False, config=config, **options),
    )


def _check_vocabulary(path: str | Path, model: Any, tokenizer: Any) -> None:
    """Raise if the model has no embedding for some ids of the tokenizer."""
    if tokenizer is None:
        return
    rows, largest = model.get_input_embeddings().weight.shape[0], max(tokenizer.get_vocab().values(), default=0)
    if largest >= rows:
        raise ModelError(
            f"model: the tokenizer of {path} has ids up to {largest}, but the model embeds {rows} tokens; use the "
            "tokenizer the model was trained with"
        )


def _explained(message: str, load: Callable[[], T]) -> T:
    """Return load(); turn an error of the libraries into a ModelError that starts with `message`."""
    try:
        return load()
    except CheckpointError:
        raise
    except Exception as error:  # tokenizers raises bare Exceptions, safetensors its SafetensorError
        raise ModelError(f"{message} ({type(error).__name__}: {_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
