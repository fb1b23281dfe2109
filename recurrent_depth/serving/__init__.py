"""An OpenAI-compatible server and a chat on the terminal, by way of transformers' own."""
