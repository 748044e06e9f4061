"""Time and memory of a token's generation, behind more and more text.

    KERAS_BACKEND=jax python benchmarks/decode_cpu.py

A language model reads a prompt of each length, in pieces, and goes on from it through
`MoMCausalLM.stream`. Nothing that it holds grows with the prompt, unless the model is
a hybrid: `--attention-layers 1` shows what attention adds, and `--sliding-window 256`
what bounds it again. Set OMP_NUM_THREADS (and TF_NUM_INTRAOP_THREADS) to say how many
cores are used.
"""

import argparse
import gc
import os
import pathlib
import time

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np

import keras_mom

VOCABULARY = 256
# Tokens before those that are timed: a program is compiled for the first of them.
SKIPPED = 5
MEBIBYTE = 2**20


def memory(field):
    """`VmRSS` or `VmHWM` (its peak) of this process, in bytes; Linux."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def reset_peak():
    gc.collect()
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def state_bytes(lm, length):
    cache = lm.backbone.get_initial_cache(1, length)
    return sum(
        int(np.prod(x.shape)) * keras.ops.convert_to_numpy(x).itemsize
        for x in keras.tree.flatten(cache)
    )


def measure(lm, context, tokens, rng):
    """Reads `context` tokens and times `tokens` more."""
    prompt = rng.integers(0, VOCABULARY, size=context).astype("int32")
    length = context + SKIPPED + tokens
    reset_peak()
    before = memory("VmRSS")
    start = time.perf_counter()
    stream = lm.stream(prompt, length, sampler="random", seed=0)
    next(stream)
    read = time.perf_counter() - start
    times = []
    for _ in range(SKIPPED + tokens - 1):
        start = time.perf_counter()
        next(stream)
        times.append(time.perf_counter() - start)
    times = np.array(times[SKIPPED - 1 :]) * 1e3
    gc.collect()
    return {
        "context": f"{context:,}",
        "state KiB": f"{state_bytes(lm, length) / 1024:,.0f}",
        "ms a token": f"{np.median(times):.2f}",
        "quartiles": "{:.2f}-{:.2f}".format(*np.percentile(times, [25, 75])),
        "RSS growth MiB": f"{(memory('VmRSS') - before) / MEBIBYTE:.1f}",
        "peak growth MiB": f"{(memory('VmHWM') - before) / MEBIBYTE:.1f}",
        "reading s": f"{read:.1f}",
    }


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 16384, 65536])
    parser.add_argument("--tokens", type=int, default=100, help="tokens to time")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--attention-layers", type=int, nargs="*", default=[])
    parser.add_argument("--sliding-window", type=int, default=None)
    arguments = parser.parse_args()
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    backbone = keras_mom.models.MoMBackbone(
        VOCABULARY,
        arguments.layers,
        arguments.width,
        num_heads=4,
        key_dim=arguments.width // 4,
        attention_layers=arguments.attention_layers,
        sliding_window=arguments.sliding_window,
    )
    lm = keras_mom.models.MoMCausalLM(backbone)
    print(
        f"Keras {keras.__version__} on {keras.config.backend()}, "
        f"{os.environ.get('OMP_NUM_THREADS', 'all')} thread(s); "
        f"{lm.count_params():,} parameters in {arguments.layers} layers, batch 1"
    )
    # What is compiled or allocated once is so before anything is measured.
    measure(lm, min(arguments.contexts), 10, rng)
    rows = [
        measure(lm, context, arguments.tokens, rng) for context in arguments.contexts
    ]
    widths = [max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]]
    for cells in [rows[0], *[row.values() for row in rows]]:
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths)))


if __name__ == "__main__":
    main()
