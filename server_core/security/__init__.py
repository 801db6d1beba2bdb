"""Tokens, keys and certificates."""
