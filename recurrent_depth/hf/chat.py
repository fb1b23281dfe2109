"""The chat format of Huginn: the chat template for transformers, and the tokens that end an answer."""

from typing import Any

from recurrent_depth.data.chat import CHAT_TEMPLATE, CHAT_TOKENS  # noqa: F401

END_TOKENS = ("<|end_turn|>", "<|end_text|>")
"""Tokens that end a turn or a document. Generation stops at them."""


def stop_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Return the ids that end generation, from the model's generation config and from the tokenizer.

    Args:
        model: a transformers model, or None.
        tokenizer: a transformers tokenizer, or None.
    """
    given = None if model is None else model.generation_config.eos_token_id
    ids = {given} if isinstance(given, int) else set(given or ())
    if tokenizer is not None:
        vocabulary = tokenizer.get_vocab()
        ids |= {vocabulary[token] for token in END_TOKENS if token in vocabulary}
        ids |= {tokenizer.eos_token_id} - {None}
    return tuple(sorted(ids))


def set_generation_tokens(model: Any, tokenizer: Any) -> None:
    """Set eos, bos and pad ids of a model and its tokenizer, and the maximum length of the tokenizer.

    `generate()` then stops at the end of a turn. Ids that are already in the generation config are kept.
    """
    if tokenizer is None or getattr(model, "generation_config", None) is None:
        return
    config = model.generation_config
    ends = stop_ids(model, tokenizer)
    config.eos_token_id = list(ends) or None
    config._from_model_config = False  # otherwise transformers 4 derives it from config.json again
    if config.bos_token_id is None:
        config.bos_token_id = tokenizer.bos_token_id
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    tokenizer.model_max_length = min(tokenizer.model_max_length, model.config.max_position_embeddings)
