"""Projections of the packed tokens, each through its own memory's matrix."""
