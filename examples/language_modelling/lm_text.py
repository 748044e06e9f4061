"""Text to learn from: its files, read and packed, split, and cut to windows."""

import gzip
import os
import pathlib
from typing import NamedTuple

import numpy as np
from train_lm import SEPARATOR, library_paths

SUFFIXES = (".rst", ".txt", ".yaml", ".py", ".md")
# Of this many files in a row one is for tests, and of this many one for validation.
TEST_EVERY, VALIDATION_EVERY = 20, 200
_TEST, _VALIDATION = 7, 17


class Text(NamedTuple):
    """Files, one behind the other, a separator at the end of each.

    Attributes:
        data: uint8 `[N]`.
        ends: int64 `[files]`, where each file ends, its separator included.
    """

    data: np.ndarray
    ends: np.ndarray

    def files(self):
        starts = np.concatenate([[0], self.ends[:-1]])
        return [self.data[a:b] for a, b in zip(starts, self.ends)]


def join(files):
    """`Text` of uint8 arrays."""
    ends = np.cumsum([len(file) for file in files], dtype="int64")
    return Text(np.concatenate([np.zeros(0, "uint8"), *files]), ends)


def read_text(paths=None, suffixes=SUFFIXES):
    """Reads files, in the order of their paths, each content once.

    Args:
        paths: files, folders, or files that `pack` wrote, each read for itself. If
            None, the modules of Python's standard library.
        suffixes: of the files that are read in folders. One more suffix `.gz` is
            allowed, and such a file unpacked.

    Returns:
        `Text`.

    Raises:
        ValueError: if there is no text.
    """
    if paths is None:
        return _each_once(path.read_bytes() + SEPARATOR for path in library_paths())
    files = []
    for path in map(pathlib.Path, paths):
        if path.suffix == ".npz":
            files += [file.tobytes() for file in _unpack(path).files()]
        elif path.is_dir():
            found = sorted(
                file
                for file in path.rglob("*")
                if file.is_file() and file.name.removesuffix(".gz").endswith(suffixes)
            )
            files += [_read(file) for file in found]
        elif path.is_file():
            files.append(_read(path))
        else:
            raise ValueError(f"`--text`: there is no {path}")
    if not files:
        raise ValueError(f"`--text`: no file of {', '.join(suffixes)} in {paths}")
    return _each_once(files)


def _each_once(files):
    return join([np.frombuffer(file, "uint8") for file in dict.fromkeys(files)])


def _read(path):
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    return data + SEPARATOR


def pack(text, path):
    """Writes a text to one compressed file, `.npz`."""
    draft = f"{path}.{os.getpid()}.tmp"
    with open(draft, "wb") as file:
        np.savez_compressed(file, **text._asdict())
    os.replace(draft, path)


def _unpack(path):
    with np.load(path) as arrays:
        missing = {"data", "ends"} - set(arrays)
        if missing:
            raise ValueError(f"`--text`: {path} is none that `--pack` wrote")
        return Text(arrays["data"], arrays["ends"])


def split(text):
    """Training, validation and test text.

    Whole files, spread over the text; or pieces of the one text where there are too
    few files for that: its last twentieth for tests, and one percent before that for
    validation.
    """
    files = text.files()
    if len(files) < VALIDATION_EVERY:
        size = len(text.data)
        first, second = size - size // 20 - size // 100, size - size // 20
        parts = text.data[:first], text.data[first:second], text.data[second:]
        return [join([part]) for part in parts]
    parts = [[], [], []]
    for index, file in enumerate(files):
        is_test = index % TEST_EVERY == _TEST
        is_validation = index % VALIDATION_EVERY == _VALIDATION
        parts[2 if is_test else is_validation].append(file)
    return [join(part) for part in parts]


def whole_windows(text, length, limit):
    """Windows int32 `[n, length]` side by side, from the first byte up to `limit`."""
    count = min(len(text.data), limit) // length
    return text.data[: count * length].reshape(count, length).astype("int32")


def spread_windows(text, length, count):
    """Windows int32 `[n, length]` evenly spread, `count` of them if there is room."""
    count = min(count, len(text.data) // length)
    starts = np.linspace(0, len(text.data) - length, count).astype("int64")
    return text.data[starts[:, None] + np.arange(length)].astype("int32")


def window_ends(text, longest, step, count):
    """Where windows end of which each lies in one file, all contents included.

    Args:
        text: `Text`.
        longest: size of the largest window.
        step: the least distance between ends.
        count: how many, at most.

    Returns:
        int64 `[n]`, evenly chosen from all such places; and whether the windows lie in
        one file each. Where no file is large enough, they lie anywhere.
    """
    ends = []
    start = 0
    for end in text.ends:
        # The separator is not read.
        ends.append(np.arange(start + longest, end, step))
        start = end
    ends = np.concatenate(ends)
    in_files = len(ends) > 0
    if not in_files:
        ends = np.arange(longest, len(text.data) + 1, step)
    chosen = np.linspace(0, len(ends) - 1, min(count, len(ends))).astype("int64")
    return ends[chosen], in_files


def windows_before(text, ends, length):
    """Windows int32 `[n, length]` that end at places `[n]`."""
    return text.data[ends[:, None] - length + np.arange(length)].astype("int32")
