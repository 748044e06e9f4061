"""Every character of Python source, tagged with the kind of token that it belongs to.

The text is the standard library of the Python that runs this, and the tags are those
that `tokenize` gives: a name, a keyword, a number, a string, a comment, an operator, or
none (white space). A `mom_encoder` reads the characters in both directions. It is
compared with the most frequent tag of a character between its two neighbours.

    python examples/tagging.py                        # on JAX
    KERAS_BACKEND=torch python examples/tagging.py
"""

import argparse
import io
import keyword
import os
import pathlib
import sys
import sysconfig
import time
import tokenize

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np

import keras_mom

TAGS = ("none", "name", "keyword", "number", "string", "comment", "operator")
CHARACTERS = 129  # padding, and ASCII behind it
WINDOW = 256


def tag_of(token):
    """The index of a token's tag."""
    kind = tokenize.tok_name[token.type]
    if kind == "NAME":
        return TAGS.index("keyword" if keyword.iskeyword(token.string) else "name")
    # From Python 3.12 on, `tokenize` splits f-strings.
    if kind == "STRING" or kind.startswith(("FSTRING", "TSTRING")):
        return TAGS.index("string")
    names = {"NUMBER": "number", "COMMENT": "comment", "OP": "operator"}
    return TAGS.index(names.get(kind, "none"))


def tag_characters(text):
    """int32 arrays: the characters' codes (1 and up), and their tags."""
    starts = np.cumsum([0] + [len(line) for line in text.splitlines(keepends=True)])
    tags = np.zeros(len(text), "int32")
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        (first, begin), (last, end) = token.start, token.end
        if max(first, last) <= len(starts):
            start, stop = starts[first - 1] + begin, starts[last - 1] + end
            tags[start:stop] = tag_of(token)
    return np.frombuffer(text.encode("ascii"), "uint8").astype("int32") + 1, tags


def read_corpus(limit):
    """Windows int32 `[N, WINDOW]` of codes and of tags, and how many are held out.

    The last tenth of the files is held out.
    """
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    files, size = [], 0
    for path in sorted(folder.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if text.isascii() and "\f" not in text and size < limit:
            files.append(tag_characters(text))
            size += len(text)
    border = len(files) * 9 // 10
    return in_windows(files[:border]), in_windows(files[border:])


def in_windows(files):
    """Joins files and cuts them in windows; what is left over is padded with 0."""
    codes, tags = (np.concatenate(parts) for parts in zip(*files))
    missing = -len(codes) % WINDOW
    return tuple(np.pad(x, (0, missing)).reshape(-1, WINDOW) for x in (codes, tags))


def contexts(codes):
    """A number for each character between its two neighbours."""
    padded = np.pad(codes, ((0, 0), (1, 1)))
    before, after = padded[:, :-2], padded[:, 2:]
    return (before * CHARACTERS + codes) * CHARACTERS + after


def count_tags(codes, tags):
    """The most frequent tag of each context; the most frequent of all if unseen."""
    counts = np.zeros((CHARACTERS**3, len(TAGS)), "int32")
    np.add.at(counts, (contexts(codes), tags), 1)
    overall = np.bincount(tags[codes > 0], minlength=len(TAGS)).argmax()
    return np.where(counts.any(-1), counts.argmax(-1), overall)


def show(text_codes, tags):
    """A line of source, and its tags' first letters below."""
    text = "".join(chr(code - 1) if code > 32 else " " for code in text_codes)
    letters = [" "] + [name[0] for name in TAGS[1:]]
    print(f"  | {text}\n  | {''.join(letters[tag] for tag in tags)}")


def main():
    parser = argparse.ArgumentParser(
        description="Tag the characters of Python source with their kinds of token."
    )
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=45, help="steps in an epoch")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.perf_counter()
    keras.utils.set_random_seed(arguments.seed)
    print(f"Keras {keras.__version__} on {keras.config.backend()}")

    (codes, tags), (test_codes, test_tags) = read_corpus(3_000_000)
    test_codes, test_tags = test_codes[::8], test_tags[::8]
    print(f"{codes.size:,} characters to learn from, {test_codes.size:,} held out")
    model = keras_mom.models.mom_encoder(
        arguments.layers,
        arguments.width,
        num_heads=2,
        key_dim=arguments.width // 4,
        vocabulary_size=CHARACTERS,
        num_classes=len(TAGS),
        padding_id=0,
        per_memory_projections=False,
    )
    print(f"{model.count_params():,} parameters")
    steps = arguments.epochs * arguments.steps
    model.compile(
        keras.optimizers.AdamW(
            keras.optimizers.schedules.CosineDecay(
                0.0, steps, warmup_target=8e-3, warmup_steps=steps // 10
            ),
            weight_decay=0.01,
            clipnorm=1.0,
        ),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    rng = np.random.default_rng(arguments.seed)
    chosen = rng.permutation(len(codes))[: steps * arguments.batch]
    for epoch in np.array_split(chosen, arguments.epochs):
        model.fit(
            codes[epoch],
            tags[epoch],
            batch_size=arguments.batch,
            verbose=1 if sys.stdout.isatty() else 2,
        )

    predicted = model.predict(test_codes, batch_size=32, verbose=0).argmax(-1)
    valid = test_codes > 0
    between = count_tags(codes, tags)[contexts(test_codes)]
    print("\nAccuracy on held-out characters")
    for name, found in (
        ("none everywhere", np.zeros_like(test_tags)),
        ("between neighbours", between),
        ("Mixture of Memories", predicted),
    ):
        print(f"  {name:20s} {np.mean((found == test_tags)[valid]):.4f}")
    print("\nBy tag, Mixture of Memories")
    for index, name in enumerate(TAGS):
        of_tag = valid & (test_tags == index)
        print(f"  {name:20s} {np.mean(predicted[of_tag] == index):.4f}")
    print()
    show(test_codes[3, :72], predicted[3, :72])
    print(f"\nDone in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
