"""Generation equals reading the whole sequence again at each step."""

import functools
import gc
import itertools
import weakref

import keras
import numpy as np
import pytest
from keras import ops

from keras_mom import backend
from keras_mom.models import (
    ByteTokenizer,
    MoMBackbone,
    MoMCausalLM,
    decoding,
    prompts,
    samplers,
)
from tests.layer_helpers import BACKEND, to_numpy

LENGTH = 16  # of whatever is read or written here, so that little is compiled


def make_lm(vocabulary_size, num_layers, seed=0, preprocessor=None, **kwargs):
    """A language model with weights at which every part matters."""
    backbone = MoMBackbone(
        vocabulary_size, num_layers, 8, num_heads=2, key_dim=4, num_memories=3, **kwargs
    )
    rng = np.random.default_rng(seed)
    for variable in backbone.trainable_variables:
        value = rng.normal(size=variable.shape)
        if len(variable.shape) > 1 and "convolution" not in variable.path:
            value *= 1.5 / np.sqrt(variable.shape[-2])
        if "norm" in variable.path:
            value = 1 + 0.3 * value
        variable.assign(value.astype("float32"))
    return MoMCausalLM(backbone, preprocessor)


@pytest.fixture(scope="module")
def mom():
    return make_lm(259, 1, preprocessor=ByteTokenizer())


@pytest.fixture(scope="module")
def hybrid():
    """Attention, and documents packed in a row."""
    return make_lm(11, 2, attention_layers=[1], num_key_value_heads=1, packed=True)


@pytest.fixture(params=["mom", "hybrid"])
def lm(request):
    return request.getfixturevalue(request.param)


def logits_of(lm, token_ids, mask, segment_ids=None):
    """The logits of whole sequences `[B, T]`; T is made the same for all."""
    batch, length = token_ids.shape
    inputs = {"token_ids": token_ids, "padding_mask": mask}
    if "segment_ids" in lm.backbone.input:
        zeros = np.zeros_like(token_ids)
        inputs["segment_ids"] = zeros if segment_ids is None else segment_ids
    # Padded to one shape, which causal models do not notice.
    whole = {name: np.zeros((3, LENGTH), "int32") for name in inputs}
    for name, value in inputs.items():
        whole[name][:batch, :length] = value
    return np.array(lm.predict_on_batch(whole))[:batch, :length]


def go_on(lm, token_ids, mask, columns, length, segment_ids=None):
    """Greedy text by reading everything again for each token.

    Row b goes on from column `columns[b]`; all other columns stay as they are.
    """
    width = token_ids.shape[1]
    token_ids, mask, segments = (
        np.pad(x, ((0, 0), (0, length - width)))
        for x in (token_ids, mask, mask if segment_ids is None else segment_ids)
    )
    for step in range(length):
        logits = logits_of(lm, token_ids, mask, segments)
        for row, first in enumerate(columns):
            column = first + step
            if column < length:
                token_ids[row, column] = logits[row, column - 1].argmax()
                mask[row, column] = 1
                segments[row, column] = segments[row, column - 1]
    return token_ids, mask, segments


def random_tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(1, 11, size=shape).astype("int32")


def rerun(lm, rows, length):
    """`go_on` of rows of unequal length: a list of lists."""
    token_ids = np.zeros((len(rows), max(map(len, rows))), "int32")
    mask = np.zeros_like(token_ids)
    for index, row in enumerate(rows):
        token_ids[index, : len(row)] = row
        mask[index, : len(row)] = 1
    columns = [len(row) for row in rows]
    return go_on(lm, token_ids, mask, columns, length)[0].tolist()


UNEQUAL = [[1, 2, 3, 4, 5, 6, 3, 1, 4], [5, 6], [7]]


# Greedy text, in every kind of prompts.


def test_array(lm):
    given = random_tokens(3, 5)
    kept = given.copy()
    result = lm.generate(given, max_length=LENGTH)
    assert isinstance(result, np.ndarray) and result.dtype == np.int32
    assert result.tolist() == rerun(lm, given.tolist(), LENGTH)
    assert (given == kept).all()
    # Not one token again and again, which many an error would not change.
    assert min(len(set(row)) for row in result.tolist()) > 2
    assert lm.generate(given, max_length=5).tolist() == given.tolist()


