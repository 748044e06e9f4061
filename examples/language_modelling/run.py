"""Compares language models of bytes that differ only in what mixes tokens.

    python examples/language_modelling/run.py --text FOLDER   # a GPU: minutes a model

One memory, Mixture of Memories, a hybrid and a Transformer of equal activated
parameters - those that one token uses - learn from the same windows of a text. For that
the width of their feed-forward networks differs. Measured are bits per byte of held-out
text, and how they change up to 16 times the training length. Results go to CSV files,
tables and plots are made of them. A command that was interrupted and is given again
leaves out what is finished, and goes on with a run in the epoch where it stopped.
The same command, given several times at once, shares the runs out among its processes:
one on a GPU each (`CUDA_VISIBLE_DEVICES`).

Text: by default the modules of Python's standard library, 15 MB. More of it, 37 MB of
kernel documentation from a package of Debian 12:

    apt-get download linux-doc-6.1 && dpkg -x linux-doc-6.1*.deb linux-doc
    python examples/language_modelling/run.py --pack linux-doc.npz \\
        --text linux-doc/usr/share/doc/linux-doc-6.1/Documentation \\
        --suffixes .rst .txt .yaml
    python examples/language_modelling/run.py --text linux-doc.npz
"""

import argparse
import hashlib
import math
import os
import pathlib
import sys
import time
import warnings

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import keras
import lm_text
from bookkeeping import Backup, Results, draw, forget_models, hardware
from lm_evaluation import measure
from lm_models import (
    KINDS,
    ROUTED,
    ModelSettings,
    activated_parameters,
    parameters,
)
from lm_results import MEASURED, RUN, curve_path, plot, run_name, tables
from lm_training import Curve, Deadline, compile_model
from train_lm import Windows, steps_of

import keras_mom
from keras_mom.backend import accelerator

MULTIPLES = (1, 2, 4, 8, 16)


