"""Generation: token ids, a model and a cache."""