def test_unequal_lists(lm):
    result = lm.generate(UNEQUAL, max_length=LENGTH)
    assert result == rerun(lm, UNEQUAL, LENGTH)
    # Rows do not know of each other.
    assert lm.generate(UNEQUAL[::-1], max_length=LENGTH) == result[::-1]


@pytest.mark.parametrize("side", ["right", "left", "anywhere"])
def test_padded_dict(lm, side):
    given = random_tokens(3, 9, seed=1)
    mask = np.ones_like(given)
    for row, size in enumerate([0, 3, 8]):
        places = {
            "right": slice(9 - size, 9),
            "left": slice(0, size),
            "anywhere": np.random.default_rng(row).permutation(9)[:size],
        }[side]
        mask[row, places] = 0
    columns = [int(np.flatnonzero(row)[-1]) + 1 for row in mask]
    expected, expected_mask, _ = go_on(lm, given, mask, columns, LENGTH)
    inputs = {"token_ids": given, "padding_mask": mask}
    result = lm.generate(inputs, max_length=LENGTH)
    assert set(result) == {"token_ids", "padding_mask"}
    assert (result["padding_mask"] == expected_mask).all()
    assert (result["token_ids"] == expected).all()
    # Without a length, the columns that there are.
    within = lm.generate(inputs)
    assert (within["token_ids"] == expected[:, :9]).all()


def test_packed_documents(hybrid):
    given = random_tokens(3, 9, seed=2)
    mask = np.ones_like(given)
    mask[1, 6:] = 0
    mask[2, :2] = 0
    segments = np.array([[0] * 4 + [3] * 5, [1] * 5 + [2] * 4, [0] * 8 + [1]], "int32")
    expected = go_on(hybrid, given, mask, [9, 6, 9], LENGTH, segments)
    inputs = {"token_ids": given, "padding_mask": mask, "segment_ids": segments}
    result = hybrid.generate(inputs, max_length=LENGTH)
    assert (result["token_ids"] == expected[0]).all()
    assert (result["padding_mask"] == expected[1]).all()
    assert (result["segment_ids"] * expected[1] == expected[2] * expected[1]).all()
    # The documents before change nothing, and they would without segment ids.
    alone = hybrid.generate(
        {name: inputs[name] for name in ("token_ids", "padding_mask")},
        max_length=LENGTH,
    )
    assert (alone["token_ids"] != result["token_ids"]).any()


def test_single_prompt(mom):
    whole = mom.generate([UNEQUAL[0], [1], [1]], max_length=LENGTH)[0]
    assert mom.generate(UNEQUAL[0], max_length=LENGTH) == whole
    given = np.array(UNEQUAL[0])
    assert mom.generate(given, max_length=LENGTH).tolist() == whole
    stripped = mom.generate(given, max_length=LENGTH, strip_prompt=True)
    assert stripped.tolist() == whole[len(given) :]


def test_texts(mom):
    texts = ["The cat", "on", "x"]
    ids = [list(text.encode()) for text in texts]
    expected = [ByteTokenizer().decode(row) for row in rerun(mom, ids, LENGTH)]
    assert mom.generate(texts, max_length=LENGTH) == expected
    assert mom.generate("The cat", max_length=LENGTH) == expected[0]
    assert mom.generate(np.array(texts), max_length=LENGTH) == expected
    new = mom.generate(texts, max_length=LENGTH, strip_prompt=True)
    assert [a + b for a, b in zip(texts, new)] == expected


# How it is done.


def test_prompts_in_pieces(hybrid, monkeypatch):
    """Pieces change nothing, have one shape, and end before the last token."""
    pieces = []
    read = hybrid.backbone.call_with_cache
    expected = hybrid.generate(UNEQUAL, max_length=LENGTH)

    def watched(token_ids, cache, *args, **kwargs):
        if token_ids.shape[1] > 1:
            pieces.append(tuple(token_ids.shape))
        return read(token_ids, cache, *args, **kwargs)

    monkeypatch.setattr(hybrid.backbone, "call_with_cache", watched)
    result = hybrid.generate(UNEQUAL, max_length=LENGTH, prefill_length=4)
    assert result == expected
    # A compiled piece is traced once.
    assert pieces == [(3, 4)] * (2 if BACKEND == "torch" else 1)