def list_runs(arguments, text):
    """Every run: its columns in the results, and its model's settings."""
    step_bytes = arguments.batch * arguments.length
    # Epochs of equal size, so that all bytes asked for are seen.
    steps = -(-arguments.bytes // (step_bytes * arguments.epochs)) * arguments.epochs
    shared = {name: getattr(arguments, name) for name in RUN if name in arguments}
    shared |= dict(
        text=hashlib.sha256(text.data.tobytes()).hexdigest()[:8],
        steps=steps,
        dtype=keras.config.dtype_policy().name,
    )
    runs = []
    for model in arguments.models:
        for weight in arguments.balance_weights if model in ROUTED else [""]:
            settings = ModelSettings(
                model=model,
                rule="" if model == "attention" else arguments.rule,
                balance_weight=weight,
                layers=arguments.layers,
                width=arguments.width,
                heads=arguments.heads,
                key_dim=arguments.key_dim,
                value_dim=arguments.value_dim,
                memories=arguments.memories,
                top_k=arguments.top_k,
                attention_heads=arguments.attention_heads or arguments.heads,
                attention_every=arguments.attention_every,
                target=arguments.parameters,
            )
            runs += [
                (
                    {**shared, **vars(settings), "learning_rate": rate, "seed": seed},
                    settings,
                )
                for rate in arguments.learning_rates
                for seed in arguments.seeds
            ]
    return runs


def train(run, settings, parts, folder, arguments, deadline):
    """Trains and tests a model.

    Returns:
        The lines of its tests and its backup; None for the lines if the time is up.
    """
    text, validation, test = parts
    started = time.perf_counter()
    keras.utils.set_random_seed(run["seed"])
    backbone = settings.fitted_backbone()
    lm = keras_mom.models.MoMCausalLM(backbone, compile=False)
    total, activated = parameters(backbone), activated_parameters(backbone)
    width = backbone.get_config()["intermediate_dim"]
    sizes = f"{total:,} parameters, {activated:,} activated, feed-forward width {width}"
    print(f"    {sizes}", flush=True)
    steps, batch = run["steps"], run["batch"]
    compile_model(lm, run["learning_rate"], steps, run["warmup"], run["weight_decay"])
    windows = Windows(
        text.data,
        batch,
        run["length"],
        steps // run["epochs"],
        run["seed"],
        step=lambda: steps_of(lm),
    )
    curve = Curve(
        curve_path(folder, run),
        lm_text.spread_windows(validation, run["length"], arguments.validation_windows),
        batch,
        batch * run["length"],
    )
    backup = Backup(os.path.join(folder, "unfinished", run_name(run)))
    callbacks = [curve, deadline, backup]
    if settings.model in ROUTED:
        # Of the last batch of an epoch, which costs nothing.
        callbacks.insert(0, keras_mom.callbacks.RoutingMonitor())
    lm.fit(windows, epochs=run["epochs"], shuffle=False, callbacks=callbacks, verbose=0)
    if steps_of(lm) < steps and math.isfinite(curve.validation()):
        return None, backup
    print(f"    trained in {time.perf_counter() - started:.0f} s", flush=True)
    lines = measure(
        lm,
        test,
        run["length"],
        MULTIPLES,
        batch,
        arguments.test_bytes,
        arguments.test_windows,
    )
    shared = dict(
        parameters=total,
        activated=activated,
        validation=curve.validation(),
        router_entropy=curve.last()["router_entropy"],
        largest_memory_share=curve.last()["largest_memory_share"],
        feed_forward=width,
        bytes=steps_of(lm) * batch * run["length"],
        bytes_per_second=round(curve.bytes_per_second()),
        seconds=round(time.perf_counter() - started, 1),
        backend=keras.config.backend(),
        hardware=arguments.hardware,
    )
    return [{**shared, **line} for line in lines], backup


def parse_arguments(given=None):
    parser = argparse.ArgumentParser(
        description="Compare language models of equal activated parameters.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--text", nargs="+", type=pathlib.Path, help="files, folders, packed files")
    add("--suffixes", nargs="+", default=lm_text.SUFFIXES, help="read in folders")
    add("--pack", type=pathlib.Path, help="write the text to one .npz file, no more")
    add(
        "--models",
        nargs="+",
        choices=KINDS,
        default=["single", "mom", "hybrid", "attention"],
    )
    add("--rule", choices=keras_mom.rules.names(), default="gated_delta_net")
    add("--balance-weights", nargs="+", type=float, default=[0.01])
    add("--parameters", type=_count, default=12_000_000, help="activated ones")
    for name, default, meaning in (
        ("layers", 6, "number of layers"),
        ("width", 384, "D"),
        ("heads", 6, "of a memory"),
        ("key-dim", 64, "of a head"),
        ("value-dim", 64, "of a head"),
        ("memories", 4, "M"),
        ("top-k", 2, "memories of a token, the shared one left out"),
        ("attention-heads", None, "as many as --heads if left out"),
        ("attention-every", 3, "layers of the hybrid"),
        ("length", 1024, "bytes of a training window"),
        ("batch", 64, "windows of a step"),
        ("epochs", 16, "parts of the training, a line of its curve each"),
        ("warmup", 100, "steps of growing learning rate"),
        ("validation-windows", 128, "after each epoch"),
        ("test-windows", 256, "for bits per byte against length"),
    ):
        # No learning rate has to grow.
        kind = _count if name != "warmup" else int
        add(f"--{name}", type=kind, default=default, help=meaning)
    add("--bytes", type=_count, default=100_000_000, help="to learn from, in all")
    add(
        "--test-bytes", type=_count, default=4_000_000, help="of held-out text, at most"
    )
    add("--weight-decay", type=float, default=0.1)
    add("--learning-rates", nargs="+", type=float, default=[2e-3])
    add("--seeds", nargs="+", type=int, default=[0])
    add("--dtype", help="policy; mixed_bfloat16 on an accelerator, else float32")
    add("--minutes", type=float, help="start no epoch later; the next command goes on")
    add("--out", default="language_models", help="folder of the results")
    add(
        "--known",
        nargs="+",
        default=[],
        help="CSV files of finished runs, which are not made again",
    )
    add("--hardware", help="what to name the machine in the results")
    add("--list", action="store_true", help="list the runs, run none")
    add("--no-plots", action="store_true")
    return parser.parse_args(given)


def _count(text):
    number = float(text)
    if number != int(number) or number < 1:
        raise argparse.ArgumentTypeError(f"{text} is no positive whole number")
    return int(number)


def main(given=None):
    started = time.perf_counter()
    arguments = parse_arguments(given)
    dtype = "mixed_bfloat16" if accelerator() else "float32"
    keras.config.set_dtype_policy(arguments.dtype or dtype)
    # The router of a single memory.
    warnings.filterwarnings("ignore", message="You are using a softmax over axis")
    text = lm_text.read_text(arguments.text, tuple(arguments.suffixes))
    print(f"{len(text.data):,} bytes in {len(text.ends):,} files", flush=True)
    if arguments.pack:
        lm_text.pack(text, arguments.pack)
        print(f"{arguments.pack}: {os.path.getsize(arguments.pack):,} bytes")
        return
    parts = lm_text.split(text)
    for name, part in zip(("to learn from", "for validation", "for tests"), parts):
        print(f"{len(part.data):,} bytes in {len(part.ends):,} files {name}")
        if len(part.data) <= arguments.length:
            raise ValueError(
                f"`--text`: too few bytes {name} for `--length {arguments.length}`"
            )
    arguments.hardware = arguments.hardware or hardware(accelerator())
    minutes = arguments.minutes
    deadline = Deadline(None if minutes is None else started + 60 * minutes)
    folder = arguments.out
    os.makedirs(os.path.join(folder, "curves"), exist_ok=True)
    results = Results(folder, RUN, MEASURED, run_name, arguments.known)
    runs = list_runs(arguments, text)
    left = [run for run in runs if not results.rows_of(run[0])]
    print(f"{len(runs)} runs, {len(left)} to do; results in {results.path}")
    if arguments.list:
        print("\n".join(run_name(run) for run, _ in left))
        return
    for number, (run, settings) in enumerate(left, 1):
        if deadline.passed():
            break
        with results.claimed(run) as mine:
            if not mine or results.rows_of(run):  # another process has it
                continue
            print(f"\n[{number}/{len(left)}] {run_name(run)}", flush=True)
            lines, backup = train(run, settings, parts, folder, arguments, deadline)
            if lines is None:
                print("    The time is up; the same command goes on.", flush=True)
                break
            results.add(run, lines)
        backup.remove()
        for line in lines:
            name = f"{line['measure']} {line['context']:,}"
            print(f"    {name:<20} {line['bits_per_byte']} bits per byte")
        print(f"    {lines[0]['seconds']:.0f} s", flush=True)
        forget_models()
    rows = [row for run, _ in runs for row in results.rows_of(run)]
    if not rows:
        return
    print(f"\n{tables(rows)}\n")
    if not arguments.no_plots:
        draw(plot, rows, folder)


if __name__ == "__main__":
    main()
