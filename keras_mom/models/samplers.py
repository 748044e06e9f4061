"""Samplers: how the next token is chosen from a model's logits."""

import sys

import keras
from keras import ops

from keras_mom.checks import check_positive

# A candidate that cannot be chosen. Finite, so that sums of it are numbers.
_NEVER = -1e9


@keras.saving.register_keras_serializable("keras_mom")
class Sampler:
    """Chooses the next token of each row. Subclass it and override `choose`.

    A sampler holds no state. Its random numbers are a function of the seed, the
    number of the step, the row and the candidate, so that a seed gives the same draws
    on every backend, compiled or not, and whether tokens are streamed or not.

    Args:
        temperature: what logits are divided by. Above 1 flattens the distribution.
        seed: integer; every call of `generate` then draws the same numbers. With None
            each draws others, which `keras.utils.set_random_seed` determines.
    """

    # Keras variables that `sample` writes, such as a seed generator's state.
    variables: tuple | list = ()

    def __init__(self, temperature=1.0, seed=None):
        if not temperature > 0:
            raise ValueError(
                '`temperature` must be positive; use the sampler "greedy" for the '
                f"limit at 0. Received: temperature={temperature}"
            )
        if seed is not None and int(seed) != seed:
            raise ValueError(f"`seed` must be an integer. Received: seed={seed!r}")
        self.temperature = float(temperature)
        self.seed = None if seed is None else int(seed)

    def sample(self, logits, seed, step):
        """The next tokens, int32 `[B]`.

        Args:
            logits: float `[B, vocabulary]`.
            seed: int32 scalar.
            step: int32 scalar: how many tokens were drawn before.
        """
        logits = ops.cast(logits, "float32") / self.temperature
        return ops.cast(self.choose(logits, (seed, step)), "int32")

    def choose(self, logits, key):
        """The next tokens, integer `[B]`.

        Args:
            logits: float32 `[B, vocabulary]`, divided by the temperature.
            key: for `draw`.
        """
        raise NotImplementedError

    def get_config(self):
        return {"temperature": self.temperature, "seed": self.seed}

    @classmethod
    def from_config(cls, config):
        return cls(**config)


@keras.saving.register_keras_serializable("keras_mom")
class GreedySampler(Sampler):
    """The most probable token."""

    def __init__(self):
        super().__init__()

    def choose(self, logits, key):
        del key
        return ops.argmax(logits, axis=-1)

    def get_config(self):
        return {}


@keras.saving.register_keras_serializable("keras_mom")
class RandomSampler(Sampler):
    """A token at random, from the whole distribution."""

    def choose(self, logits, key):
        return draw(logits, key)


@keras.saving.register_keras_serializable("keras_mom")
class TopKSampler(Sampler):
    """A token at random from the `k` most probable ones.

    Args:
        k: number of candidates.
        temperature, seed: as in `Sampler`.
    """

    def __init__(self, k=5, temperature=1.0, seed=None):
        super().__init__(temperature, seed)
        check_positive("k", k)
        self.k = k

    def choose(self, logits, key):
        values, indices = ops.top_k(logits, min(self.k, logits.shape[-1]))
        return _take(indices, draw(values, key))

    def get_config(self):
        return {"k": self.k, **super().get_config()}


@keras.saving.register_keras_serializable("keras_mom")
class TopPSampler(Sampler):
    """A token at random from the fewest that have a probability of `p` together.

    Args:
        p: in (0, 1]. The most probable token is always a candidate.
        k: if given, only the `k` most probable tokens are looked at, which saves
            sorting the vocabulary.
        temperature, seed: as in `Sampler`.
    """

    def __init__(self, p=0.9, k=None, temperature=1.0, seed=None):
        super().__init__(temperature, seed)
        if not 0 < p <= 1:
            raise ValueError(f"`p` must be in (0, 1]. Received: p={p}")
        if k is not None:
            check_positive("k", k)
        self.p = float(p)
        self.k = k

    def choose(self, logits, key):
        size = logits.shape[-1]
        probabilities = ops.softmax(logits, axis=-1)
        values, indices = ops.top_k(
            probabilities, size if self.k is None else min(self.k, size)
        )
        before = ops.cumsum(values, axis=-1) - values
        # Not by the sum alone, which rounding may keep from 0 at the first candidate.
        first = ops.arange(values.shape[-1], dtype="int32") == 0
        kept = ops.logical_or(before < self.p, first)
        scores = ops.where(kept, ops.log(ops.maximum(values, 1e-38)), _NEVER)
        return _take(indices, draw(scores, key))

    def get_config(self):
        return {"p": self.p, "k": self.k, **super().get_config()}