def test_every_token_is_read_once(mom, monkeypatch):
    valid = []
    read = mom.backbone.call_with_cache

    def watched(token_ids, cache, padding_mask=None, *args, **kwargs):
        hidden, cache = read(token_ids, cache, padding_mask, *args, **kwargs)
        valid.append(cache["position"])
        return hidden, cache

    if BACKEND == "torch":
        monkeypatch.setattr(mom.backbone, "call_with_cache", watched)
        mom.generate(UNEQUAL, max_length=LENGTH)
        # The last token that was written is not read.
        assert to_numpy(valid[-1]).tolist() == [LENGTH - 1] * 3
    else:
        given = prompts.read(UNEQUAL, LENGTH, 0, None)
        task = decoding.Task(given.rows, given.room, [], 0, 0)
        cache = mom._read_prompts(given, 512)
        assert to_numpy(cache["position"]).tolist() == [len(x) - 1 for x in UNEQUAL]
        steps = decoding.tokens(mom, samplers.GreedySampler(), task, cache, 16)
        assert sum((step >= 0).sum() for step in steps) == 3 * LENGTH - 12


def test_nothing_is_compiled_again(mom, hybrid, monkeypatch):
    """Neither as text grows, nor for other prompts, lengths, stops and seeds."""
    traces = []

    def watched(*args, **kwargs):
        traces.append(1)
        return read(*args, **kwargs)

    lm = hybrid
    read = lm.call_with_cache
    if BACKEND != "torch":
        monkeypatch.setattr(lm, "call_with_cache", watched)
    else:
        lm = mom  # Attention would be several graphs.
        monkeypatch.setattr(lm, "jit_compile", True)
        monkeypatch.setattr("torch.compile", _count_compilations(traces))
    sampler = samplers.TopKSampler(k=3, seed=1)
    expected = lm.generate(UNEQUAL, 14, sampler)
    assert len(traces) == 1
    lm.generate(UNEQUAL, 60, sampler)
    lm.generate(random_tokens(3, 8), 20, sampler, stop_token_ids=[1, 2])
    lm.generate(UNEQUAL, 16, samplers.TopKSampler(k=3, seed=4), seed=5)
    assert lm.generate(UNEQUAL, 14, sampler) == expected
    assert len(traces) == 1
    if BACKEND != "torch":  # which takes seconds for it
        lm.generate(UNEQUAL, 14, samplers.TopKSampler(k=4, seed=1))
        assert len(traces) == 2


def _count_compilations(traces):
    """`torch.compile` that traces only, and notes each graph."""
    import torch

    def backend(graph, inputs):
        traces.append(1)
        return graph.forward

    return functools.partial(torch.compile, backend=backend, fullgraph=True)


def test_changed_weights_and_samplers_are_seen(mom):
    before = mom.generate(UNEQUAL, max_length=LENGTH)
    kept = mom.get_weights()
    try:
        mom.set_weights(make_lm(259, 1, seed=9).get_weights())
        after = mom.generate(UNEQUAL, max_length=LENGTH)
        assert after != before
        assert after == rerun(mom, UNEQUAL, LENGTH)
    finally:
        mom.set_weights(kept)
    assert mom.generate(UNEQUAL, max_length=LENGTH) == before
    sampler = samplers.TopKSampler(k=1, seed=0)
    mom.sampler = sampler
    try:
        assert mom.generate(UNEQUAL, max_length=LENGTH) == before
        sampler.k = 200
        assert mom.generate(UNEQUAL, max_length=LENGTH) != before
        mom.sampler = "greedy"
        assert mom.generate(UNEQUAL, max_length=LENGTH) == before
    finally:
        mom.sampler = None


def test_programs_keep_no_model_and_a_model_keeps_none():
    lm = make_lm(11, 1)
    attributes = set(vars(lm))
    decoding.program(lm, "prefill", decoding._make_prefill)
    assert set(vars(lm)) == attributes
    gone = weakref.ref(lm)
    del lm
    gc.collect()
    assert gone() is None


