"""The compiled programs of generation, and the loop around them.

A program reads the model's weights as they are when it is called, and is compiled for
a batch size, not for a length: text grows outside of it. Programs are kept beside the
model, not in it, so that a model is saved and copied without them.
"""

import functools
import weakref

import keras
import numpy as np
from keras import ops

from keras_mom import backend, config
from keras_mom.models import samplers

# What a record holds in place of a token where a row has ended.
NO_TOKEN = -1

# By model: what it was compiled for, and its programs.
_PROGRAMS = weakref.WeakKeyDictionary()

# Samplers of other settings than those before need programs of their own.
_MOST_PROGRAMS = 32

# The smallest piece of a prompt: few sizes are compiled.
_SMALLEST_PIECE = 16


def program(lm, key, make, written=(), jit_compile=None):
    """The program `key` of a model, compiled at its first call.

    Args:
        lm: the model, of which nothing is kept.
        key: hashable, what `make` depends on beside the model.
        make: takes a function that returns the model; returns a function of
            `(cache, inputs)` that returns `(cache, outputs)`.
        written: variables that it writes.
        jit_compile: as of `backend.decoding_program`.
    """
    if getattr(lm, "run_eagerly", False):
        jit_compile = False
    made_for = (
        config.get_implementation(),
        tuple((id(v), tuple(v.shape), str(v.dtype)) for v in lm.weights),
    )
    # Other variables (LoRA, quantization) need other programs; other values do not.
    if _PROGRAMS.get(lm, (None,))[0] != made_for:
        _PROGRAMS[lm] = (made_for, {})
    programs = _PROGRAMS[lm][1]
    key = (key, jit_compile)
    if key not in programs:
        if len(programs) == _MOST_PROGRAMS:
            del programs[next(iter(programs))]
        reference = weakref.ref(lm)
        programs[key] = backend.decoding_program(
            make(reference),
            tuple(lm.weights),
            tuple(written),
            jit_compile,
        )
    return programs[key]


def prefill(lm, rows, cache, prefill_length):
    """Feeds all but the last token of each row, in pieces of one shape.

    Args:
        lm: the model.
        rows: int32 arrays, a prompt each.
        cache: of as many rows; it is used up.
        prefill_length: the longest piece.

    Returns:
        The cache behind them.
    """
    longest = max(row.size for row in rows) - 1
    if not longest:
        return cache
    piece = _SMALLEST_PIECE
    while piece < min(longest, prefill_length):
        piece *= 2
    piece = min(piece, prefill_length)
    run = program(lm, "prefill", _make_prefill)
    for start in range(0, longest, piece):
        token_ids = np.zeros((len(rows), piece), "int32")
        mask = np.zeros((len(rows), piece), "bool")
        for index, row in enumerate(rows):
            part = row[:-1][start : start + piece]
            token_ids[index, : part.size] = part
            mask[index, : part.size] = True
        cache, _ = run(cache, _tensors((token_ids, mask)))
    return cache


def _make_prefill(lm):
    def function(cache, inputs):
        token_ids, mask = inputs
        _, cache = lm().backbone.call_with_cache(
            token_ids, cache, padding_mask=mask, in_place=True
        )
        return cache, ()

    return function


