"""Mixing of what a token's memories answer, normalized and gated."""
