"""Small reasoning sets: curation of (question, reasoning trace, answer) rows."""
