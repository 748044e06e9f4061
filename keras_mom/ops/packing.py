"""Packing: every memory's tokens, one after the other, in a static number of rows.

A batch row's packed rows are one region a memory, each of whole chunks:

    history (the convolution's window) | tokens, in time order | empty rows

A token's place is the number of earlier tokens of its memory, so nothing is sorted
and order in time is kept by construction. Masked tokens get no row. All sizes follow
from the shapes alone, and nothing is read back to the host.
"""

from keras import ops

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

    Attributes:
        position: int32 `[B, T, M]`, the row of token t in memory m, else -1.
        targets: int32 `[B, T, J]`, the rows of token t, else -1.
        slot: int32 `[B, R]`, `t * J + j` of the token in a row, -1 in other rows.
        token: int32 `[B, R]`, t of the token in a row, else -1.
        memory: int32 `[B, R]`, whose region a row lies in.
        start: int32 `[B, M]`, the first row of each region.
        count: int32 `[B, M]`, the tokens of each memory.
        chunk_offsets: int32 `[B, M + 1]`, in the sense of `chunked_scan`.
    """

    def __init__(
        self, indices, num_memories, shared, mask, history, chunk_size, block_size=1
    ):
        batch, length, top_k = ops.shape(indices)
        self.history, self.chunk_size, self.block_size = history, chunk_size, block_size
        self.num_memories = num_memories + shared
        chunks = self._chunk_count(length, top_k, num_memories, shared)
        self.rows = chunks * chunk_size

        routed = _one_hot(indices, num_memories)
        if shared:
            routed = pad(routed, 2, after=1, fill=1)
        if mask is not None:
            routed = routed * ops.cast(mask, "int32")[..., None]
        rank = ops.cumsum(routed, axis=1) - routed
        self.count = ops.sum(routed, axis=1)

        needed = (self.count + (history + chunk_size - 1)) // chunk_size
        offsets = pad(ops.cumsum(needed, axis=1), 1, before=1)
        self.start = offsets[:, :-1] * chunk_size
        # Chunks behind all regions count as the last one's; they hold nothing.
        self.chunk_offsets = ops.concatenate(
            [offsets[:, :-1], ops.zeros((batch, 1), "int32") + chunks], axis=1
        )

        place = self.start[:, None, :] + history + rank
        self.position = ops.where(routed > 0, place, -1)
        self.targets = ops.take_along_axis(self.position, indices, axis=2)
        if shared:
            self.targets = ops.concatenate(
                [self.targets, self.position[:, :, num_memories:]], axis=2
            )
        self.slot = self._slots(batch, length)
        self.token = _floor_divide(self.slot, top_k + shared)
        self.memory = self._memory_of_rows()

    def _chunk_count(self, length, top_k, num_memories, shared):
        # Each region wastes less than a chunk; no region needs more than T tokens.
        size, history = self.chunk_size, self.history
        whole = (length + (history + size - 1)) // size
        routed = (length * top_k + num_memories * (history + size - 1)) // size
        if isinstance(length, int):
            routed = min(routed, num_memories * whole)
        chunks = routed + shared * whole
        return -(-chunks // self.block_size) * self.block_size

    def _slots(self, batch, length):
        slots = length * self.targets.shape[2]
        row = ops.arange(batch, dtype="int32")[:, None, None] * self.rows
        outside = batch * self.rows
        index = ops.where(self.targets >= 0, self.targets + row, outside)
        value = ops.broadcast_to(ops.arange(slots, dtype="int32"), (batch, slots))
        # Not `ops.full`, which reads its value back on torch.
        empty = ops.zeros((outside + 1,), "int32") - 1
        filled = ops.scatter_update(
            empty, ops.reshape(index, (-1, 1)), ops.reshape(value, (-1,))
        )
        return ops.reshape(filled[:-1], (batch, self.rows))

    def _memory_of_rows(self):
        row = ops.arange(self.rows, dtype="int32")[None, :, None]
        return ops.sum(ops.cast(row >= self.start[:, None, 1:], "int32"), axis=-1)

    @property
    def place(self):
        """int32 `[B, R]`: rows since the region's first token; negative in history."""
        start = ops.take_along_axis(self.start, self.memory, axis=1)
        row = ops.arange(self.rows, dtype="int32")
        return row - start - self.history

    def source(self, sets, set_of_memory):
        """Rows of `[B, T * sets, ...]` to take: each row's token in its memory's set.

        Args:
            sets: number of projection sets.
            set_of_memory: the set of each memory, a list of M numbers.

        Returns:
            Source `[B, R]` and targets `[B, T * sets, J']`, as `gather_rows` takes.
        """
        if sets == 1:
            return self.token, self.targets
        chosen = ops.take(ops.convert_to_tensor(set_of_memory, "int32"), self.memory)
        source = ops.where(self.token >= 0, self.token * sets + chosen, -1)
        batch, length, slots = ops.shape(self.targets)
        if sets == self.num_memories:
            targets = ops.reshape(self.position, (batch, length * sets, 1))
        else:
            # One set for all routed memories, one for the shared memory.
            own = self.targets[:, :, :-1]
            shared = pad(self.targets[:, :, -1:], 2, after=slots - 2, fill=-1)
            targets = ops.reshape(
                ops.stack([own, shared], axis=2), (batch, length * sets, slots - 1)
            )
        return source, targets

    def history_source(self, offset):
        """Sources of the history rows: windows `[B, M * W, ...]` behind `offset` rows.

        Returns:
            Source int32 `[B, R]` (-1 in other rows), targets int32 `[B, M * W, 1]`.
        """
        place = self.place + self.history
        inside = ops.logical_and(place >= 0, place < self.history)
        source = ops.where(inside, offset + self.memory * self.history + place, -1)
        step = ops.arange(self.history, dtype="int32")
        targets = self.start[:, :, None] + step
        batch = ops.shape(targets)[0]
        return source, ops.reshape(
            targets, (batch, self.num_memories * self.history, 1)
        )

    def window_rows(self):
        """int32 `[B, M * W]`: the last W rows of each memory, history included."""
        step = ops.arange(self.history, dtype="int32")
        rows = (self.start + self.count)[:, :, None] + step
        batch = ops.shape(rows)[0]
        return ops.reshape(rows, (batch, self.num_memories * self.history))


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
        of_tokens = _document_numbers(segment_ids, mask)
        token = ops.maximum(packing.token, 0)
        number = ops.take_along_axis(of_tokens, token, axis=1)
        filled = packing.token >= 0
        self.of_rows = ops.where(filled, number, 0)
        before = pad(self.of_rows[:, :-1], 1, before=1)
        before = ops.where(packing.place <= 0, 0, before)
        changed = ops.logical_and(filled, self.of_rows != before)
        self.resets = ops.cast(changed, "int32")
        self.last = ops.max(of_tokens, axis=1)
        newest = ops.where(packing.position >= 0, of_tokens[..., None], 0)
        self.stale = ops.max(newest, axis=1) < self.last[:, None]


