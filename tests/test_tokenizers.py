"""Tokenizers: there and back, their ids, and text from tokens that come one by one."""

import json
import random

import keras
import numpy as np
import pytest

from keras_mom.models import ByteTokenizer, HuggingFaceTokenizer, tokenizers
from keras_mom.models.streaming import TextStream

TEXTS = ["plain", "", "Grüße, 世界 🎈!", "a\x00b\n"]


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_there_and_back(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.tokenize(text) == list(text.encode())
    assert tokenizer.detokenize(tokenizer.tokenize(text)) == text
    started = ByteTokenizer(add_start_token=True)
    assert started.tokenize(text) == [257, *text.encode()]
    assert started.detokenize(started.tokenize(text)) == text


def test_bytes_of_no_character_and_special_tokens():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([257, 65, 0xFF, 66, 258, 256, 300]) == "A\ufffdB"
    assert tokenizer.vocabulary_size() == 259
    ids = (tokenizer.pad_token_id, tokenizer.start_token_id, tokenizer.end_token_id)
    assert sorted(ids) == [256, 257, 258]


def test_batches():
    tokenizer = ByteTokenizer()
    assert tokenizer.tokenize(["ab", "c"]) == [[97, 98], [99]]
    assert tokenizer.detokenize(np.array([[97, 98], [99, 256]])) == ["ab", "c"]
    batch = tokenizer(["ab", "c"], add_end_token=True)
    assert batch["token_ids"].tolist() == [[97, 98, 258], [99, 258, 256]]
    assert batch["padding_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["token_ids"].dtype == batch["padding_mask"].dtype == np.int32
    batch = tokenizer(["abc", "d"], sequence_length=2)
    assert batch["token_ids"].tolist() == [[97, 98], [100, 256]]
    assert tokenizer("ab", sequence_length=3)["padding_mask"].tolist() == [1, 1, 0]


def test_preprocessor_protocol():
    tokenizer = ByteTokenizer()
    assert tokenizer.tokenizer is tokenizer
    batch = tokenizer.generate_preprocess(["ab", "c"], sequence_length=4)
    assert batch["token_ids"].shape == (2, 4)
    assert tokenizer.generate_postprocess(batch) == ["ab", "c"]


def test_byte_serialization():
    tokenizer = ByteTokenizer(add_start_token=True)
    again = keras.saving.deserialize_keras_object(
        json.loads(json.dumps(keras.saving.serialize_keras_object(tokenizer)))
    )
    assert again.tokenize("x") == [257, 120]


def joined(stream, token_ids):
    pieces = [stream.push(token_id) for token_id in token_ids]
    return pieces, "".join(pieces) + stream.close()


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["bytes", "any"])
def test_stream_of_whole_characters(kind, text):
    tokenizer = ByteTokenizer()
    stream = {
        "bytes": tokenizer.text_stream,
        "any": lambda: TextStream(tokenizer.decode),
    }[kind]()
    pieces, whole = joined(stream, [257, *tokenizer.tokenize(text), 258])
    assert whole == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_stream_of_any_bytes():
    tokenizer = ByteTokenizer()
    generator = random.Random(0)
    for _ in range(50):
        token_ids = [generator.choice([65, 0xC3, 0xA4, 0xF0, 258]) for _ in range(9)]
        _, whole = joined(tokenizer.text_stream(), token_ids)
        assert whole == tokenizer.decode(token_ids)


def test_stream_keeps_what_came_before_a_piece():
    """Some tokenizers drop the space before the first token of what they decode."""

    def decode(token_ids):
        return " ".join("word" for _ in token_ids)

    pieces, whole = joined(TextStream(decode), range(4))
    assert pieces == ["word", " word", " word", " word"]
    assert whole == "word word word word"


def test_stream_holds_few_tokens():
    longest = 0

    def decode(token_ids):
        nonlocal longest
        longest = max(longest, len(token_ids))
        return "".join(chr(x) for x in token_ids if x)

    _, whole = joined(TextStream(decode), [65] * 100 + [0] * 100 + [66] * 100)
    assert whole == "A" * 100 + "B" * 100
    assert longest < 12


@pytest.fixture(scope="module")
def hugging_face():
    """A small byte-level BPE, trained here."""
    library = pytest.importorskip("tokenizers")
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["the cat sat on the mat " * 20], trainer)
    tokenizer.enable_padding(length=20)
    tokenizer.enable_truncation(3)
    return tokenizer


def adapter(tokenizer):
    return HuggingFaceTokenizer(
        tokenizer, pad_token="<pad>", start_token=1, end_token="</s>"
    )


@pytest.mark.parametrize("text", TEXTS)
def test_hugging_face_there_and_back(hugging_face, text, tmp_path):
    tokenizer = adapter(hugging_face)
    token_ids = tokenizer.tokenize(text)
    assert tokenizer.detokenize(token_ids) == text
    assert tokenizer.detokenize([1, *token_ids, 2, 0]) == text
    assert (tokenizer.pad_token_id, tokenizer.start_token_id) == (0, 1)
    assert tokenizer.end_token_id == 2
    assert max(token_ids, default=0) < tokenizer.vocabulary_size()
    _, whole = joined(tokenizer.text_stream(), token_ids)
    assert whole == text
    # The tokenizer given keeps its own settings.
    assert hugging_face.truncation is not None and hugging_face.padding is not None


def test_hugging_face_forms_and_serialization(hugging_face, tmp_path):
    tokenizer = adapter(hugging_face)
    path = tmp_path / "tokenizer.json"
    hugging_face.save(str(path))
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(tokenizer)))
    again = keras.saving.deserialize_keras_object(config)
    assert again.get_config() == tokenizer.get_config()
    for other in (again, adapter(path), adapter(str(path)), adapter(path.read_text())):
        assert other.tokenize("the mat") == tokenizer.tokenize("the mat")
    as_given = tokenizers.as_preprocessor(hugging_face)
    assert as_given.tokenize("the mat") == tokenizer.tokenize("the mat")
    with pytest.raises(ValueError, match="`end_token` must .*Received: .*'<end>'"):
        HuggingFaceTokenizer(hugging_face, end_token="<end>")


class Words:
    """A tokenizer of KerasHub's protocol."""

    pad_token_id = 0
    end_token_id = 2
    words = ["<pad>", "<s>", "</s>", "one", "two"]
    special_token_ids = [0, 1, 2]

    def tokenize(self, text):
        return np.array([self.words.index(word) for word in text.split()])

    def detokenize(self, token_ids):
        return " ".join(self.words[token_id] for token_id in token_ids)


def test_tokenizer_protocol_of_keras_hub():
    preprocessor = tokenizers.as_preprocessor(Words())
    assert tokenizers.token_id(preprocessor, "end_token_id") == 2
    assert preprocessor.generate_preprocess(["one two", "two"]) == [[3, 4], [4]]
    batch = {
        "token_ids": np.array([[3, 4, 2], [4, 2, 0]]),
        "padding_mask": np.array([[1, 1, 1], [1, 1, 0]]),
    }
    assert preprocessor.generate_postprocess(batch) == ["one two", "two"]
    _, whole = joined(tokenizers.text_stream(preprocessor), [3, 4, 2])
    assert whole == "one two"
    assert tokenizers.as_preprocessor(None) is None
    own = ByteTokenizer()
    assert tokenizers.as_preprocessor(own) is own
    with pytest.raises(ValueError, match="`preprocessor` must .*Received: .*int"):
        tokenizers.as_preprocessor(7)
