"""Packing: every memory's tokens, one after the other, in a static number of rows.

A batch row's packed rows are one region a memory, each of whole chunks:

    history (the convolution's window) | tokens, in time order | empty rows

A token's place is the number of earlier tokens of its memory, so nothing is sorted
and order in time is kept by construction. Masked tokens get no row. All sizes follow
from the shapes alone, and nothing is read back to the host.
"""

from typing import NamedTuple

from keras import ops

from keras_mom import backend
from keras_mom.ops.constants import at_least, select
from keras_mom.ops.dispatch import dispatch, register
from keras_mom.ops.padding import pad


class Packing:
    """Where each routed token goes, and where each packed row comes from.

    Names: M memories (the shared one, if any, last), J memories a token, W history
    rows, C rows a chunk, R packed rows a batch row.

    Args:
        indices: int32 `[B, T, k]`, the memories each token is routed to.
        num_memories: number of routed memories.
        shared: whether one more memory receives every token.
        mask: bool `[B, T]`, False at tokens that touch nothing, or None.
        history: W, rows kept free in front of each memory's tokens.
        chunk_size: C.
        block_size: the number of chunks a batch row is a multiple of this.
        implementation: as in `keras_mom.ops.memory_scan`.

    Attributes:
        position: int32 `[B, T, M]`, the row of token t in memory m, else -1.
        targets: int32 `[B, T, J]`, the rows of token t, else -1.
        slot: int32 `[B, R]`, `t * J + j` of the token in a row, -1 in other rows.
        token: int32 `[B, R]`, t of the token in a row, else -1.
        memory: int32 `[B, R]`, whose region a row lies in.
        start: int32 `[B, M]`, the first row of each region.
        count: int32 `[B, M]`, the tokens of each memory.
        chunk_offsets: int32 `[B, M + 1]`, in the sense of `chunked_scan`.
        place: int32 `[B, R]`, rows since the region's first token; negative in history.
    """

    def __init__(
        self,
        indices,
        num_memories,
        shared,
        mask,
        history,
        chunk_size,
        block_size=1,
        implementation=None,
    ):
        # Conversion would move a tensor to the default device.
        if not ops.is_tensor(indices):
            indices = ops.convert_to_tensor(indices)
        self.history, self.chunk_size = history, chunk_size
        self.num_memories = num_memories + shared
        sizes = _Sizes(num_memories, bool(shared), history, chunk_size, block_size)
        _, length, top_k = ops.shape(indices)
        self.rows = sizes.chunks(length, top_k) * chunk_size
        tables = dispatch("packing_tables", implementation, sizes, indices, mask)
        self.position, self.targets = tables["position"], tables["targets"]
        self.slot, self.token = tables["slot"], tables["token"]
        self.memory, self.place = tables["memory"], tables["place"]
        self.start, self.count = tables["start"], tables["count"]
        self.chunk_offsets = tables["chunk_offsets"]

    def source(self, sets):
        """Rows of `[B, T * sets, ...]` to take: each row's token in its memory's set.

        Args:
            sets: number of projection sets: M, or one for all memories, or one for
                the routed memories and one for the shared memory.

        Returns:
            Source `[B, R]` and targets `[B, T * sets, J']`, as `gather_rows` takes.
        """
        if sets == 1:
            return self.token, self.targets
        options = (sets, self.num_memories)
        return _source(options, self.token, self.memory, self.targets, self.position)

    def history_source(self, offset):
        """Sources of the history rows: windows `[B, M * W, ...]` behind `offset` rows.

        Returns:
            Source int32 `[B, R]` (-1 in other rows), targets int32 `[B, M * W, 1]`.
        """
        place = self.place + self.history
        inside = ops.logical_and(place >= 0, place < self.history)
        source = select(inside, offset + self.memory * self.history + place, -1)
        step = ops.arange(self.history, dtype="int32")
        targets = self.start[:, :, None] + step
        batch = ops.shape(targets)[0]
        return source, ops.reshape(
            targets, (batch, self.num_memories * self.history, 1)
        )

    def window_rows(self, count):
        """int32 `[B, M * count]`: each memory's last rows, history included."""
        step = ops.arange(self.history - count, self.history, dtype="int32")
        rows = (self.start + self.count)[:, :, None] + step
        batch = ops.shape(rows)[0]
        return ops.reshape(rows, (batch, self.num_memories * count))


