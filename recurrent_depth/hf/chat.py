"""The chat format of Huginn, as a template for transformers."""

from recurrent_depth.data.chat import CHAT_TEMPLATE, CHAT_TOKENS

__all__ = ["CHAT_TEMPLATE", "CHAT_TOKENS"]