@keras.saving.register_keras_serializable("keras_mom")
class BeamSampler(Sampler):
    """Beam search: the sequence of the highest probability among those looked at.

    Each row keeps `num_beams` continuations. A step looks at all their continuations
    and keeps the best; one that met a stop token stays as it is.

    Args:
        num_beams: number of continuations kept a row, W.
        temperature: as in `Sampler`.
    """

    def __init__(self, num_beams=5, temperature=1.0):
        super().__init__(temperature)
        check_positive("num_beams", num_beams)
        self.num_beams = num_beams

    def first_scores(self, batch_size):
        """Log probabilities of the beams before the first step, float32 `[B, W]`.

        The beams are equal then, and only one of them counts.
        """
        scores = [[0.0] + [_NEVER] * (self.num_beams - 1)]
        return ops.repeat(ops.convert_to_tensor(scores, "float32"), batch_size, 0)

    def advance(self, logits, scores, done):
        """A step of the search.

        Args:
            logits: `[B * W, vocabulary]`, what may follow each beam.
            scores: float32 `[B, W]`, the beams' log probabilities.
            done: bool `[B, W]`: beams that end where they are.

        Returns:
            The new scores, `[B, W]`; of each new beam which one it continues, int32
            `[B, W]`; and its token, int32 `[B, W]`, which is 0 where that one is done.
        """
        batch, beams = ops.shape(scores)
        size = logits.shape[-1]
        logits = ops.cast(logits, "float32") / self.temperature
        steps = ops.reshape(ops.log_softmax(logits, axis=-1), (batch, beams, size))
        stay = ops.where(ops.arange(size, dtype="int32") == 0, 0.0, 10 * _NEVER)
        steps = ops.where(done[..., None], stay, steps)
        totals = ops.reshape(scores[..., None] + steps, (batch, beams * size))
        scores, indices = ops.top_k(totals, self.num_beams)
        indices = ops.cast(indices, "int32")
        return scores, indices // size, indices % size

    def choose(self, logits, key):
        raise NotImplementedError("A beam search does not choose token by token.")

    def get_config(self):
        return {"num_beams": self.num_beams, "temperature": self.temperature}


class KerasHubSampler(Sampler):
    """A sampler of KerasHub's protocol, `compute_probabilities` and `get_next_token`.

    Args:
        sampler: the sampler. Its seed generators are used and advanced.
    """

    def __init__(self, sampler):
        super().__init__()
        self.sampler = sampler

    @property
    def variables(self) -> list:
        return list(getattr(self.sampler, "variables", ()))

    @property
    def has_own_loop(self):
        """Whether it is a search that must be given the whole loop, as in beams."""
        keras_hub: object = sys.modules.get("keras_hub")
        if keras_hub is None:
            return False
        base = keras_hub.samplers.Sampler  # type: ignore[attr-defined]
        own = isinstance(self.sampler, base)
        return own and type(self.sampler).__call__ is not base.__call__

    def sample(self, logits, seed, step):
        del seed, step
        probabilities = self.sampler.compute_probabilities(logits)
        return ops.cast(self.sampler.get_next_token(probabilities), "int32")

    def get_config(self):
        return getattr(self.sampler, "get_config", dict)()


_NAMES = {
    "greedy": GreedySampler,
    "random": RandomSampler,
    "temperature": RandomSampler,
    "top_k": TopKSampler,
    "top_p": TopPSampler,
    "beam": BeamSampler,
}

