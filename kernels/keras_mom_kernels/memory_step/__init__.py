"""One token into every memory that takes it: reference, cases and kernels."""
