"""Prompts of every kind, as rows of tokens, and results of the same kind.

Padding is left out here: a masked token changes nothing, so that a row is its valid
tokens, wherever they stand.
"""

import dataclasses
import numbers
from typing import Any

import numpy as np
from keras import ops

from keras_mom.models import tokenizers


@dataclasses.dataclass
class Prompts:
    """What `generate` was given.

    Args:
        rows: int32 arrays, one a row: the tokens to go on from.
        room: int array `[B]`: how many tokens may follow each row.
        restore: takes the new tokens, a list of B int32 arrays, and whether the
            prompts are left out, and returns the result in the kind of the prompts.
        single: whether a single prompt was given, without an axis of rows.
        texts: whether the prompts were texts.
    """

    rows: list
    room: np.ndarray
    restore: Any
    single: bool = False
    texts: bool = False


def read(prompts, max_length, pad_token_id, preprocessor):
    """`Prompts` from what a caller gave.

    Args:
        prompts: an int array `[B, T]` or `[T]`; a list of ints, or of B lists or
            arrays of ints; a dict of `token_ids` and `padding_mask`, and optionally
            `segment_ids`, all `[B, T]`; with a preprocessor, a string or a list of B
            strings.
        max_length: number of tokens a row may have, the prompt included, or None for
            what the preprocessor or the dict says.
        pad_token_id: id that fills up rows.
        preprocessor: None, or what `tokenizers.as_preprocessor` returns.

    Raises:
        ValueError: if an argument does not fit; the message names it.
    """
    if max_length is not None and (
        isinstance(max_length, bool)
        or not isinstance(max_length, numbers.Integral)
        or max_length < 1
    ):
        raise ValueError(
            f"`max_length` must be a positive integer. Received: {max_length!r}"
        )
    if isinstance(prompts, dict):
        return _from_dict(prompts, max_length, pad_token_id)
    if are_texts(prompts):
        return _from_texts(prompts, max_length, pad_token_id, preprocessor)
    if max_length is None:
        raise ValueError(
            "`max_length` is needed with prompts of token ids. Received: None"
        )
    if isinstance(prompts, (list, tuple)):
        return _from_lists(prompts, max_length)
    return _from_array(prompts, max_length, pad_token_id)


def _from_array(prompts, max_length, pad_token_id):
    token_ids = _integers("prompts", prompts)
    if token_ids.ndim not in (1, 2):
        raise ValueError(
            "`prompts` must have shape [B, T] or [T]. "
            f"Received: shape {token_ids.shape}"
        )
    single = token_ids.ndim == 1
    rows = list(np.atleast_2d(token_ids))

    def restore(new, strip):
        length = max_length - (rows[0].size if strip else 0)
        result = np.full((len(rows), length), pad_token_id, "int32")
        for index, row in enumerate(_joined(rows, new, strip)):
            result[index, : row.size] = row
        return result[0] if single else result

    return Prompts(rows, _room(rows, max_length), restore, single)


def _from_lists(prompts, max_length):
    single = bool(len(prompts)) and all(np.ndim(x) == 0 for x in prompts)
    rows = [_integers("prompts", row) for row in ([prompts] if single else prompts)]
    if any(row.ndim != 1 for row in rows):
        raise ValueError(
            "`prompts`, where it is a list, must hold integers or lists of integers. "
            f"Received: rows of shape {[row.shape for row in rows]}"
        )

    def restore(new, strip):
        result = [row.tolist() for row in _joined(rows, new, strip)]
        return result[0] if single else result

    return Prompts(rows, _room(rows, max_length), restore, single)


def _from_dict(prompts, max_length, pad_token_id):
    missing = {"token_ids"} - set(prompts)
    unknown = set(prompts) - {"token_ids", "padding_mask", "segment_ids"}
    if missing or unknown:
        raise ValueError(
            "`prompts`, where it is a dict, must hold `token_ids` and may hold "
            f"`padding_mask` and `segment_ids`. Received: {sorted(prompts)}"
        )
    given = {name: _integers(name, x) for name, x in prompts.items() if x is not None}
    # KerasHub's preprocessors take a mask for indices unless it is of booleans.
    mask_dtype = str(getattr(prompts.get("padding_mask"), "dtype", "int32"))
    mask_dtype = "bool" if "bool" in mask_dtype else "int32"
    single = given["token_ids"].ndim == 1
    given = {name: np.atleast_2d(x) for name, x in given.items()}
    token_ids = given["token_ids"]
    for name, x in given.items():
        if token_ids.ndim != 2 or x.shape != token_ids.shape:
            raise ValueError(
                f"`{name}` of `prompts` must have shape [B, T], as `token_ids` has. "
                f"Received: {x.shape} and token_ids of {token_ids.shape}"
            )
    batch, width = token_ids.shape
    mask = given.get("padding_mask", np.ones((batch, width))).astype("bool")
    segments = given.get("segment_ids")
    length = width if max_length is None else max_length
    valid = [np.flatnonzero(row) for row in mask]
    # Where each row goes on: behind its last token.
    ends = np.array([row[-1] + 1 if row.size else 0 for row in valid], dtype="int64")
    rows = [
        token_ids[index, _last_document(row, segments, index)]
        for index, row in enumerate(valid)
    ]

    def restore(new, strip):
        result = {
            "token_ids": np.full((batch, max(length, width)), pad_token_id, "int32"),
            "padding_mask": np.zeros((batch, max(length, width)), mask_dtype),
        }
        if not strip:
            result["token_ids"][:, :width] = token_ids
            result["padding_mask"][:, :width] = mask
        if segments is not None:
            extra = ((0, 0), (0, max(length, width) - width))
            result["segment_ids"] = np.pad(segments, extra, mode="edge")
        for index, tokens in enumerate(new):
            places = slice(ends[index], ends[index] + tokens.size)
            result["token_ids"][index, places] = tokens
            result["padding_mask"][index, places] = 1
            if segments is not None and ends[index]:
                last = segments[index, ends[index] - 1]
                result["segment_ids"][index, places] = last
        # A dict can be longer than what was asked for, where its padding was.
        result = {name: x[:, :length] for name, x in result.items()}
        return {name: x[0] for name, x in result.items()} if single else result

    return Prompts(rows, _room(rows, length, ends), restore, single)