# The samplers whose config tells all that they do.
OWN = frozenset(_NAMES.values())


def names():
    """The names that `get` knows without KerasHub."""
    return sorted(_NAMES)


def get(identifier):
    """A sampler from a name, a config, a class or an instance.

    Args:
        identifier: one of `names()`, the name of a KerasHub sampler where KerasHub is
            installed, what `serialize` returns, a class, or an instance of `Sampler`
            or of a KerasHub sampler.

    Raises:
        ValueError: if it is none of these.
    """
    if isinstance(identifier, dict):
        identifier = keras.saving.deserialize_keras_object(identifier)
    if isinstance(identifier, str):
        if identifier not in _NAMES:
            return _from_keras_hub(identifier)
        identifier = _NAMES[identifier]
    if isinstance(identifier, type):
        identifier = identifier()
    if isinstance(identifier, Sampler):
        return identifier
    if hasattr(identifier, "get_next_token") and hasattr(
        identifier, "compute_probabilities"
    ):
        return KerasHubSampler(identifier)
    raise ValueError(
        f"`sampler` must be one of {', '.join(names())}, a "
        "`keras_mom.models.samplers.Sampler` or a KerasHub sampler. "
        f"Received: {identifier!r}"
    )


def serialize(sampler):
    """The config of a sampler, for `get`."""
    if isinstance(sampler, KerasHubSampler):
        sampler = sampler.sampler
    return keras.saving.serialize_keras_object(sampler)


def _from_keras_hub(name):
    try:
        import keras_hub  # type: ignore[import-not-found]

        sampler = keras_hub.samplers.get(name)
    except (ImportError, ValueError, KeyError):
        sampler = None
    # KerasHub returns some names that it does not know as they are.
    if not hasattr(sampler, "get_next_token"):
        raise ValueError(
            f"`sampler` must be one of {', '.join(names())}, or the name of a KerasHub "
            f"sampler where KerasHub is installed. Received: {name!r}"
        )
    return KerasHubSampler(sampler)


def _take(indices, place):
    return ops.take_along_axis(indices, place[:, None], axis=-1)[:, 0]


# Random numbers.


def draw(logits, key):
    """The place of a candidate of each row, drawn by its probability: int32 `[B]`.

    Args:
        logits: float32 `[B, N]`, of the candidates.
        key: `(seed, step)`, int32 scalars.

    Source: the maximum of logits plus Gumbel noise (E. J. Gumbel, 1954).
    """
    noise = -ops.log(-ops.log(uniform(key, ops.shape(logits))))
    return ops.cast(ops.argmax(logits + noise, axis=-1), "int32")


def uniform(key, shape):
    """Numbers in (0, 1), float32 `[B, N]`, a function of the key and the place.

    They are the same on every backend: a hash of integers, of 23 bits, since that
    many and a half are exact in float32.
    """
    seed, step = key
    bits = _hash(ops.cast(seed, "int32"))
    bits = _hash(bits + _spread(ops.cast(step, "int32")))
    rows = ops.arange(shape[0], dtype="int32")[:, None]
    bits = _hash(bits + _spread(rows))
    bits = _hash(bits + _spread(ops.arange(shape[1], dtype="int32")))
    return (ops.cast(_shift(bits, 9), "float32") + 0.5) * 2.0**-23


def _spread(x):
    """Neighbouring integers far apart: 2^32 divided by the golden ratio."""
    return x * -1640531527


def _hash(x):
    """The finalizer of MurmurHash3 (A. Appleby, public domain) of int32, wrapping."""
    x = ops.bitwise_xor(x, _shift(x, 16)) * -2048144789
    x = ops.bitwise_xor(x, _shift(x, 13)) * -1028477387
    return ops.bitwise_xor(x, _shift(x, 16))


def _shift(x, bits):
    """Bits moved to the right, zeros behind them: backends shift the sign in."""
    return ops.bitwise_and(ops.right_shift(x, bits), 2 ** (32 - bits) - 1)
