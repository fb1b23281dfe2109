"""Transformers that reason by iterating a core block in latent space."""
