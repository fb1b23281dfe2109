"""Generation from token ids: the decoder, its modes, the cache, exit rules, thinking budgets."""
