"""The kernels of the packed convolution: forward, and the gradient in two steps.

A program works on ROWS packed rows and a group of GROUP channels, a head's if heads
are normalized. The W + 1 rows that an output meets are taken straight from the
inputs; neighbours share all but one of them, which the processor's cache then holds.

`GROUP <= BLOCK`, a power of two; WIDTH is E, TAPS is W + 1.
"""

import triton
import triton.language as tl

from keras_mom_kernels.memory_scan.triton_common import store_rows


@triton.jit
def program_place(rows, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """Batch row, first row and group of channels of a program."""
    # Neighbours take the same rows.
    block = tl.program_id(0) // GROUPS
    blocks = tl.cdiv(rows, ROWS)
    return (
        (block // blocks).to(tl.int64),
        (block % blocks) * ROWS,
        tl.program_id(0) % GROUPS,
    )


@triton.jit
def columns_of(group, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    return group * GROUP + tl.arange(0, BLOCK)


@triton.jit
def tile_mask(
    valid,
    columns,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """`[ROWS, BLOCK]`: valid rows, and channels that the group and the tensor have."""
    mask = tl.broadcast_to(valid[:, None], (ROWS, BLOCK))
    if GROUP < BLOCK:
        mask = mask & (tl.arange(0, BLOCK) < GROUP)[None, :]
    if WIDTH % GROUP:
        mask = mask & (columns < WIDTH)[None, :]
    return mask


@triton.jit
def load_tile(
    x,
    index,
    columns,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """float32 `[ROWS, BLOCK]` of the rows `index` of a batch row; zeros for -1."""
    mask = tile_mask(index >= 0, columns, ROWS, GROUP, BLOCK, WIDTH)
    offsets = row_offsets(index, columns, WIDTH)
    return tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_factors(
    kernel,
    i,
    columns,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """float32 `[1, BLOCK]`, row i of the convolution's kernel."""
    held = (tl.arange(0, BLOCK) < GROUP) & (columns < WIDTH)
    row = tl.load(kernel + i * WIDTH + columns, mask=held, other=0.0)
    return row.to(tl.float32)[None, :]


@triton.jit
def row_offsets(row, columns, WIDTH: tl.constexpr):
    """`[ROWS, BLOCK]`, from the start of a batch row."""
    return row[:, None] * WIDTH + columns[None, :]


@triton.jit
def met_rows(source, documents, own, row, length, DOCUMENTS: tl.constexpr):
    """The row of the inputs in each packed row, -1 if empty or of another document."""
    inside = (row >= 0) & (row < length)
    index = tl.load(source + row, mask=inside, other=-1)
    if DOCUMENTS:
        number = tl.load(documents + row, mask=inside, other=0)
        index = tl.where(number == own, index, -1)
    return index


@triton.jit
def own_documents(documents, row, length, DOCUMENTS: tl.constexpr):
    if DOCUMENTS:
        own = tl.load(documents + row, mask=(row >= 0) & (row < length), other=0)
    else:
        own = row
    return own


@triton.jit
def load_taps(
    inputs,
    source,
    documents,
    row,
    length,
    columns,
    DOCUMENTS: tl.constexpr,
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A tuple of float32 `[ROWS, BLOCK]`: what each row of the kernel meets."""
    own = own_documents(documents, row, length, DOCUMENTS)
    taps = ()
    for i in tl.static_range(TAPS):
        met = row - (TAPS - 1) + i
        index = met_rows(source, documents, own, met, length, DOCUMENTS)
        taps += (load_tile(inputs, index, columns, ROWS, GROUP, BLOCK, WIDTH),)
    return taps


@triton.jit
def tap_sums(
    inputs,
    taps,
    kernel,
    source,
    row,
    length,
    columns,
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """float32 `[ROWS, BLOCK]`: the convolution; the inputs' rows where TAPS is 0."""
    if TAPS == 0:
        index = met_rows(source, source, row, row, length, False)
        total = load_tile(inputs, index, columns, ROWS, GROUP, BLOCK, WIDTH)
    else:
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        for i in tl.static_range(TAPS):
            factors = load_factors(kernel, i, columns, GROUP, BLOCK, WIDTH)
            total += taps[i] * factors
    return total


@triton.jit
def convolve_rows(
    inputs,
    kernel,
    source,
    documents,
    output,
    length,
    rows,
    epsilon,
    DOCUMENTS: tl.constexpr,
    TAPS: tl.constexpr,
    SILU: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Output `[B, R, E]`: R is `rows`, the inputs of a batch row are `length`."""
    batch, first, group = program_place(rows, ROWS, GROUPS)
    columns = columns_of(group, GROUP, BLOCK)
    row = first + tl.arange(0, ROWS)
    inputs += batch * length * WIDTH
    source += batch * rows
    if DOCUMENTS:
        documents += batch * rows
    taps = load_taps(
        inputs,
        source,
        documents,
        row,
        rows,
        columns,
        DOCUMENTS,
        TAPS,
        ROWS,
        GROUP,
        BLOCK,
        WIDTH,
    )
    total = tap_sums(
        inputs,
        taps,
        kernel,
        source,
        row,
        rows,
        columns,
        TAPS,
        ROWS,
        GROUP,
        BLOCK,
        WIDTH,
    )
    if SILU:
        total = total * tl.sigmoid(total)
    if NORMALIZE:
        # Channels behind the head's are zeros.
        squares = tl.sum(total * total, axis=1)
        total = total * tl.rsqrt(squares + epsilon)[:, None]
    # Empty rows are zeros, whatever the rows before them hold.
    filled = tl.load(source + row, mask=row < rows, other=-1) >= 0
    total = tl.where(filled[:, None], total, 0.0)
    mask = tile_mask(row < rows, columns, ROWS, GROUP, BLOCK, WIDTH)
    output += batch * rows * WIDTH
    store_rows(output, row_offsets(row, columns, WIDTH), mask, total)


@triton.jit
def through_activation(
    grad, total, epsilon, SILU: tl.constexpr, NORMALIZE: tl.constexpr
):
    """The gradient of the sums `total`, `[ROWS, BLOCK]`, from that of the output."""
    activated, slope = total, 1.0
    if SILU:
        gate = tl.sigmoid(total)
        activated = total * gate
        slope = gate + activated * (1 - gate)
    if NORMALIZE:
        scale = tl.rsqrt(tl.sum(activated * activated, axis=1) + epsilon)
        along = tl.sum(activated * grad, axis=1) * (scale * scale)
        grad = (grad - activated * along[:, None]) * scale[:, None]
    return grad * slope


@triton.jit
def row_gradients(
    output_grad,
    inputs,
    kernel,
    source,
    documents,
    sum_grads,
    partials,
    length,
    rows,
    epsilon,
    DOCUMENTS: tl.constexpr,
    TAPS: tl.constexpr,
    SILU: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    STEPS: tl.constexpr,
):
    """The gradients of the sums, `[B, R, E]`, and a share of the kernel's.

    Empty rows have none, whatever their output's gradient holds. A program takes STEPS
    times ROWS rows. `partials` is float32 `[programs of a group, TAPS, E]`.
    """
    batch, first, group = program_place(rows, ROWS * STEPS, GROUPS)
    columns = columns_of(group, GROUP, BLOCK)
    inputs += batch * length * WIDTH
    source += batch * rows
    output_grad += batch * rows * WIDTH
    sum_grads += batch * rows * WIDTH
    if DOCUMENTS:
        documents += batch * rows
    shares = ()
    for _ in tl.static_range(TAPS):
        shares += (tl.zeros((ROWS, BLOCK), tl.float32),)
    for step in range(STEPS):
        row = first + step * ROWS + tl.arange(0, ROWS)
        filled = tl.load(source + row, mask=row < rows, other=-1) >= 0
        taken = tl.where(filled, row, -1)
        grad = load_tile(output_grad, taken, columns, ROWS, GROUP, BLOCK, WIDTH)
        taps = load_taps(
            inputs,
            source,
            documents,
            row,
            rows,
            columns,
            DOCUMENTS,
            TAPS,
            ROWS,
            GROUP,
            BLOCK,
            WIDTH,
        )
        if SILU or NORMALIZE:
            total = tap_sums(
                inputs,
                taps,
                kernel,
                source,
                row,
                rows,
                columns,
                TAPS,
                ROWS,
                GROUP,
                BLOCK,
                WIDTH,
            )
            grad = through_activation(grad, total, epsilon, SILU, NORMALIZE)
            grad = tl.where(filled[:, None], grad, 0.0)
        added = ()
        for i in tl.static_range(TAPS):
            # Empty rows have no gradient, but the rows they meet may be anything.
            product = tl.where(filled[:, None], taps[i] * grad, 0.0)
            added += (shares[i] + product,)
        shares = added
        mask = tile_mask(row < rows, columns, ROWS, GROUP, BLOCK, WIDTH)
        store_rows(sum_grads, row_offsets(row, columns, WIDTH), mask, grad)
    partials += (tl.program_id(0) // GROUPS).to(tl.int64) * (TAPS * WIDTH)
    held = (tl.arange(0, BLOCK) < GROUP) & (columns < WIDTH)
    for i in tl.static_range(TAPS):
        total = tl.sum(shares[i], axis=0)
        tl.store(partials + i * WIDTH + columns, total, mask=held)


@triton.jit
def input_gradients(
    sum_grads,
    kernel,
    targets,
    documents,
    input_grad,
    length,
    rows,
    DOCUMENTS: tl.constexpr,
    TAPS: tl.constexpr,
    TARGETS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Gradients of the inputs, `[B, length, E]`, from those of the sums they are in."""
    batch, first, group = program_place(length, ROWS, GROUPS)
    columns = columns_of(group, GROUP, BLOCK)
    own_row = first + tl.arange(0, ROWS)
    valid = own_row < length
    sum_grads += batch * rows * WIDTH
    targets += batch * length * TARGETS
    if DOCUMENTS:
        documents += batch * rows
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for j in range(TARGETS):
        row = tl.load(targets + own_row * TARGETS + j, mask=valid, other=-1)
        if TAPS == 0:
            total += load_tile(sum_grads, row, columns, ROWS, GROUP, BLOCK, WIDTH)
        else:
            own = own_documents(documents, row, rows, DOCUMENTS)
            for i in tl.static_range(TAPS):
                later = row + (TAPS - 1 - i)
                met = (row >= 0) & (later < rows)
                if DOCUMENTS:
                    number = tl.load(documents + later, mask=met, other=0)
                    met = met & (number == own)
                later = tl.where(met, later, -1)
                tile = load_tile(sum_grads, later, columns, ROWS, GROUP, BLOCK, WIDTH)
                total += tile * load_factors(kernel, i, columns, GROUP, BLOCK, WIDTH)
    mask = tile_mask(valid, columns, ROWS, GROUP, BLOCK, WIDTH)
    input_grad += batch * length * WIDTH
    store_rows(input_grad, row_offsets(own_row, columns, WIDTH), mask, total)
