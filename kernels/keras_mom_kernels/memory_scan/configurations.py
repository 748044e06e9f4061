"""Block sizes, warps and stages of the Triton kernels, by shape and chip.

Chosen by hand and by the compiler's register counts; nothing is tuned at run time.
"""

from typing import NamedTuple

# C, the rows of a chunk.
CHUNK_SIZE = 64
# Programs that keep a chip busy, and the fewest chunks of a split.
_BUSY = 256
_SHORTEST_SPLIT = 8


class Launch(NamedTuple):
    """How a kernel is launched.

    Attributes:
        block_k: key channels a program takes at a time, a power of two.
        block_v: value channels a program takes at a time, a power of two.
        warps: warps of a program.
        stages: stages of the loads of its loop.
        registers: the most of a thread, on an NVIDIA GPU; None for as many as it takes.
    """

    block_k: int
    block_v: int
    warps: int
    stages: int
    registers: int | None = None


class Configuration(NamedTuple):
    """Of all kernels of a call.

    Attributes:
        precision: how products are computed: `"bf16"`, or on float32 operands
            `"tf32"`, `"tf32x3"` or `"ieee"`.
        split: whether float32 operands of bf16 products go in two parts, which keeps
            the outputs of strongly correlated keys within 5e-3.
        exact: precision of the products of `solve_pairs`, on blocks of 16.
        level: precision of the products of rows decayed by channel.
        pairs: of `pair_rows`.
        solve: of `solve_pairs`.
        scan: of `scan_chunks`.
        states: of `scan_chunks` in the backward pass.
        reverse: of `scan_gradients`.
        gradients: of `row_gradients`, and of the like for channels.
        solve_gradients: of `solve_gradients`.
        levels: of `decay_rows` and `level_gradients`.
        join: of `join_splits`; its `block_k` are the rows it takes at a time.
    """

    precision: str
    split: bool
    exact: str
    level: str
    pairs: Launch
    solve: Launch
    scan: Launch
    states: Launch
    reverse: Launch
    gradients: Launch
    solve_gradients: Launch
    levels: Launch
    join: Launch


def configuration(
    key_dim, value_dim, dtype, decay, exclusive=False, target="cuda", capability=90
):
    """The configuration of a call.

    Args:
        key_dim, value_dim: K and V.
        dtype: `"bfloat16"`, `"float16"` or `"float32"`, of query, key and value;
            `"float32"` for mixed ones.
        decay: `"none"`, `"head"` or `"channel"`.
        exclusive: whether the delta rule erases before the decay.
        target: `"cuda"` or `"hip"`.
        capability: of the GPU, such as 80 or 90; counts for `"cuda"` only.
    """
    channel = decay == "channel"
    # Of correlated keys and 256 channels, bfloat16 products are 1.005e-2 off in the
    # gradient of the values, where 1e-2 is promised.
    exact_enough = not (channel and exclusive and max(key_dim, value_dim) > 128)
    if dtype == "bfloat16" and exact_enough:
        precision = "bf16"
    elif target != "cuda" or capability < 90:
        # AMD has no tf32x3, and on sm_80 it is slow.
        precision = "ieee"
    else:
        precision = "tf32x3" if dtype == "float32" else "tf32"
    half = precision == "bf16"
    # Not fewer channels: ptxas 12.8 miscompiles such products for sm_90.
    least = 64 if half else 32
    wide_k = max(least, power_of_two(key_dim))
    wide_v = max(least, power_of_two(value_dim))
    narrow = min(wide_v, 32)
    warps = 4 if wide_k <= 128 else 8
    if half:
        pairs = Launch(min(wide_k, 64 if channel else 128), 0, 8 if channel else 4, 1)
        stages = 2 if wide_k <= 128 else 1
        scan = states = Launch(wide_k, 64, warps, stages)
        reverse = Launch(wide_k, 64, warps, 1)
        solve = Launch(0, 0, 1, 1, 160)
        gradients = Launch(min(wide_k, 64), 64, *((8, 1) if channel else (4, 2)))
        solve_gradients = Launch(min(wide_k, 128), 64, 4, 1)
    else:
        pairs = Launch(min(wide_k, 32), 0, 4, 1)
        scan = states = reverse = Launch(wide_k, narrow, 8, 1)
        solve = Launch(0, 0, 1, 1)
        gradients = solve_gradients = Launch(min(wide_k, 32), narrow, 8, 1)
    # ptxas 12.8 miscompiles `level_gradients` of 32 channels for bfloat16 on sm_90,
    # with 8 warps or 4 according to `exclusive`; ptxas 13.0 does not.
    levels = Launch(64 if half else 32, 0, 8, 1)
    exact = "tf32x3" if target == "cuda" and capability >= 90 else "ieee"
    level = precision
    if half:
        # Rounded to bfloat16, pairs of correlated keys would differ too much.
        level = "tf32" if target == "cuda" else "ieee"
    return Configuration(
        precision,
        half,
        exact,
        level,
        pairs,
        solve,
        scan,
        states,
        reverse,
        gradients,
        solve_gradients,
        levels,
        Launch(16 if wide_k > 128 else 32, 16, 4, 1),
    )


def split_length(chunks, segments, programs):
    """Chunks of a split of long segments, or None if they are scanned whole.

    Splitting triples what is computed, so it has to fill a chip that was mostly idle.

    Args:
        chunks, segments: of a call.
        programs: that scan one segment, one a head and block of value channels.
    """
    wanted = _BUSY // programs
    length = max(_SHORTEST_SPLIT, -(-chunks // max(wanted, 1)))
    if 4 * segments > wanted or chunks < 2 * segments * length:
        return None
    return length


def power_of_two(size):
    """The least power of two that is at least `size` and 16, what a product takes."""
    return max(16, 1 << (size - 1).bit_length())
