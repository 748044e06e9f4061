"""A byte-level language model of Mixture-of-Memories blocks, on a CPU in minutes.

It learns from the sources of the standard library of the Python that runs it, is
measured beside unigram and bigram models, writes text from a state of constant size,
and is saved and loaded again.

    python examples/quickstart.py                        # on JAX
    KERAS_BACKEND=torch python examples/quickstart.py    # or tensorflow
"""

import argparse
import os
import pathlib
import sys
import sysconfig
import time

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np

import keras_mom

VOCABULARY = 256  # bytes
WIDTH = 128
LAYERS = 2
WINDOW = 256  # bytes in a training example
BATCH = 4
HELD_OUT = 200 * WINDOW  # bytes
PROMPT = "class Reader:\n    def __init__(self, "


def read_corpus(limit=2_000_000):
    """The top-level modules of the standard library: (training, held-out) bytes."""
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    text = np.frombuffer(text[:limit], dtype="uint8").astype("int32")
    return text[: -HELD_OUT - 1], text[-HELD_OUT - 1 :]


def training_batches(text, rng):
    """Windows at random places, for ever; the target is the input one byte later."""
    while True:
        starts = rng.integers(0, len(text) - WINDOW, size=(BATCH, 1))
        windows = text[starts + np.arange(WINDOW + 1)]
        yield windows[:, :-1], windows[:, 1:]


def ngram_probabilities(text, inputs, targets):
    """Of each target, by a unigram (add-one) and a bigram model of the text."""
    unigram = np.bincount(text, minlength=VOCABULARY) + 1.0
    unigram /= unigram.sum()
    pairs = np.bincount(text[:-1] * VOCABULARY + text[1:], minlength=VOCABULARY**2)
    pairs = pairs.reshape(VOCABULARY, VOCABULARY) + unigram  # smoothed by the unigram
    bigram = pairs / pairs.sum(axis=-1, keepdims=True)
    return unigram[targets], bigram[inputs, targets]


def softmax(logits):
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def perplexity(probabilities):
    return float(np.exp(-np.log(probabilities).mean()))


def build_models():
    """Two models of the same layers: one trains on whole windows, one writes."""
    embedding = keras.layers.Embedding(VOCABULARY, WIDTH)
    blocks = [
        (
            keras.layers.RMSNormalization(),
            keras_mom.MoMLayer(
                num_heads=4, key_dim=32, num_memories=4, top_k=2, return_state=True
            ),
            keras.Sequential(
                [
                    keras.layers.RMSNormalization(),
                    keras.layers.Dense(3 * WIDTH, activation="silu"),
                    keras.layers.Dense(WIDTH),
                ]
            ),
        )
        for _ in range(LAYERS)
    ]
    final_norm = keras.layers.RMSNormalization()
    head = keras.layers.Dense(VOCABULARY)

    def apply(tokens, states):
        x, new_states = embedding(tokens), []
        for (norm, memories, mlp), state in zip(blocks, states, strict=True):
            mixed, state = memories(norm(x), initial_state=state)
            new_states.append(state)
            x = x + mixed
            x = x + mlp(x)
        return head(final_norm(x)), new_states

    tokens = keras.Input((None,), dtype="int32", name="tokens")
    logits, _ = apply(tokens, [None] * LAYERS)
    trainer = keras.Model(tokens, logits, name="quickstart")

    layers = [memories for _, memories, _ in blocks]
    states = [
        tuple(keras.Input(part.shape[1:]) for part in layer.get_initial_state(1))
        for layer in layers
    ]
    writer = keras.Model((tokens, states), apply(tokens, states), name="writer")
    return trainer, writer, layers


def write(writer, states, prompt, length, rng, temperature=0.7):
    """Continues the prompt a byte at a time. All that is carried on is the state."""
    text = prompt.encode()
    for position in range(len(text) + length - 1):
        token = np.array([[text[position]]], "int32")
        logits, states = writer.predict_on_batch((token, states))
        if position == len(text) - 1:
            chances = softmax(logits[0, 0].astype("float64") / temperature)
            text += bytes([rng.choice(VOCABULARY, p=chances)])
    return text.decode(errors="replace"), states


def size_in_bytes(states):
    return sum(array.nbytes for array in keras.tree.flatten(states))


def main():
    parser = argparse.ArgumentParser(description="Train a small MoM language model.")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60, help="steps in an epoch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="quickstart.keras", help="where to save")
    arguments = parser.parse_args()
    started = time.perf_counter()
    keras.utils.set_random_seed(arguments.seed)
    rng = np.random.default_rng(arguments.seed)

    text, held_out = read_corpus()
    inputs, targets = (x.reshape(-1, WINDOW) for x in (held_out[:-1], held_out[1:]))
    print(f"Keras {keras.__version__} on {keras.config.backend()}")
    print(f"{len(text):,} bytes to learn from, {HELD_OUT:,} held out")

    trainer, writer, layers = build_models()
    print(f"{trainer.count_params():,} parameters\n")
    total_steps = arguments.epochs * arguments.steps
    trainer.compile(
        optimizer=keras.optimizers.AdamW(
            keras.optimizers.schedules.CosineDecay(
                initial_learning_rate=0.0,
                warmup_target=1e-2,
                warmup_steps=total_steps // 10,
                decay_steps=total_steps - total_steps // 10,
                alpha=0.05,
            ),
            weight_decay=0.01,
            clipnorm=1.0,
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    trainer.fit(
        training_batches(text, rng),
        steps_per_epoch=arguments.steps,
        epochs=arguments.epochs,
        shuffle=False,  # the windows are drawn at random already
        verbose=1 if sys.stdout.isatty() else 2,  # a bar, or a line an epoch in a file
    )

    logits = trainer.predict(inputs, batch_size=BATCH, verbose=0)
    model = np.take_along_axis(softmax(logits), targets[..., None], axis=-1)
    unigram, bigram = ngram_probabilities(text, inputs, targets)
    print("\nPerplexity a byte on the held-out text")
    print(f"  unigram              {perplexity(unigram):6.2f}")
    print(f"  bigram               {perplexity(bigram):6.2f}")
    print(f"  Mixture of Memories  {perplexity(model):6.2f}")

    print("\nShare of tokens that went to each memory")
    for index, layer in enumerate(layers):
        shares = "  ".join(
            f"{share:.1%}" for share in layer.routing_statistics["share"]
        )
        print(f"  layer {index}: {shares}")

    states = [
        tuple(keras.ops.convert_to_numpy(part) for part in layer.get_initial_state(1))
        for layer in layers
    ]
    size = size_in_bytes(states)
    written, states = write(writer, states, PROMPT, 400, rng)
    print(f"\nState: {size:,} bytes before the first byte was read,")
    print(f"       {size_in_bytes(states):,} bytes after {len(written)} were.\n")
    print("\n".join("  | " + line for line in written.splitlines()))

    trainer.save(arguments.out)
    loaded = keras.models.load_model(arguments.out)
    difference = np.abs(loaded.predict_on_batch(inputs[:BATCH]) - logits[:BATCH]).max()
    print(f"\nSaved to {arguments.out} and loaded again;")
    print(f"largest difference between the two models' outputs: {difference:.1e}")
    if difference > 1e-5:
        raise RuntimeError("the loaded model does not compute what the saved one does")
    print(f"\nDone in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
