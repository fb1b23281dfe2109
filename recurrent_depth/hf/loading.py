"""A model and its tokenizer from whatever a user names: a run, a checkpoint, an export, a hub name."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from recurrent_depth.hf import RecurrentDepthConfig, RecurrentDepthForCausalLM
from recurrent_depth.hf.chat import CHAT_TEMPLATE, CHAT_TOKENS
from recurrent_depth.model.config import Kernels
from recurrent_depth.model.transformer import RecurrentDepthModel
from recurrent_depth.runs import is_run, load_run_model, run_tokenizer


def load_model(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    kernels: Kernels = "auto",
) -> tuple[RecurrentDepthForCausalLM, Any]:
    """Model (in evaluation mode) and tokenizer (None where the folder has none)."""
    if is_run(path):
        model = wrap(load_run_model(path))
        tokenizer = _fast_tokenizer(run_tokenizer(path))
    else:
        model = AutoModelForCausalLM.from_pretrained(str(path), dtype=dtype or torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(str(path)) if _has_tokenizer(path) else None
    model = model.to(device=device, dtype=dtype).eval()
    if isinstance(model, RecurrentDepthForCausalLM):  # difficulty of questions is measured with any model
        model.set_kernels(kernels)
    return model, tokenizer


def wrap(model: RecurrentDepthModel) -> RecurrentDepthForCausalLM:
    """The transformers class around the very modules of a training model."""
    with torch.device("meta"):
        wrapped = RecurrentDepthForCausalLM(RecurrentDepthConfig.from_model_config(model.config))
    wrapped.transformer, wrapped.lm_head = model.transformer, model.lm_head
    wrapped.register_buffer("freqs_cis", model.freqs_cis)
    return wrapped


def unwrap(model: RecurrentDepthForCausalLM) -> RecurrentDepthModel:
    """The other way: our model around the modules of the transformers class, for `recurrent_depth.generation`."""
    with torch.device("meta"):
        inner = RecurrentDepthModel(model.config.to_model_config())
    inner.transformer, inner.lm_head = model.transformer, model.lm_head
    inner.freqs_cis = model.freqs_cis
    return inner.eval()


def _has_tokenizer(path: str | Path) -> bool:
    return not Path(path).is_dir() or any(Path(path).glob("tokenizer*"))


def _fast_tokenizer(file: Path | None) -> Any:
    if file is None:
        return None
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), clean_up_tokenization_spaces=False)
    known = tokenizer.get_vocab()
    names = {"bos_token": "<|begin_text|>", "eos_token": "<|end_text|>", "pad_token": "<|pad|>"}
    tokenizer.add_special_tokens({role: token for role, token in names.items() if token in known})
    if all(token in known for token in CHAT_TOKENS):
        tokenizer.chat_template = CHAT_TEMPLATE
    if tokenizer.eos_token is None:  # generated tasks have padding only; lm-eval wants an end of text
        tokenizer.eos_token = tokenizer.pad_token
    return tokenizer
