"""The chat format of Huginn, as a template for transformers."""

CHAT_TEMPLATE = (
    "<|begin_text|>"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<|begin_header|>Huginn<|end_header|>\n\n"
    "{% generation %}{{ message['content'] | trim }}<|end_turn|>{% endgeneration %}"
    "{% else %}"
    "<|begin_header|>{{ message['role'] }}<|end_header|>\n\n{{ message['content'] | trim }}<|end_turn|>"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|begin_header|>Huginn<|end_header|>\n\n{% endif %}"
)
"""`<|begin_text|>` once, then a header, two newlines, the trimmed text and `<|end_turn|>` a message."""

CHAT_TOKENS = ("<|begin_text|>", "<|begin_header|>", "<|end_header|>", "<|end_turn|>")
"""What a tokenizer must hold for the template to work."""
