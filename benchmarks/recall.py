"""Checks that every update rule learns to recall: associative recall with many queries.

A sequence lists 4 pairs of a key and a value, no key twice, and then asks 10 times for
one of the keys, drawn at random, each followed by its value once more:

    k3 v7  k0 v2  k9 v2  k5 v1   k9 v2  k3 v7  k9 v2 ...
                                 ^      ^      ^  at these, name the next token

There are 16 keys and 16 values. Guessing any value is right 1 time in 16, guessing one
of those in the sequence about 1 time in 4. A model of one MoMLayer is trained with
`model.fit` on fresh sequences and measured on 512 others. All rules share the task,
the model and the number of steps. The command fails if a rule misses the accuracy in
`STATED`, which holds on every backend.

    KERAS_BACKEND=torch python benchmarks/recall.py --rules gla delta_net

Source of the task: arXiv 2312.04927, made small.
"""

import argparse
import os
import sys
import time

import numpy as np

KEYS, VALUES = 16, 16  # tokens that are keys, and behind them those that are values
PAIRS, QUERIES = 4, 10  # in a sequence
LENGTH = 2 * (PAIRS + QUERIES)
WIDTH, HEADS, KEY_DIM = 64, 2, 16
MEMORIES, TOP_K = 2, 1  # and the shared memory
BATCH, STEPS, TESTED = 64, 250, 512
LEARNING_RATE = 0.015

# Accuracy that a rule reaches at least, on every backend.
STATED = {
    "delta_net": 0.95,
    "gated_delta_net": 0.95,
    "gla": 0.95,
    "gsa": 0.90,
    "hgrn2": 0.90,
    "kda": 0.90,
    "lightning": 0.95,
    "linear_attention": 0.95,
    "mamba2": 0.85,
    "retention": 0.95,
    "rwkv6": 0.90,
    "rwkv7": 0.90,
    "titans": 0.95,
    "ttt": 0.95,
}


def stated_accuracy(rule):
    """The rule's entry in `STATED`.

    Raises:
        ValueError: if there is none.
    """
    if rule not in STATED:
        raise ValueError(
            f"No accuracy is stated for the update rule {rule!r}: measure it with "
            "`train_and_test`, and add it to `STATED` in benchmarks/recall.py"
        )
    return STATED[rule]


def draw_sequences(rng, count):
    """Sequences with what is to be answered.

    Returns:
        tokens: int32 `[count, LENGTH]`; values are numbered behind the keys.
        answers: int32 `[count, LENGTH]`, the value asked for, 0 to VALUES - 1, where
            there is a question.
        asked: float32 `[count, LENGTH]`, 1 where there is a question, else 0.
    """
    keys = np.argsort(rng.random((count, KEYS)), axis=1)[:, :PAIRS]
    values = rng.integers(VALUES, size=(count, PAIRS))
    queries = rng.integers(PAIRS, size=(count, QUERIES))
    pairs = np.stack([keys, KEYS + values], axis=-1)
    questions = np.take_along_axis(pairs, queries[..., None], axis=1)
    tokens = np.concatenate([pairs, questions], axis=1).reshape(count, LENGTH)
    asked = np.zeros((count, LENGTH), "float32")
    asked[:, 2 * PAIRS :: 2] = 1
    answers = np.zeros((count, LENGTH), "int32")
    answers[:, 2 * PAIRS :: 2] = np.take_along_axis(values, queries, axis=1)
    return tokens.astype("int32"), answers, asked


def build_model(rule):
    """Tokens `[B, LENGTH]` to logits of the values `[B, LENGTH, VALUES]`."""
    import keras

    import keras_mom

    tokens = keras.Input((LENGTH,), dtype="int32")
    # Large enough to be told apart from the first step on.
    embeddings = keras.initializers.RandomNormal(stddev=1.0)
    x = keras.layers.Embedding(KEYS + VALUES, WIDTH, embeddings_initializer=embeddings)(
        tokens
    )
    # As many slots as the other rules have key channels, instead of 64.
    update_rule = keras_mom.rules.GSA(num_slots=KEY_DIM) if rule == "gsa" else rule
    memories = keras_mom.MoMLayer(
        HEADS, KEY_DIM, num_memories=MEMORIES, top_k=TOP_K, update_rule=update_rule
    )
    x = x + memories(keras.layers.RMSNormalization()(x))
    logits = keras.layers.Dense(VALUES)(keras.layers.RMSNormalization()(x))
    return keras.Model(tokens, logits)


def train_and_test(rule, seed=0):
    """Accuracy, 0 to 1, on sequences that were not trained on."""
    import keras

    keras.utils.set_random_seed(seed)
    rng = np.random.default_rng(seed)
    model = build_model(rule)
    decay = keras.optimizers.schedules.CosineDecay(LEARNING_RATE, STEPS, alpha=0.05)
    model.compile(
        keras.optimizers.Adam(decay),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    tokens, answers, asked = draw_sequences(rng, STEPS * BATCH)
    model.fit(
        tokens, answers, sample_weight=asked, batch_size=BATCH, shuffle=False, verbose=0
    )
    tokens, answers, asked = draw_sequences(rng, TESTED)
    named = model.predict(tokens, batch_size=BATCH, verbose=0).argmax(axis=-1)
    return float(np.average(named == answers, weights=asked))


def main():
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # Torch's threads cost more than they gain on tensors this small.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import keras

    import keras_mom

    names = keras_mom.rules.names()
    parser = argparse.ArgumentParser(description="Checks that every rule can recall")
    parser.add_argument("--rules", nargs="+", choices=names, default=names)
    parser.add_argument("--list", action="store_true", help="stated accuracies, no run")
    arguments = parser.parse_args()
    stated = {rule: stated_accuracy(rule) for rule in arguments.rules}
    if arguments.list:
        for rule, accuracy in stated.items():
            print(f"{rule:<20}{accuracy:>8.2f}")
        return
    print(f"backend {keras.config.backend()}, guessing {1 / PAIRS:.2f}")
    print(f"{'rule':<20}{'accuracy':>10}{'stated':>8}{'seconds':>9}")
    missed = []
    for rule in arguments.rules:
        start = time.perf_counter()
        accuracy = train_and_test(rule)
        seconds = time.perf_counter() - start
        note = "" if accuracy >= stated[rule] else "  missed"
        print(
            f"{rule:<20}{accuracy:>10.3f}{stated[rule]:>8.2f}{seconds:>9.1f}{note}",
            flush=True,
        )
        if note:
            missed.append(rule)
    if missed:
        sys.exit(f"Below the stated accuracy: {', '.join(missed)}")


if __name__ == "__main__":
    main()
