"""An OpenAI-compatible server for recurrent-depth models, a chat on the terminal, and text from prompts.

The protocol, its limits and its errors (protocol.py, guard.py, app.py) know nothing of how tokens are made; engine.py
is the part that another engine replaces.
"""