def _last_document(places, segments, index):
    """The places of a row's valid tokens that belong to its last document."""
    if segments is None or not places.size:
        return places
    ids = segments[index, places]
    changes = np.flatnonzero(ids[1:] != ids[:-1])
    return places[changes[-1] + 1 :] if changes.size else places


def _from_texts(prompts, max_length, pad_token_id, preprocessor):
    if preprocessor is None:
        raise ValueError(
            "`prompts` of text need a model with a `preprocessor`, such as "
            "`keras_mom.models.ByteTokenizer()`. Received: a model without one"
        )
    single = isinstance(prompts, (str, bytes)) or np.ndim(prompts) == 0
    texts = tokenizers._texts([prompts] if single else prompts)
    if max_length is None:
        max_length = getattr(preprocessor, "sequence_length", None)
    if max_length is None:
        raise ValueError(
            "`max_length` is needed with this preprocessor. Received: None"
        )
    # Ours cut nothing off; KerasHub's cut to the length and pad up to it.
    cut = None if isinstance(preprocessor, tokenizers.Tokenizer) else max_length
    packed = preprocessor.generate_preprocess(texts, sequence_length=cut)
    if not isinstance(packed, dict):
        packed = _padded([np.asarray(row) for row in packed])
    read = _from_dict(packed, max_length, pad_token_id)

    def restore(new, strip):
        result = read.restore(new, strip)
        result["padding_mask"] = result["padding_mask"].astype("bool")
        result = preprocessor.generate_postprocess(result)
        result = [tokenizers._as_text(text) for text in result]
        return result[0] if single else result

    return Prompts(read.rows, read.room, restore, single, texts=True)


def _padded(rows):
    token_ids = np.zeros((len(rows), max(row.size for row in rows)), "int32")
    padding_mask = np.zeros_like(token_ids)
    for index, row in enumerate(rows):
        token_ids[index, : row.size] = row
        padding_mask[index, : row.size] = 1
    return {"token_ids": token_ids, "padding_mask": padding_mask}


def _room(rows, max_length, ends=None):
    """How many tokens may follow each row, after the checks of all kinds."""
    if not rows:
        raise ValueError("`prompts` must hold at least one row. Received: none")
    for index, row in enumerate(rows):
        if not row.size:
            raise ValueError(
                "Each row of `prompts` must hold at least one token; an empty text "
                f"needs a start token. Received: no token in row {index}"
            )
    ends = np.array([row.size for row in rows]) if ends is None else ends
    if max_length < ends.max():
        raise ValueError(
            "`max_length` counts the prompt and must not be less than its length. "
            f"Received: max_length={max_length}, a prompt of {ends.max()}"
        )
    return max_length - ends


def _joined(rows, new, strip):
    return new if strip else [np.concatenate(pair) for pair in zip(rows, new)]


def _integers(name, value):
    array = value if isinstance(value, np.ndarray) else None
    if array is None:
        is_tensor = hasattr(value, "dtype")
        array = ops.convert_to_numpy(value) if is_tensor else np.asarray(value)
    if array.dtype.kind not in "iub" and array.size:
        raise ValueError(f"`{name}` must hold integers. Received: dtype {array.dtype}")
    if array.size and not -(2**31) <= array.min() <= array.max() < 2**31:
        raise ValueError(
            f"`{name}` must hold 32-bit integers. "
            f"Received: values from {array.min()} to {array.max()}"
        )
    return array.astype("int32")


def are_texts(prompts):
    """Whether a prompt, or the first of several, is a string."""
    if isinstance(prompts, (str, bytes)):
        return True
    if isinstance(prompts, (list, tuple)):
        return bool(prompts) and isinstance(prompts[0], (str, bytes))
    if isinstance(prompts, np.ndarray):
        if prompts.dtype.kind == "O" and prompts.size:
            return isinstance(prompts.flat[0], (str, bytes))
        return prompts.dtype.kind in "US"
    dtype = getattr(prompts, "dtype", None)
    return str(getattr(dtype, "name", dtype)) == "string"
