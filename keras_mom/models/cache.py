"""What a model carries from call to call while it reads a sequence in pieces."""

from typing import Any, NamedTuple

from keras import ops

from keras_mom.ops.constants import select
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


def places(start, document_start, token_ids, mask, segment_ids):
    """The `Places` of the tokens of a call, and the next call's `document_start`.

    Args:
        start, document_start: int32 `[B]`.
        token_ids: `[B, T]`.
        mask: bool `[B, T]` or None.
        segment_ids: int32 `[B, T]` or None.
    """
    valid = (
        ops.ones_like(token_ids, "int32") if mask is None else ops.cast(mask, "int32")
    )
    position = start[:, None] + ops.cumsum(valid, axis=1) - 1
    document = None
    next_start = document_start
    if segment_ids is not None:
        document = document_numbers(segment_ids, mask)
        last = document[:, -1:]
        # Valid tokens that belong to the last document.
        tokens = ops.sum(valid * ops.cast(document == last, "int32"), axis=1)
        began = position[:, -1] + 1 - tokens
        next_start = ops.where(last[:, 0] > 0, began, document_start)
    return Places(position, start, document, document_start, mask), next_start


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
