"""Generation: what `MoMCausalLM` does beside training."""

import numbers
from typing import Any

import keras
import numpy as np

from keras_mom.checks import check_positive
from keras_mom.models import decoding, prompts, samplers, tokenizers
from keras_mom.models.generate_step import generate_step

# How many steps are taken before their tokens are read from the device.
_BLOCK = 16
# Caches of attention get a length of which this is a divisor, so that a program
# serves many lengths.
_CACHE_LENGTH = 64


class GenerationMixin:
    """Methods that generate; the class has `backbone`, `preprocessor` and
    `call_with_cache`."""

    backbone: Any
    preprocessor: Any
    weights: Any
    call_with_cache: Any
    _sampler: Any = None

    @property
    def sampler(self):
        """The sampler of `generate` where none is named: `compile`'s, or greedy."""
        return samplers.GreedySampler() if self._sampler is None else self._sampler

    @sampler.setter
    def sampler(self, value):
        self._sampler = None if value is None else samplers.get(value)

    def compile(self, *args, sampler=None, **kwargs):
        """Configures training, and the sampler.

        Args:
            sampler: what `generate` uses where it is given none, as of `generate`.
                Defaults to greedy.
            *args, **kwargs: as of `TrainingMixin.compile`.
        """
        super().compile(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        # Behind it, because KerasHub has a default of its own.
        self.sampler = sampler

    def preprocess_samples(self, x, y=None, sample_weight=None):
        """KerasHub's hook in `fit` and `predict`: token ids are taken as they are."""
        if not prompts.are_texts(x):
            return keras.utils.pack_x_y_sample_weight(x, y, sample_weight)
        return super().preprocess_samples(  # pyright: ignore[reportAttributeAccessIssue]
            x, y=y, sample_weight=sample_weight
        )

    def get_compile_config(self):
        config = super().get_compile_config()  # pyright: ignore
        if config is not None and self._sampler is not None:
            config["sampler"] = samplers.serialize(self._sampler)
        return config

    def generate(
        self,
        prompts,
        max_length=None,
        sampler=None,
        stop_token_ids=None,
        *,
        seed=None,
        strip_prompt=False,
        prefill_length=512,
    ):
        """Goes on from prompts.

        What is carried from token to token is a state of fixed size (and the keys and
        values of attention, where the model is a hybrid), and one compiled program
        takes it from one to the next.

        Args:
            prompts: token ids: an int array `[B, T]` or `[T]`, a list of B lists of
                unequal lengths, or a dict of `token_ids` and `padding_mask` `[B, T]`,
                padded anywhere, and optionally `segment_ids`, whose last document is
                gone on with. With a preprocessor also a string or a list of B
                strings.
            max_length: number of tokens of a row behind generation, its prompt
                included. In a dict it counts columns, and defaults to T: what follows
                a row takes the columns behind its last token. With strings it
                defaults to the preprocessor's `sequence_length`.
            sampler: `"greedy"`, `"random"`, `"top_k"`, `"top_p"`, `"beam"`, a sampler
                of `keras_mom.models.samplers`, or one of KerasHub. Defaults to the
                model's: `compile`'s, or greedy.
            stop_token_ids: a token id or several, any of which ends a row, or
                `"auto"` for the preprocessor's `end_token_id`. None goes on to
                `max_length`.
            seed: integer for this call's random numbers, in place of the sampler's.
            strip_prompt: whether to return what is new alone.
            prefill_length: the largest number of columns of the prompts that are read
                at once. It bounds memory, and changes no result.

        Returns:
            The prompts and what follows them, in the kind of the prompts: int32
            `[B, max_length]` (filled up with the padding token behind a stop token),
            lists, a dict, or strings. A stop token is included; strings show none.

        Raises:
            ValueError: if an argument does not fit; the message names it.

        Example:

        >>> lm.generate([[1, 2, 3], [4]], max_length=5)
        [[1, 2, 3, 7, 7], [4, 7, 7, 7, 7]]
        """
        given, chosen, task = self._prepare(
            prompts, max_length, sampler, stop_token_ids, seed, prefill_length
        )
        if not given.room.any():
            new = [np.zeros((0,), "int32") for _ in given.rows]
        elif _has_own_loop(chosen):
            new = self._run_loop_of(chosen, given, task)
        else:
            cache = self._read_prompts(given, prefill_length)
            if isinstance(chosen, samplers.BeamSampler):
                new = decoding.beams(self, chosen, task, cache)
            else:
                records = decoding.tokens(self, chosen, task, cache, _BLOCK)
                new = decoding.split_rows(np.concatenate(list(records)))
        return given.restore(new, strip_prompt)

    def stream(
        self,
        prompts,
        max_length=None,
        sampler=None,
        stop_token_ids=None,
        *,
        seed=None,
        prefill_length=512,
    ):
        """Goes on from prompts, a token at a time.

        Args: as of `generate`. A beam search cannot be streamed.

        Returns:
            An iterator over the steps. A step of a single prompt is a token id, or
            of a string a piece of text of whole characters, which together are what
            `generate` adds. A step of B prompts is a list of B such, None where a row
            has ended.

        Raises:
            ValueError: if an argument does not fit, at once.
        """
        given, chosen, task = self._prepare(
            prompts, max_length, sampler, stop_token_ids, seed, prefill_length
        )
        if isinstance(chosen, samplers.BeamSampler) or _has_own_loop(chosen):
            raise ValueError(
                "`sampler` must choose token by token to be streamed. "
                f"Received: {type(getattr(chosen, 'sampler', chosen)).__name__}"
            )
        return self._steps(given, chosen, task, prefill_length)

    def _steps(self, given, sampler, task, prefill_length):
        if not given.room.any():
            return
        cache = self._read_prompts(given, prefill_length)
        steps = decoding.tokens(self, sampler, task, cache, block=1)
        del cache
        rows = (
            [None if token == decoding.NO_TOKEN else int(token) for token in step[0]]
            for step in steps
        )
        if given.texts:
            rows = self._texts_of(rows, len(given.rows))
        for row in rows:
            if not given.single:
                yield row
            elif row[0] or not given.texts:
                yield row[0]

    def _texts_of(self, rows, batch):
        preprocessor = tokenizers.as_preprocessor(self.preprocessor)
        streams = [tokenizers.text_stream(preprocessor) for _ in range(batch)]
        texts = []
        for row in rows:
            if texts:
                # A row that ends gives what it still holds with its last piece.
                yield self._close_ended(streams, texts, row)
            texts = [
                None if token is None else stream.push(token)
                for stream, token in zip(streams, row)
            ]
        if texts:
            yield self._close_ended(streams, texts, [None] * batch)

    @staticmethod
    def _close_ended(streams, texts, following):
        return [
            text + stream.close() if text is not None and token is None else text
            for stream, text, token in zip(streams, texts, following)
        ]

    def generate_step(self, inputs, stop_token_ids=None, seed=None):
        """Generates in one call of tensors, which a caller may compile.

        As KerasHub's. The prompts are read at once, and a loop fills the rows up.

        Args:
            inputs: dict of `token_ids` and `padding_mask`, `[B, T]`: prompts at the
                start of rows that are as long as the result.
            stop_token_ids: list or tuple of ids that end a row, or None.
            seed: int32 scalar in place of the sampler's seed.

        Returns:
            Dict of `token_ids`, of the dtype given, and `padding_mask`, bool, both
            `[B, T]`. The mask is False behind a stop token.
        """
        return generate_step(self, self.sampler, inputs, stop_token_ids, seed)

    def _prepare(
        self, given, max_length, sampler, stop_token_ids, seed, prefill_length
    ):
        check_positive("prefill_length", prefill_length)
        chosen = self.sampler if sampler is None else samplers.get(sampler)
        preprocessor = tokenizers.as_preprocessor(self.preprocessor)
        pad_token_id = tokenizers.token_id(preprocessor, "pad_token_id")
        pad_token_id = 0 if pad_token_id is None else int(pad_token_id)
        stops = _stop_token_ids(stop_token_ids, preprocessor)
        given = prompts.read(given, max_length, pad_token_id, preprocessor)
        size = self.backbone.token_embedding.input_dim
        for row in given.rows:
            # Backends differ in what they do about it.
            if row.min() < 0 or row.max() >= size:
                raise ValueError(
                    f"`prompts` must hold token ids from 0 to {size - 1}, the model's "
                    f"vocabulary. Received: ids from {row.min()} to {row.max()}"
                )
        if seed is None:
            seed = chosen.seed
        elif isinstance(chosen, samplers.KerasHubSampler):
            raise ValueError(
                "`seed` cannot be set on a KerasHub sampler, which has its own. "
                f"Received: seed={seed}"
            )
        elif isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
            raise ValueError(f"`seed` must be an integer. Received: {seed!r}")
        else:
            seed = int(seed)
        if seed is None:
            drawn = keras.random.randint((1,), 0, 2**31 - 1, "int32")
            seed = int(keras.ops.convert_to_numpy(drawn)[0])
        # What is fed where a row has ended is masked, but must be in the vocabulary.
        task = decoding.Task(given.rows, given.room, stops, 0, seed)
        return given, chosen, task

    def _read_prompts(self, given, prefill_length):
        batch = len(given.rows)
        longest = max(row.size + room for row, room in zip(given.rows, given.room))
        length = -(-longest // _CACHE_LENGTH) * _CACHE_LENGTH
        cache = self.backbone.get_initial_cache(batch, length)
        return decoding.prefill(self, given.rows, cache, prefill_length)

    def _run_loop_of(self, sampler, given, task):
        """New tokens by a KerasHub sampler that runs the loop itself."""
        length = max(row.size + room for row, room in zip(given.rows, given.room))
        token_ids = np.zeros((len(given.rows), length), "int32")
        mask = np.zeros_like(token_ids, "bool")
        for index, row in enumerate(given.rows):
            token_ids[index, : row.size] = row
            mask[index, : row.size] = True
        stops = tuple(task.stop_token_ids)
        run = decoding.program(
            self,
            (decoding.key_of("loop", sampler), stops),
            lambda lm: (
                lambda carry, inputs: (
                    carry,
                    generate_step(lm(), sampler, inputs, stops or None, None),
                )
            ),
            sampler.variables,
        )
        _, result = run((), {"token_ids": token_ids, "padding_mask": mask})
        result = keras.tree.map_structure(keras.ops.convert_to_numpy, result)
        new = []
        for index, (row, room) in enumerate(zip(given.rows, given.room)):
            there = result["padding_mask"][index].copy()
            there[: row.size] = False
            new.append(result["token_ids"][index][there][:room].astype("int32"))
        return new


def _has_own_loop(sampler):
    return isinstance(sampler, samplers.KerasHubSampler) and sampler.has_own_loop


def _stop_token_ids(stop_token_ids, preprocessor):
    """A list of ids."""
    if stop_token_ids is None:
        return []
    if isinstance(stop_token_ids, str):
        if stop_token_ids != "auto":
            raise ValueError(
                '`stop_token_ids` must be None, "auto", an integer or a list of '
                f"integers. Received: {stop_token_ids!r}"
            )
        ids = [
            tokenizers.token_id(preprocessor, name)
            for name in ("end_token_id", "end_token2_id")
        ]
        ids = [int(token_id) for token_id in ids if token_id is not None]
        if not ids:
            raise ValueError(
                '`stop_token_ids="auto"` needs a `preprocessor` with an '
                "`end_token_id`. Received: "
                f"{'no preprocessor' if preprocessor is None else 'one without it'}"
            )
        return ids
    try:
        ids = np.atleast_1d(np.asarray(stop_token_ids))
    except (TypeError, ValueError):
        ids = np.array([None])
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu") or (ids < 0).any():
        raise ValueError(
            '`stop_token_ids` must be None, "auto", an integer or a list of '
            f"integers. Received: {stop_token_ids!r}"
        )
    return ids.tolist()