# Stop tokens, random samplers, beams.


def test_stop_tokens(mom):
    whole = mom.generate(UNEQUAL, max_length=LENGTH)
    stop = whole[0][11]
    expected = []
    for row, given in zip(whole, UNEQUAL):
        new = row[len(given) :]
        ended = new.index(stop) + 1 if stop in new else len(new)
        expected.append(given + new[:ended])
    assert len(expected[0]) <= 12
    for stops in (stop, [stop], (stop, 258)):
        assert mom.generate(UNEQUAL, LENGTH, stop_token_ids=stops) == expected
    array = mom.generate(np.array([UNEQUAL[0]] * 3), LENGTH, stop_token_ids=stop)
    rest = LENGTH - len(expected[0])
    assert array[0].tolist() == expected[0] + [ByteTokenizer.pad_token_id] * rest
    width = len(UNEQUAL[0])
    token_ids, mask = np.zeros((2, 3, width), "int32")
    for index, row in enumerate(UNEQUAL):
        token_ids[index, : len(row)] = row
        mask[index, : len(row)] = 1
    inputs = {"token_ids": token_ids, "padding_mask": mask}
    result = mom.generate(inputs, LENGTH, stop_token_ids=stop)
    for row, there, right in zip(*result.values(), expected):
        assert row[there == 1].tolist() == right
        assert there.tolist() == [1] * len(right) + [0] * (LENGTH - len(right))


def test_stop_token_of_the_preprocessor(mom, monkeypatch):
    whole = mom.generate(["The cat", "x", "y"], max_length=LENGTH, strip_prompt=True)
    first = mom.generate([list(b"The cat"), [120], [121]], max_length=LENGTH)[0][7]
    monkeypatch.setattr(ByteTokenizer, "end_token_id", first)
    stopped = mom.generate(
        ["The cat", "x", "y"], LENGTH, stop_token_ids="auto", strip_prompt=True
    )
    assert len(stopped[0]) <= 1 < len(whole[0])


def test_seed_decides_streamed_or_not(mom):
    arguments = dict(max_length=LENGTH, sampler=samplers.TopKSampler(k=100))
    one = mom.generate(UNEQUAL, **arguments, seed=1)
    assert mom.generate(UNEQUAL, **arguments, seed=1) == one
    assert mom.generate(UNEQUAL, **arguments, seed=2) != one
    assert mom.generate(UNEQUAL, **arguments) != mom.generate(UNEQUAL, **arguments)
    steps = list(mom.stream(UNEQUAL, **arguments, seed=1))
    assert len(steps) == LENGTH - 1
    for row, prompt, whole in zip(zip(*steps), UNEQUAL, one):
        new = [token for token in row if token is not None]
        assert prompt + new == whole
        # A row that has ended stays so.
        assert list(row[: len(new)]) == new
    keras.utils.set_random_seed(3)
    first = mom.generate(UNEQUAL, **arguments)
    keras.utils.set_random_seed(3)
    assert mom.generate(UNEQUAL, **arguments) == first


def test_stream_of_text(mom):
    arguments = dict(max_length=LENGTH, sampler="random", seed=4)
    text = mom.generate("The cat", **arguments, strip_prompt=True)
    pieces = list(mom.stream("The cat", **arguments))
    assert "".join(pieces) == text and all(pieces)
    texts = ["The cat", "on", "x"]
    steps = list(mom.stream(texts, **arguments))
    new = mom.generate(texts, **arguments, strip_prompt=True)
    for row, whole in zip(zip(*steps), new):
        assert "".join(piece for piece in row if piece is not None) == whole
    assert [piece is None for piece in steps[-1]] == [True, True, False]


def test_beams_find_the_best_of_all(hybrid):
    """As many beams as tokens find the best pair of tokens."""
    rows = [[1, 2, 3], [4], [5, 6]]
    size = 11
    result = hybrid.generate(
        [row for row in rows], 5, samplers.BeamSampler(num_beams=size)
    )
    row = rows[0]
    pairs = np.array(
        [row + list(pair) for pair in itertools.product(range(size), repeat=2)]
    )
    scores = []
    for start in range(0, len(pairs), 3):
        part = pairs[start : start + 3].astype("int32")
        logits = logits_of(hybrid, part, np.ones_like(part)).astype("float64")
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        taken = np.take_along_axis(logits[:, 2:4], part[:, 3:, None], -1)
        scores += taken.sum((1, 2)).tolist()
    assert result[0] == pairs[int(np.argmax(scores))].tolist()


