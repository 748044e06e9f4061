"""What a model carries from call to call while it reads a sequence in pieces."""

from typing import Any, NamedTuple

from keras import ops

from keras_mom import backend
from keras_mom.ops.constants import at_least, select
from keras_mom.ops.packing import document_numbers


class Places(NamedTuple):
    """Where the tokens of a call stand in their rows.

    Only valid tokens are counted: padding takes no place, wherever it is.

    Attributes:
        position: int32 `[B, T]`, the number of valid tokens before each valid token.
            At a masked token, that of the valid token before it.
        start: int32 `[B]`, the number of valid tokens in earlier calls.
        document: int32 `[B, T]`, the documents of this call, numbered from 0, or None.
            Document 0 goes on where the call before ended.
        document_start: int32 `[B]`, where document 0 began.
        mask: bool `[B, T]` or None.
    """

    position: Any
    start: Any
    document: Any
    document_start: Any
    mask: Any

    @property
    def end(self):
        """int32 `[B]`, the number of valid tokens so far."""
        # A masked token has the place of the valid token before it.
        return self.position[:, -1] + 1


def places(cache, token_ids, mask, segment_ids):
    """The `Places` of a call's tokens, and what the cache carries on beside layers.

    Args:
        cache: dict of `position`, `document_start` and `segment_id`, int32 `[B]` each:
            the number of valid tokens so far, how many of them came before the
            document that goes on, and the segment id of the last valid token.
        token_ids: `[B, T]`.
        mask: bool `[B, T]` or None.
        segment_ids: int32 `[B, T]` or None.

    Returns:
        `Places`; bool `[B]`, whether a row's first valid token begins a new document,
        or None without `segment_ids`; and the dict for the next call.
    """
    start = cache["position"]
    if mask is None:
        valid = ops.ones_like(token_ids, "int32")
    else:
        valid = ops.cast(mask, "int32")
    position = start[:, None] + ops.cumsum(valid, axis=1) - 1
    end = position[:, -1] + 1
    if segment_ids is None:
        where = Places(position, start, None, cache["document_start"], mask)
        return where, None, {**cache, "position": end}
    # The first valid token, and the last; a row without any has none to read.
    counted = position - start[:, None] + 1
    first = valid * ops.cast(counted == 1, "int32")
    last = valid * ops.cast(position == end[:, None] - 1, "int32")
    anew = ops.sum(first * segment_ids, axis=1) != cache["segment_id"]
    anew = ops.logical_and(anew, ops.logical_and(start > 0, end > start))
    begin = ops.where(anew, start, cache["document_start"])
    document = document_numbers(segment_ids, mask)
    newest = document[:, -1:]
    tokens = ops.sum(valid * ops.cast(document == newest, "int32"), axis=1)
    following = {
        "position": end,
        "document_start": ops.where(newest[:, 0] > 0, end - tokens, begin),
        "segment_id": ops.where(
            end > start, ops.sum(last * segment_ids, axis=1), cache["segment_id"]
        ),
    }
    return Places(position, start, document, begin, mask), anew, following


def slot_positions(start, slots):
    """Which position each slot of a ring of keys holds; negative ones are empty.

    Position p is written to slot `p % slots`.

    Args:
        start: int32 `[B]`, the number of positions written so far.
        slots: int.

    Returns:
        int32 `[B, slots]`.
    """
    last = start[:, None] - 1
    slot = ops.arange(slots, dtype="int32")
    return last - ops.mod(last - slot, slots)


def hide(visible, scores):
    """Scores with a large negative number where nothing may be seen."""
    return select(visible, scores, -1e30)


def check_room(places, slots):
    """Raises if a row has more valid tokens than slots, where values can be read."""
    if places.document is not None or not backend.is_concrete(places.end):
        return
    longest = int(ops.max(places.end - places.document_start))
    if longest > slots:
        raise ValueError(
            "`cache` has no room: a row may have as many valid tokens as the "
            "`max_length` that the cache was made with. "
            f"Received: {longest} tokens, max_length={slots}"
        )


def write_token(new, cache, places, slots):
    """Writes one token a row; masked ones write back what is there.

    Args:
        new: keys and values, `[B, H, 1, K]` each.
        cache: what is held, `[B, H, slots, K]` each, which is not changed.
        places: `Places`.
        slots: int.
    """
    slot = ops.mod(places.start, slots)
    row = ops.arange(ops.shape(slot)[0], dtype="int32")
    head = ops.arange(new[0].shape[1], dtype="int32")
    shape = (ops.shape(slot)[0], new[0].shape[1])
    grid = (row[:, None], head[None], slot[:, None])
    # Keras wants a list of places, not a grid of them.
    grid = [ops.reshape(ops.broadcast_to(x, shape), (-1,)) for x in grid]
    index = ops.stack(grid, axis=1)
    written = []
    for tensor, held in zip(new, cache):
        token = ops.cast(tensor[:, :, 0], held.dtype)
        if places.mask is not None:
            there = ops.take_along_axis(held, slot[:, None, None, None], axis=2)
            token = ops.where(places.mask[:, :, None], token, there[:, :, 0])
        token = ops.reshape(token, (-1, held.shape[-1]))
        written.append(ops.scatter_update(held, index, token))
    return tuple(written)


def write_piece(new, cache, places, slots):
    """Writes the last valid tokens of each row, gathered slot by slot.

    Args:
        new: keys and values, `[B, H, T, K]` each.
        cache, places, slots: as of `write_token`.
    """
    length = ops.shape(new[0])[2]
    place = places.position - places.start[:, None]
    if places.mask is not None:
        place = select(places.mask, place, length)
    index = ops.broadcast_to(ops.arange(length, dtype="int32"), ops.shape(place))
    # The index of the r-th valid token.
    token = backend.fill_batch(length, place, index)
    rank = slot_positions(places.end, slots) - places.start[:, None]
    fresh = ops.logical_and(rank >= 0, rank < length)
    source = ops.take_along_axis(token, select(fresh, rank, 0), axis=1)
    source = at_least(source, 0)
    written = []
    for tensor, held in zip(new, cache):
        batch, heads, _, width = ops.shape(tensor)
        flat = ops.swapaxes(tensor, 1, 2)
        flat = ops.reshape(flat, (batch, length, heads * width))
        taken = backend.gather_batch(flat, source)
        taken = ops.reshape(taken, (batch, slots, heads, width))
        taken = ops.cast(ops.swapaxes(taken, 1, 2), held.dtype)
        written.append(ops.where(fresh[:, None, :, None], taken, held))
    return tuple(written)
