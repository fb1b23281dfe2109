"""An OpenAI-compatible server for recurrent-depth models, a chat on the terminal, and `recurrent-depth generate`.

The protocol with its limits and errors (protocol.py, guard.py, app.py) does not depend on the engine that generates
tokens; another engine replaces engine.py.
"""