def test_one_beam_is_greedy_and_stops(hybrid):
    one = samplers.BeamSampler(num_beams=1)
    stop = hybrid.generate(UNEQUAL, LENGTH)[0][11]
    greedy = hybrid.generate(UNEQUAL, LENGTH, "greedy", stop_token_ids=stop)
    assert hybrid.generate(UNEQUAL, LENGTH, one, stop_token_ids=stop) == greedy
    assert len(greedy[0]) <= 12


# KerasHub's protocols.


def test_generate_step(mom):
    sampler = "random"
    token_ids, mask = np.zeros((2, 3, LENGTH), "int32")
    for index, row in enumerate(UNEQUAL):
        token_ids[index, : len(row)] = row
        mask[index, : len(row)] = 1
    inputs = {"token_ids": token_ids, "padding_mask": mask}
    stop = mom.generate(UNEQUAL, LENGTH, sampler, seed=0)[0][11]
    expected = mom.generate(inputs, LENGTH, sampler, stop, seed=0)
    mom.sampler = sampler
    try:
        run = backend.decoding_program(
            lambda carry, inputs: (carry, mom.generate_step(inputs, (stop,))),
            tuple(mom.weights),
            (),
            # TensorFlow takes long to compile it.
            jit_compile=BACKEND == "jax",
        )
        result = to_numpy(
            run((), keras.tree.map_structure(ops.convert_to_tensor, inputs))[1]
        )
    finally:
        mom.sampler = None
    mask = result["padding_mask"].astype("int32")
    assert (mask == expected["padding_mask"]).all()
    assert (mask * result["token_ids"] == mask * expected["token_ids"]).all()


class WithState:
    """A sampler of KerasHub's protocol, with a state."""

    def __init__(self):
        self.generator = keras.random.SeedGenerator(0)
        self.variables = [self.generator.state]

    def compute_probabilities(self, logits):
        return ops.softmax(logits)

    def get_next_token(self, probabilities):
        logits = ops.log(probabilities)
        drawn = keras.random.categorical(logits, 1, seed=self.generator)
        return ops.squeeze(drawn, axis=-1)


def test_sampler_with_a_state(mom):
    sampler = WithState()
    before = to_numpy(sampler.generator.state).tolist()
    one = mom.generate(UNEQUAL, LENGTH, sampler)
    assert mom.generate(UNEQUAL, LENGTH, sampler) != one
    after = to_numpy(sampler.generator.state).tolist()
    assert after != before
    sampler.generator.state.assign(before)
    assert mom.generate(UNEQUAL, LENGTH, sampler) == one
    with pytest.raises(ValueError, match="`seed` .*Received: seed=1"):
        mom.generate(UNEQUAL, LENGTH, sampler, seed=1)


def test_samplers_of_keras_hub(mom):
    keras_hub = pytest.importorskip("keras_hub")
    greedy = mom.generate(UNEQUAL, LENGTH)
    assert mom.generate(UNEQUAL, LENGTH, keras_hub.samplers.GreedySampler()) == greedy
    # Those that run the loop themselves.
    one = keras_hub.samplers.BeamSampler(num_beams=1)
    assert mom.generate(UNEQUAL, LENGTH, one) == greedy
    contrastive = keras_hub.samplers.ContrastiveSampler(k=1, alpha=0.0)
    assert mom.generate(UNEQUAL, LENGTH, contrastive) == greedy


