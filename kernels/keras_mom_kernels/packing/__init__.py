"""Packing of each memory's tokens: reference."""
