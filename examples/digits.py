"""Handwritten digits read as sequences, beside logistic regression.

Scikit-learn's 1,797 images of 8 x 8 pixels come with the package. A `mom_classifier`
reads an image row by row, or pixel by pixel, and is compared with logistic regression
on all pixels at once.

    python examples/digits.py                         # rows, on JAX
    KERAS_BACKEND=torch python examples/digits.py --read pixels

Needs scikit-learn.
"""

import argparse
import os
import sys
import time

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

import keras_mom

CLASSES = 10


def read_digits(seed):
    """Training and test images, float32 `[B, 8, 8]` in 0..1, and their digits."""
    images, digits = load_digits(return_X_y=True)
    images = (images / 16).astype("float32").reshape(-1, 8, 8)
    return train_test_split(
        images, digits.astype("int32"), test_size=0.25, random_state=seed
    )


def logistic_regression(images, digits, test_images, test_digits):
    """Accuracy on the test images."""
    model = LogisticRegression(max_iter=1000)
    model.fit(images.reshape(len(images), -1), digits)
    return model.score(test_images.reshape(len(test_images), -1), test_digits)


def build_model(features, width, layers):
    return keras_mom.models.mom_classifier(
        CLASSES,
        num_layers=layers,
        hidden_dim=width,
        num_heads=2,
        key_dim=width // 4,
        feature_dim=features,
        dropout=0.1,
    )


def main():
    parser = argparse.ArgumentParser(
        description="Classify handwritten digits read as sequences."
    )
    parser.add_argument("--read", choices=("rows", "pixels"), default="rows")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=48)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.perf_counter()
    keras.utils.set_random_seed(arguments.seed)
    print(f"Keras {keras.__version__} on {keras.config.backend()}")

    images, test_images, digits, test_digits = read_digits(arguments.seed)
    baseline = logistic_regression(images, digits, test_images, test_digits)
    features = 8 if arguments.read == "rows" else 1
    images, test_images = (
        x.reshape(len(x), -1, features) for x in (images, test_images)
    )
    print(
        f"{len(images)} images to learn from, {len(test_images)} held out, read as "
        f"{images.shape[1]} {arguments.read}"
    )
    model = build_model(features, arguments.width, arguments.layers)
    print(f"{model.count_params():,} parameters")
    steps = arguments.epochs * -(-len(images) // arguments.batch)
    model.compile(
        keras.optimizers.AdamW(
            keras.optimizers.schedules.CosineDecay(
                0.0, steps, warmup_target=4e-3, warmup_steps=steps // 10
            ),
            weight_decay=0.01,
            clipnorm=1.0,
        ),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(
        images,
        digits,
        batch_size=arguments.batch,
        epochs=arguments.epochs,
        verbose=1 if sys.stdout.isatty() else 0,
    )
    predicted = model.predict(test_images, verbose=0).argmax(-1)
    accuracy = float(np.mean(predicted == test_digits))
    print("\nAccuracy on held-out images")
    print(f"  logistic regression  {baseline:.4f}")
    print(f"  Mixture of Memories  {accuracy:.4f}")
    print(f"\nDone in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
