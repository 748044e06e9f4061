"""The short convolution: reference."""
