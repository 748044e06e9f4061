"""Bits per byte of test text, and how they change with the length that is read."""

import math

import numpy as np
from lm_text import whole_windows, window_ends, windows_before


def bits_of_bytes(lm, windows, batch):
    """Bits of every byte but the first of each window: float32 `[n, T - 1]`.

    All batches have the same shape, so that a length is compiled once.
    """
    missing = -len(windows) % batch
    rows = np.concatenate([windows, np.repeat(windows[:1], missing, axis=0)])
    scores = lm.score(rows, batch_size=batch)[: len(windows), 1:]
    return -scores / math.log(2)


def measure(lm, text, length, multiples, batch, limit, windows):
    """What is measured of a trained model, as lines of the results.

    - `held out`: test text in windows of the training length.
    - `last`: the bytes of the windows of the training length, but read in windows of
      all lengths that end at the same places. The same bytes are told in each.
    - `window`: all bytes of these windows.
    - `position`: bytes of the longest windows by place, from the length before to this.

    Args:
        lm: `keras_mom.models.MoMCausalLM`.
        text: `lm_text.Text`.
        length: training length.
        multiples: multiples of it, ascending, the first of them 1.
        batch: of windows of the training length.
        limit: how many bytes of the text are read for the first one.
        windows: how many, at most, for the others.
    """

    def line(name, context, bits):
        mean = float(np.mean(bits, dtype="float64"))
        return dict(
            measure=name,
            context=context,
            predicted=bits.size,
            bits_per_byte=f"{mean:.5f}",
        )

    whole = whole_windows(text, length, limit)
    lines = [line("held out", length, bits_of_bytes(lm, whole, batch))]
    longest = multiples[-1] * length
    ends, in_files = window_ends(text, longest, length, windows)
    if not len(ends):
        return lines
    print(
        f"    {len(ends)} windows of up to {longest:,} bytes, "
        + ("each in one file" if in_files else "across files"),
        flush=True,
    )
    bits = np.zeros((len(ends), 0), "float32")
    for multiple in multiples:
        context = multiple * length
        # Softmax attention takes room for a square of the length.
        rows = batch if multiple == 1 else max(1, multiples[-1] // multiple)
        bits = bits_of_bytes(lm, windows_before(text, ends, context), rows)
        lines.append(line("last", context, bits[:, -(length - 1) :]))
        lines.append(line("window", context, bits))
    start = 0
    for multiple in multiples:
        end = multiple * length - 1  # the first byte is not predicted
        lines.append(line("position", multiple * length, bits[:, start:end]))
        start = end
    return lines
