"""The short convolution of packed rows: reference, shapes, Triton kernels, torch."""
