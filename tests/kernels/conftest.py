"""Triton kernels run in its interpreter where there is no GPU."""

import os

import torch

if not torch.cuda.is_available():
    # Read when triton is first imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")
