"""Routing of tokens to memories, and its statistics: reference."""
