"""Checks the Triton kernels against float64 on a GPU, then times them.

    PYTHONPATH=.:kernels python benchmarks/gpu.py check    every shipped configuration
    PYTHONPATH=.:kernels python benchmarks/gpu.py time     MoM's shape and its peers'
    PYTHONPATH=.:kernels python benchmarks/gpu.py profile  where MoM's shape spends it
    PYTHONPATH=.:kernels python benchmarks/gpu.py layer    MoMLayer
    PYTHONPATH=.:kernels python benchmarks/gpu.py model    a language model of 24 layers
    PYTHONPATH=.:kernels python benchmarks/gpu.py          all of these

`check` spreads over worker processes, since compilation takes most of its time; it
ends with a non-zero status if an error is above its limit. The others have
flash-linear-attention and FlashQLA beside, where they are installed (`gpu_peers.py`);
`--shapes packed` times one shape alone, `--parts train` a part of the model. Only
`layer` and `model` need Keras.
"""

import argparse
import sys

import torch
from gpu_checks import run_checks
from gpu_scan import run_profile, run_timings, shapes


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    steps = ("check", "time", "profile", "layer", "model")
    parser.add_argument("what", choices=steps, nargs="*", default=steps)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--first", type=int, default=0, help="job to check first")
    parts = ("train", "decode")
    parser.add_argument("--parts", nargs="*", choices=parts, default=parts)
    parser.add_argument("--shapes", nargs="*", choices=tuple(shapes()), default=())
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("This needs a GPU.")
    failed = 0
    if "check" in arguments.what:
        failed = run_checks(arguments.workers, arguments.first)
    if "time" in arguments.what:
        run_timings(arguments.shapes)
    if "profile" in arguments.what:
        run_profile()
    if "layer" in arguments.what:
        from gpu_layer import run_layer

        run_layer()
    if "model" in arguments.what:
        from gpu_layer import run_model

        run_model(arguments.parts)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