class Task:
    """What a loop needs to know, as tensors.

    Args:
        rows: int32 arrays, a prompt each.
        room: how many tokens may follow each row.
        stop_token_ids: list of ids that end a row.
        pad_token_id: fed where a row has ended.
        seed: integer.
    """

    def __init__(self, rows, room, stop_token_ids, pad_token_id, seed):
        self.rows = rows
        self.room = np.asarray(room, "int32")
        self.stop_token_ids = stop_token_ids
        # Room for more, so that another number of ids needs no other program.
        size = -(-max(len(stop_token_ids), 1) // 4) * 4
        stops = np.full((size,), NO_TOKEN, "int32")
        stops[: len(stop_token_ids)] = stop_token_ids
        seed = np.array(seed & 0xFFFFFFFF, "uint32").view("int32")
        pad = np.array(pad_token_id, "int32")
        last = np.array([row[-1] for row in rows], "int32")
        self.constants = _tensors((self.room, stops, pad, seed))
        self.state = _tensors(
            {"token": last, "done": self.room <= 0, "step": np.array(0, "int32")}
        )


def tokens(lm, sampler, task, cache, block):
    """Generates, and yields what came: int32 `[n, B]` of up to `block` steps.

    It holds `NO_TOKEN` where a row has ended.
    """
    run = program(
        lm,
        key_of("step", sampler),
        _make_step(sampler),
        sampler.variables,
        _jit_compile(lm),
    )
    state, records = task.state, []
    steps = int(task.room.max())
    for step in range(1, steps + 1):
        cache, (state, record) = run(cache, (state, task.constants))
        records.append(record)
        if len(records) == block or step == steps:
            # The only place that waits for the device.
            yield np.stack([ops.convert_to_numpy(record) for record in records])
            records = []
            if ops.convert_to_numpy(state["done"]).all():
                return


def _make_step(sampler):
    def make(lm):
        def function(cache, inputs):
            state, (room, stops, pad, seed) = inputs
            done, step = state["done"], state["step"]
            logits, _, cache = lm().call_with_cache(
                state["token"][:, None],
                cache,
                padding_mask=ops.logical_not(done)[:, None],
                in_place=True,
            )
            token = sampler.sample(logits[:, 0], seed, step)
            record = ops.where(done, NO_TOKEN, token)
            token = ops.where(done, pad, token)
            step = step + 1
            done = _done(done, token, step, room, stops)
            return cache, ({"token": token, "done": done, "step": step}, record)

        return function

    return make


def _done(done, token, step, room, stops):
    stopped = ops.any(ops.equal(token[..., None], stops), axis=-1)
    return ops.logical_or(ops.logical_or(done, stopped), step >= room)


def beams(lm, sampler, task, cache):
    """A beam search: new tokens of each row's best beam, a list of int32 arrays."""
    width, batch = sampler.num_beams, len(task.rows)
    cache = keras.tree.map_structure(lambda x: ops.repeat(x, width, axis=0), cache)
    key = key_of("beam", sampler)
    make = functools.partial(_make_beam_step, sampler=sampler)
    run = program(lm, key, make, jit_compile=_jit_compile(lm))
    state = {
        "token": ops.repeat(task.state["token"], width, axis=0),
        "done": ops.repeat(task.state["done"][:, None], width, axis=1),
        "step": task.state["step"],
        "scores": sampler.first_scores(batch),
    }
    parents, found = [], []
    for _ in range(int(task.room.max())):
        cache, (state, (parent, record)) = run(cache, (state, task.constants))
        parents.append(ops.convert_to_numpy(parent))
        found.append(ops.convert_to_numpy(record))
        if ops.convert_to_numpy(state["done"]).all():
            break
    # Back from each row's best beam to its first token.
    row = np.arange(batch)
    beam = ops.convert_to_numpy(state["scores"]).argmax(axis=-1)
    path = []
    for parent, token in zip(reversed(parents), reversed(found)):
        path.append(token[row, beam])
        beam = parent[row, beam]
    return split_rows(np.stack(path[::-1]))


def _make_beam_step(lm, sampler):
    def function(cache, inputs):
        state, (room, stops, pad, _) = inputs
        done, step = state["done"], state["step"] + 1
        logits, _, cache = lm().call_with_cache(
            state["token"][:, None],
            cache,
            padding_mask=ops.reshape(ops.logical_not(done), (-1, 1)),
            in_place=True,
        )
        scores, parent, token = sampler.advance(logits[:, 0], state["scores"], done)
        batch, width = ops.shape(parent)
        first = ops.arange(batch, dtype="int32")[:, None] * width
        source = ops.reshape(parent + first, (-1,))
        cache = keras.tree.map_structure(lambda x: ops.take(x, source, axis=0), cache)
        done = ops.take_along_axis(done, parent, axis=1)
        record = ops.where(done, NO_TOKEN, token)
        token = ops.where(done, pad, token)
        done = _done(done, token, step, room[:, None], stops)
        state = {
            "token": ops.reshape(token, (-1,)),
            "done": done,
            "step": step,
            "scores": scores,
        }
        return cache, (state, (parent, record))

    return function


def _jit_compile(lm):
    """Whether a step is to be compiled even where that is not usual.

    Not so a prompt's pieces: torch takes long to compile, and gains little by it.
    """
    return True if getattr(lm, "jit_compile", False) is True else None


def split_rows(records):
    """`[steps, B]` of tokens and `NO_TOKEN` to a list of B arrays of tokens."""
    return [row[row != NO_TOKEN].astype("int32") for row in records.T]


def key_of(kind, sampler):
    """What a program depends on: the sampler's settings, not its seed."""
    settings = sampler.get_config()
    settings.pop("seed", None)
    # Others than ours may have what their config does not tell, and variables. The
    # program keeps the sampler, so that no other one gets its identity.
    own = type(sampler) in samplers.OWN
    identity = None if own else id(getattr(sampler, "sampler", sampler))
    return kind, type(sampler), repr(sorted(settings.items())), identity


def _tensors(tree):
    return keras.tree.map_structure(ops.convert_to_tensor, tree)