class _Sizes(NamedTuple):
    """The arguments of `Packing` that are no tensors."""

    num_memories: int
    shared: bool
    history: int
    chunk_size: int
    block_size: int

    def chunks(self, length, top_k):
        """Chunks of a batch row."""
        # Each region wastes less than a chunk; no region needs more than T tokens.
        most = self.history + self.chunk_size - 1
        whole = (length + most) // self.chunk_size
        routed = (length * top_k + self.num_memories * most) // self.chunk_size
        if isinstance(length, int):
            routed = min(routed, self.num_memories * whole)
        chunks = routed + self.shared * whole
        return -(-chunks // self.block_size) * self.block_size


@register("packing_tables", "portable")
@backend.compiled
def _tables(sizes, indices, mask):
    """The tensors of a `Packing`, by name."""
    batch, length, top_k = ops.shape(indices)
    chunks = sizes.chunks(length, top_k)
    rows = chunks * sizes.chunk_size
    routed = _one_hot(indices, sizes.num_memories)
    if sizes.shared:
        routed = pad(routed, 2, after=1, fill=1)
    if mask is not None:
        routed = routed * ops.cast(mask, "int32")[..., None]
    rank = ops.cumsum(routed, axis=1) - routed
    count = ops.sum(routed, axis=1)

    needed = (count + (sizes.history + sizes.chunk_size - 1)) // sizes.chunk_size
    offsets = pad(ops.cumsum(needed, axis=1), 1, before=1)
    start = offsets[:, :-1] * sizes.chunk_size
    # Chunks behind all regions count as the last one's; they hold nothing.
    end = ops.zeros((batch, 1), "int32") + chunks

    position = start[:, None, :] + sizes.history + rank
    position = select(routed > 0, position, -1)
    targets = ops.take_along_axis(position, indices, axis=2)
    if sizes.shared:
        shared = position[:, :, sizes.num_memories :]
        targets = ops.concatenate([targets, shared], axis=2)
    slot = _slots(targets, rows)
    row = ops.arange(rows, dtype="int32")
    memory = ops.cast(row[None, :, None] >= start[:, None, 1:], "int32")
    memory = ops.sum(memory, axis=-1)
    return {
        "position": position,
        "targets": targets,
        "slot": slot,
        "token": select(slot >= 0, slot // (top_k + sizes.shared), -1),
        "memory": memory,
        "place": row - ops.take_along_axis(start, memory, axis=1) - sizes.history,
        "start": start,
        "count": count,
        "chunk_offsets": ops.concatenate([offsets[:, :-1], end], axis=1),
    }


def _slots(targets, rows):
    """The slot in each row, from the rows of each slot."""
    batch, length, slots = ops.shape(targets)
    slots = length * slots
    index = ops.reshape(select(targets >= 0, targets, rows), (batch, slots))
    value = ops.broadcast_to(ops.arange(slots, dtype="int32"), (batch, slots))
    return backend.fill_batch(rows, index, value)


@backend.compiled
def _source(options, token, memory, targets, position):
    """`Packing.source` for more than one set."""
    sets, num_memories = options
    each = sets == num_memories
    # A set for each memory, or one for all routed memories, one for the shared memory.
    chosen = memory if each else ops.cast(memory == num_memories - 1, "int32")
    # Rows without a token have -1 there too.
    source = ops.where(token >= 0, token * sets + chosen, token)
    batch, length, slots = ops.shape(targets)
    if each:
        return source, ops.reshape(position, (batch, length * sets, 1))
    own = targets[:, :, :-1]
    shared = pad(targets[:, :, -1:], 2, after=slots - 2, fill=-1)
    both = ops.stack([own, shared], axis=2)
    return source, ops.reshape(both, (batch, length * sets, slots - 1))


class Documents:
    """Documents in packed rows: where one begins, and which one each row belongs to.

    A document begins wherever the segment id differs from that of the valid token
    before. Documents are numbered from 0 in each batch row.

    Args:
        packing: `Packing`.
        segment_ids: int32 `[B, T]`.
        mask: bool `[B, T]` or None.

    Attributes:
        of_rows: int32 `[B, R]`; 0 in history and in empty rows.
        resets: int32 `[B, R]`, 1 at the first row of a new document in its memory.
        last: int32 `[B]`, the document of the batch row's last valid token.
        stale: bool `[B, M]`: nothing of the last document has reached the memory.
    """

    def __init__(self, packing, segment_ids, mask):
        self.of_rows, self.resets, self.last, self.stale = _document_tables(
            (), segment_ids, mask, packing.token, packing.place, packing.position
        )


@backend.compiled
def _document_tables(_, segment_ids, mask, token, place, position):
    """The tensors of `Documents`, in their order."""
    of_tokens = document_numbers(segment_ids, mask)
    filled = token >= 0
    number = ops.take_along_axis(of_tokens, at_least(token, 0), axis=1)
    of_rows = select(filled, number, 0)
    before = select(place > 0, pad(of_rows[:, :-1], 1, before=1), 0)
    changed = ops.logical_and(filled, of_rows != before)
    last = ops.max(of_tokens, axis=1)
    newest = ops.max(select(position >= 0, of_tokens[..., None], 0), axis=1)
    return of_rows, ops.cast(changed, "int32"), last, newest < last[:, None]


def document_numbers(segment_ids, mask):
    """Numbers the documents of each batch row from 0; masked tokens begin none."""
    batch, length = ops.shape(segment_ids)
    if mask is None:
        changed = segment_ids[:, 1:] != segment_ids[:, :-1]
        return ops.cumsum(pad(ops.cast(changed, "int32"), 1, before=1), axis=1)
    # Compare with the valid token before: its index is the largest one so far.
    index = select(mask, ops.arange(length, dtype="int32"), -1)
    before = pad(_running_max(index)[:, :-1], 1, before=1, fill=-1)
    previous = ops.take_along_axis(segment_ids, at_least(before, 0), axis=1)
    changed = ops.logical_and(mask, segment_ids != previous)
    changed = ops.logical_and(changed, before >= 0)
    return ops.cumsum(ops.cast(changed, "int32"), axis=1)


def _running_max(index):
    """Running maximum of int32 `[B, T]` indices that are their own places, or -1."""
    length = ops.shape(index)[1]
    valid = ops.cast(index >= 0, "int32")
    rank = ops.cumsum(valid, axis=1)
    # The r-th valid token's index, by a scatter; ranks without one are never read.
    filled = backend.fill_batch(length + 1, select(valid > 0, rank, length + 1), index)
    return ops.take_along_axis(filled, rank, axis=1)


def _one_hot(indices, count):
    index = ops.arange(count, dtype="int32")
    return ops.sum(ops.cast(indices[..., None] == index, "int32"), axis=2)
