"""Tiny random dense models of transformers, one per supported architecture, saved as folders with a tokenizer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 96
LAYERS = 6
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
_YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32}

DENSE: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"head_dim": 12, "tie_word_embeddings": True}),
    "llama3": (LlamaForCausalLM, LlamaConfig, {"head_dim": 12, "rope_parameters": _LLAMA3}),
    "llama_wide_heads": (LlamaForCausalLM, LlamaConfig, {"head_dim": 32, "num_key_value_heads": 4}),
    "llama_linear": (
        LlamaForCausalLM,
        LlamaConfig,
        {"head_dim": 12, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "mistral": (MistralForCausalLM, MistralConfig, {"head_dim": 12, "sliding_window": None}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2_yarn": (Qwen2ForCausalLM, Qwen2Config, {"rope_parameters": _YARN}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
    "olmo2": (Olmo2ForCausalLM, Olmo2Config, {}),
}
"""Class, configuration class and fields by name."""


def dense_model(name: str, seed: int = 0, **fields: Any) -> Any:
    """Return a random dense model in evaluation mode, whose norms and biases differ from their initial values."""
    model_class, config_class, own = DENSE[name]
    torch.manual_seed(seed)
    try:
        config = config_class(**_SHAPE | own | fields)
    except StrictDataclassFieldValidationError as error:  # transformers 5.4 accepts only an int as a boolean of OLMo-2
        pytest.skip(f"{config_class.__name__} of this transformers refuses its own fields: {error}")
    model = model_class(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.copy_(1 + 0.2 * torch.randn_like(p))
            elif name.endswith("bias"):
                p.copy_(0.3 * torch.randn_like(p))
            else:
                p.mul_(4)  # so that the layers change the hidden states
    return model


def dense_folder(folder: Path, name: str, **fields: Any) -> Path:
    """Write a dense model and a tokenizer of single characters; return the folder."""
    dense_model(name, **fields).save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "?": 3, **{chr(32 + i): 4 + i for i in range(31)}}
    words |= {chr(97 + i): 40 + i for i in range(26)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="?"
    )
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    fast.save_pretrained(folder)
    return folder
