"""Tokenizers: text to token ids and back.

Each serves as the `preprocessor` of a `MoMCausalLM`, by the protocol of KerasHub's
preprocessors: `generate_preprocess`, `generate_postprocess` and `tokenizer`.
"""

import codecs
import os

import keras
import numpy as np

from keras_mom.models.streaming import TextStream


class Tokenizer:
    """What tokenizers share. Subclasses define `encode`, `decode`, `vocabulary_size`.

    Attributes:
        pad_token_id: id that fills rows up; it stands for no text.
        start_token_id, end_token_id: ids at the ends of a text, or None.
    """

    pad_token_id: int
    start_token_id: int | None
    end_token_id: int | None

    def encode(self, text) -> list:
        """Token ids, a list, of a text."""
        raise NotImplementedError

    def decode(self, token_ids) -> str:
        """The text of token ids, a list of integers. Special tokens have none."""
        raise NotImplementedError

    def vocabulary_size(self) -> int:
        """Number of ids, the special ones included."""
        raise NotImplementedError

    def tokenize(self, inputs):
        """A list of token ids of a text, or a list of such lists of several."""
        if isinstance(inputs, str):
            return self.encode(inputs)
        return [self.encode(text) for text in _texts(inputs)]

    def detokenize(self, inputs):
        """A text of token ids, or a list of texts of rows of them."""
        inputs = [np.asarray(row).tolist() for row in inputs]
        if any(isinstance(row, list) for row in inputs):
            return [self.decode(row) for row in inputs]
        return self.decode(inputs)

    def text_stream(self):
        """A new `keras_mom.models.streaming.TextStream`: tokens in, text out."""
        return TextStream(self.decode)

    def __call__(self, inputs, sequence_length=None, add_end_token=False):
        """Texts as a model takes them.

        Args:
            inputs: a text or a list of B texts.
            sequence_length: T. Longer texts are cut, shorter ones are padded on the
                right. Defaults to the longest text's.
            add_end_token: whether `end_token_id` follows each text.

        Returns:
            A dict of `token_ids` and `padding_mask`, int32 `[B, T]`, or `[T]` of a
            single text. The mask is 0 where the padding is.
        """
        rows = self.tokenize([inputs] if isinstance(inputs, str) else inputs)
        if add_end_token:
            rows = [[*row, self.end_token_id] for row in rows]
        if sequence_length is None:
            sequence_length = max((len(row) for row in rows), default=0)
        token_ids = np.full((len(rows), sequence_length), self.pad_token_id, "int32")
        padding_mask = np.zeros_like(token_ids)
        for index, row in enumerate(rows):
            row = row[:sequence_length]
            token_ids[index, : len(row)] = row
            padding_mask[index, : len(row)] = 1
        if isinstance(inputs, str):
            token_ids, padding_mask = token_ids[0], padding_mask[0]
        return {"token_ids": token_ids, "padding_mask": padding_mask}

    # KerasHub's protocol of a preprocessor.

    @property
    def tokenizer(self):
        return self

    def generate_preprocess(self, inputs, sequence_length=None):
        """Texts to the dict that a model generates from; see `__call__`."""
        return self(inputs, sequence_length)

    def generate_postprocess(self, inputs):
        """The dict that a model generates to texts."""
        rows = np.asarray(inputs["token_ids"])
        masks = np.asarray(inputs["padding_mask"]).astype("bool")
        if rows.ndim == 1:
            return self.decode(rows[masks].tolist())
        return [self.decode(row[mask].tolist()) for row, mask in zip(rows, masks)]

    def get_config(self) -> dict:
        return {}

    @classmethod
    def from_config(cls, config):
        return cls(**config)


@keras.saving.register_keras_serializable("keras_mom")
class ByteTokenizer(Tokenizer):
    """Bytes of UTF-8 as tokens 0 to 255, then padding 256, start 257 and end 258.

    Decoding replaces bytes that are no UTF-8 by U+FFFD.

    Args:
        add_start_token: whether `start_token_id` precedes each text.
    """

    pad_token_id = 256
    start_token_id = 257
    end_token_id = 258

    def __init__(self, add_start_token=False):
        self.add_start_token = bool(add_start_token)

    def vocabulary_size(self):
        return 259

    def encode(self, text):
        start = [self.start_token_id] if self.add_start_token else []
        return start + list(text.encode())

    def decode(self, token_ids):
        return _bytes(token_ids).decode(errors="replace")

    def text_stream(self):
        return _ByteStream()

    def get_config(self):
        return {"add_start_token": self.add_start_token}


class _ByteStream:
    """A `TextStream` that knows from the bytes where a character ends."""

    def __init__(self):
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id):
        return self._decoder.decode(_bytes([token_id]))

    def close(self):
        return self._decoder.decode(b"", final=True)


def _bytes(token_ids):
    # A model's vocabulary may be larger, to be of a round size.
    return bytes(token_id for token_id in token_ids if 0 <= token_id < 256)