def test_preprocessor_of_keras_hub():
    keras_hub = pytest.importorskip("keras_hub")
    vocabulary = {"<|endoftext|>": 0}
    for token in [*"abcde\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}", "ab"]:
        vocabulary[token] = len(vocabulary)
    tokenizer = keras_hub.models.GPT2Tokenizer(vocabulary, merges=["a b"])
    preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(
        tokenizer, sequence_length=LENGTH
    )
    lm = make_lm(len(vocabulary), 1, preprocessor=preprocessor)
    texts = ["ab cd", "e", "ba"]
    inputs = preprocessor.generate_preprocess(texts)
    expected = preprocessor.generate_postprocess(lm.generate(inputs))
    assert [text[: len(given)] for text, given in zip(expected, texts)] == texts
    assert lm.generate(texts) == expected
    assert max(map(len, expected)) > 12
    steps = list(lm.stream(texts))
    new = ["".join(filter(None, pieces)) for pieces in zip(*steps)]
    assert [a + b for a, b in zip(texts, new)] == expected
    # The tokenizer alone adds no start token.
    lm.preprocessor = tokenizer
    assert all(map(str.startswith, lm.generate(texts, LENGTH), texts))


def test_compiled_sampler_is_the_default_and_saved(mom, tmp_path):
    sampler = samplers.TopKSampler(k=100, seed=5)
    expected = mom.generate(UNEQUAL, LENGTH, sampler)
    greedy = mom.generate(UNEQUAL, LENGTH)
    assert expected != greedy
    mom.compile(sampler=sampler)
    try:
        assert mom.generate(UNEQUAL, LENGTH) == expected
        mom.save(tmp_path / "lm.keras")
    finally:
        mom.compile()
    assert mom.generate(UNEQUAL, LENGTH) == greedy
    again = keras.models.load_model(tmp_path / "lm.keras")
    assert again.sampler.get_config() == sampler.get_config()
    if BACKEND == "torch":  # Elsewhere it would be compiled once more.
        assert again.generate(UNEQUAL, LENGTH) == expected


# Bad input.

DICT = {"token_ids": [[1, 2]], "padding_mask": [[1, 1]]}


@pytest.mark.parametrize(
    "given, arguments, message",
    [
        ([[1]], {}, "max_length"),
        ([[1]], {"max_length": 0}, "max_length"),
        ([[1]], {"max_length": 2.5}, "max_length"),
        ([[1, 2, 3]], {"max_length": 2}, "max_length"),
        ([], {"max_length": 2}, "prompts"),
        ([[1], []], {"max_length": 2}, "prompts"),
        (np.zeros((2, 0), "int32"), {"max_length": 2}, "prompts"),
        (np.zeros((2, 2, 2), "int32"), {"max_length": 2}, "prompts"),
        (np.zeros((2, 2)), {"max_length": 2}, "prompts"),
        ([[0.5]], {"max_length": 2}, "prompts"),
        ([[11]], {"max_length": 2}, "prompts"),
        ([[-1]], {"max_length": 2}, "prompts"),
        ("text", {"max_length": 9}, "prompts"),
        ({"token_ids": [[1]], "mask": [[1]]}, {"max_length": 2}, "prompts"),
        ({"padding_mask": [[1]]}, {"max_length": 2}, "prompts"),
        ({**DICT, "padding_mask": [[1]]}, {"max_length": 3}, "padding_mask"),
        ({**DICT, "padding_mask": [[0, 0]]}, {"max_length": 3}, "prompts"),
        ([[1]], {"max_length": 2, "sampler": "nothing"}, "sampler"),
        ([[1]], {"max_length": 2, "stop_token_ids": "auto"}, "stop_token_ids"),
        ([[1]], {"max_length": 2, "stop_token_ids": "end"}, "stop_token_ids"),
        ([[1]], {"max_length": 2, "stop_token_ids": [0.5]}, "stop_token_ids"),
        ([[1]], {"max_length": 2, "stop_token_ids": -1}, "stop_token_ids"),
        ([[1]], {"max_length": 2, "prefill_length": 0}, "prefill_length"),
    ],
)
@pytest.mark.parametrize("method", ["generate", "stream"])
def test_bad_input(hybrid, method, given, arguments, message):
    with pytest.raises(ValueError, match=rf"`{message}"):
        getattr(hybrid, method)(given, **arguments)


def test_beams_are_not_streamed(hybrid):
    with pytest.raises(ValueError, match="`sampler` .*Received: BeamSampler"):
        hybrid.stream([[1]], max_length=2, sampler="beam")