def _document_numbers(segment_ids, mask):
    """Numbers the documents of each batch row from 0; masked tokens begin none."""
    batch, length = ops.shape(segment_ids)
    if mask is None:
        changed = segment_ids[:, 1:] != segment_ids[:, :-1]
        return ops.cumsum(pad(ops.cast(changed, "int32"), 1, before=1), axis=1)
    # Compare with the valid token before: its index is the largest one so far.
    index = ops.where(mask, ops.arange(length, dtype="int32"), -1)
    before = pad(_running_max(index)[:, :-1], 1, before=1, fill=-1)
    previous = ops.take_along_axis(segment_ids, ops.maximum(before, 0), axis=1)
    changed = ops.logical_and(mask, segment_ids != previous)
    changed = ops.logical_and(changed, before >= 0)
    return ops.cumsum(ops.cast(changed, "int32"), axis=1)


def _running_max(index):
    """Running maximum of int32 `[B, T]` indices that are their own places, or -1."""
    length = ops.shape(index)[1]
    valid = ops.cast(index >= 0, "int32")
    rank = ops.cumsum(valid, axis=1)
    # The r-th valid token's index, by a scatter; ranks without one are never read.
    batch = ops.shape(index)[0]
    row = ops.arange(batch, dtype="int32")[:, None] * (length + 1)
    outside = batch * (length + 1)
    place = ops.where(valid > 0, rank + row, outside)
    filled = ops.scatter_update(
        ops.zeros((outside + 1,), "int32") - 1,
        ops.reshape(place, (-1, 1)),
        ops.reshape(index, (-1,)),
    )
    return ops.take(filled, rank + row, axis=0)


def _one_hot(indices, count):
    index = ops.arange(count, dtype="int32")
    return ops.sum(ops.cast(indices[..., None] == index, "int32"), axis=2)


def _floor_divide(slot, size):
    return ops.where(slot >= 0, slot // size, -1)