@keras.saving.register_keras_serializable("keras_mom")
class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of the Hugging Face library `tokenizers`, which must be installed.

    It travels inside a saved model, as its JSON text.

    Args:
        tokenizer: a `tokenizers.Tokenizer`, something that holds one as
            `backend_tokenizer` (the fast tokenizers of `transformers`), the path of a
            `tokenizer.json`, or its text.
        pad_token, start_token, end_token: a token of the vocabulary or its id, or
            None. Without a padding token the end token, or 0, takes its place.
        add_special_tokens: whether to add what the tokenizer's own template says,
            such as a start token.

    Raises:
        ImportError: if `tokenizers` is not installed.
        ValueError: if a token is not in the vocabulary.
    """

    def __init__(
        self,
        tokenizer,
        pad_token=None,
        start_token=None,
        end_token=None,
        add_special_tokens=True,
    ):
        self._tokenizer = _load(tokenizer)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.start_token_id = self._id("start_token", start_token)
        self.end_token_id = self._id("end_token", end_token)
        pad = self._id("pad_token", pad_token)
        self._has_padding = pad is not None
        self.pad_token_id = (self.end_token_id or 0) if pad is None else pad
        self.add_special_tokens = bool(add_special_tokens)

    def _id(self, name, token):
        if token is None:
            return None
        known = token
        if isinstance(token, str):
            known = self._tokenizer.token_to_id(token)
        if known is None or not 0 <= int(known) < self.vocabulary_size():
            raise ValueError(
                f"`{name}` must be a token or an id of the tokenizer's vocabulary of "
                f"{self.vocabulary_size()}. Received: {name}={token!r}"
            )
        return int(known)

    def vocabulary_size(self):
        # Ids may have gaps.
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        return max(ids, default=-1) + 1

    def encode(self, text):
        added = self.add_special_tokens
        return list(self._tokenizer.encode(text, add_special_tokens=added).ids)

    def decode(self, token_ids):
        special = {self.start_token_id, self.end_token_id}
        if self._has_padding:
            special.add(self.pad_token_id)
        token_ids = [token_id for token_id in token_ids if token_id not in special]
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def get_config(self):
        return {
            "tokenizer": self._tokenizer.to_str(),
            "pad_token": self.pad_token_id if self._has_padding else None,
            "start_token": self.start_token_id,
            "end_token": self.end_token_id,
            "add_special_tokens": self.add_special_tokens,
        }


def _load(tokenizer):
    """A `tokenizers.Tokenizer` of our own: padding and truncation are its state."""
    try:
        import tokenizers  # type: ignore[import-not-found]
    except ImportError as error:
        raise ImportError(
            "HuggingFaceTokenizer needs the package `tokenizers`: "
            "pip install tokenizers"
        ) from error
    tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if isinstance(tokenizer, os.PathLike):
        tokenizer = os.fspath(tokenizer)
    if isinstance(tokenizer, str) and not tokenizer.lstrip().startswith("{"):
        return tokenizers.Tokenizer.from_file(tokenizer)
    if not isinstance(tokenizer, (str, tokenizers.Tokenizer)):
        raise ValueError(
            "`tokenizer` must be a `tokenizers.Tokenizer`, the path of a "
            f"tokenizer.json, or its text. Received: {type(tokenizer)}"
        )
    text = tokenizer if isinstance(tokenizer, str) else tokenizer.to_str()
    return tokenizers.Tokenizer.from_str(text)


class _TokenizerPreprocessor:
    """The preprocessor's protocol on a tokenizer of KerasHub's protocol."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.pad_token_id = getattr(tokenizer, "pad_token_id", None) or 0

    def generate_preprocess(self, inputs, sequence_length=None):
        del sequence_length  # It is applied behind: rows may have any length.
        return [np.asarray(self.tokenizer.tokenize(text)).tolist() for text in inputs]

    def generate_postprocess(self, inputs):
        special = getattr(self.tokenizer, "special_token_ids", None) or ()
        texts = []
        for row, mask in zip(inputs["token_ids"], inputs["padding_mask"]):
            row = [x for x in row[mask.astype("bool")].tolist() if x not in special]
            texts.append(self.tokenizer.detokenize(row))
        return [_as_text(text) for text in texts]


def as_preprocessor(preprocessor):
    """What `generate` calls, from what a model was given; None stays None.

    Args:
        preprocessor: with `generate_preprocess` and `generate_postprocess`, as ours
            and KerasHub's have; a tokenizer with `tokenize` and `detokenize`, as
            KerasHub's; or a tokenizer that `HuggingFaceTokenizer` takes.

    Raises:
        ValueError: if it is none of these.
    """
    if preprocessor is None or hasattr(preprocessor, "generate_preprocess"):
        return preprocessor
    if hasattr(preprocessor, "tokenize") and hasattr(preprocessor, "detokenize"):
        return _TokenizerPreprocessor(preprocessor)
    if hasattr(preprocessor, "backend_tokenizer") or hasattr(preprocessor, "to_str"):
        return HuggingFaceTokenizer(preprocessor)
    raise ValueError(
        "`preprocessor` must be a tokenizer of keras_mom.models, a preprocessor or "
        "tokenizer of KerasHub, or a Hugging Face tokenizer. "
        f"Received: {type(preprocessor)}"
    )


def text_stream(preprocessor):
    """A new text stream of what `as_preprocessor` returned."""
    if hasattr(preprocessor, "text_stream"):
        return preprocessor.text_stream()

    def decode(token_ids):
        row = {
            "token_ids": np.array([token_ids], "int32"),
            "padding_mask": np.ones((1, len(token_ids)), "bool"),
        }
        return _as_text(preprocessor.generate_postprocess(row)[0])

    return TextStream(decode)


def token_id(preprocessor, name):
    """The id `name` of a preprocessor's tokenizer, such as "pad_token_id", or None."""
    tokenizer = getattr(preprocessor, "tokenizer", preprocessor)
    return getattr(tokenizer, name, None)


def _texts(inputs):
    return [_as_text(text) for text in np.asarray(inputs, dtype=object).ravel()]


def _as_text(text):
    if hasattr(text, "numpy"):
        text = text.numpy()
    return text.decode() if isinstance(text, bytes) else str(text)
