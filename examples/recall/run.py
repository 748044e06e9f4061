"""Compares what models remember: memories, Mixture of Memories, attention, LSTM.

    python examples/recall/run.py                     # small: minutes on two cores
    KERAS_BACKEND=jax python examples/recall/run.py --preset mqar --dtype mixed_bfloat16

Models that differ only in what mixes tokens learn a task of `keras_mom.tasks`, each
with every learning rate and seed, and are tested on sequences of their own. With
`--sweep-seeds 0` learning rates are compared with that seed alone, and the other seeds
have the best of them. Results go to CSV files, one line for each test of each run;
tables and plots are made of them. A command that was interrupted and is given again
leaves out what is finished, and goes on with a run in the epoch where it stopped. The
same command, given several times at once, shares the runs out among its processes:
several on a GPU, and several GPUs (`CUDA_VISIBLE_DEVICES`). `--known` takes finished
runs from CSV files, such as those of docs/results, into the tables instead.

Presets: `small`; `mqar`, the settings of Zoology (arXiv 2312.04927); `mad`, the six
tasks of MAD (arXiv 2403.17844); `retrieval`, needles in a haystack and phone books.
"""

import argparse
import hashlib
import os
import sys
import time
import warnings
from typing import NamedTuple

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import keras
import numpy as np
from bookkeeping import Backup, PeakRate, Results, draw, forget_models, hardware
from recall_models import KINDS, WITHOUT_RULE, ModelSettings, build_model
from recall_results import MEASURED, RUN, best, plot, run_name, table
from recall_settings import PRESETS

import keras_mom
from keras_mom.backend import accelerator

# Added to a run's seed; training data have the seed itself.
VALIDATION_SEED, TEST_SEED = 1_000_000, 2_000_000


class Asked(NamedTuple):
    """Examples with the places alone where something is asked.

    Attributes:
        tokens: int32 `[B, T]`.
        places: int32 `[B, P]`.
        targets, weights: `[B, P]`, at these places.
    """

    tokens: np.ndarray
    places: np.ndarray
    targets: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, examples):
        asked = examples.weights > 0
        length = asked.shape[1]
        # Parts of one length share a shape, and so what is compiled for it.
        count = max(length // 4, asked.sum(axis=1).max())
        places = np.argsort(~asked, axis=1, kind="stable")[:, :count]
        rest = (np.take_along_axis(x, places, axis=1) for x in examples[1:])
        return cls(examples.inputs, places.astype("int32"), *rest)

    def batch(self, rows=slice(None)):
        """Inputs, targets and weights."""
        tokens, places, targets, weights = (x[rows] for x in self)
        return {"tokens": tokens, "places": places}, targets, weights


class Batches(keras.utils.PyDataset):
    """Batches of one part of the data each, in an order drawn for each epoch."""

    def __init__(self, parts, batch_size, seed):
        super().__init__()
        self.parts = [Asked.of(part) for part in parts]
        self.batch_size = batch_size
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch):
        """Draws the order of an epoch: a training that goes on has that of its own."""
        rng = np.random.default_rng((self.seed, epoch))
        self.batches = [
            (part, rows)
            for part, examples in enumerate(self.parts)
            for rows in np.split(
                rng.permutation(len(examples.tokens)),
                range(self.batch_size, len(examples.tokens), self.batch_size),
            )
            # A smaller one would be compiled for itself.
            if len(rows) == self.batch_size
        ]
        rng.shuffle(self.batches)

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        part, rows = self.batches[index]
        return self.parts[part].batch(rows)


def list_runs(preset):
    """Every run: its columns in the results, its model's settings and its task."""
    runs = []
    for task in preset.tasks:
        data = hashlib.sha256(repr((task.training, task.tests)).encode()).hexdigest()
        for width in preset.widths:
            for kind in preset.models:
                for rule in ("",) if kind in WITHOUT_RULE else preset.rules:
                    settings = ModelSettings(
                        kind=kind,
                        rule=rule,
                        layers=preset.layers,
                        width=width,
                        heads=preset.heads,
                        key_dim=preset.key_dim or width // (2 * preset.heads),
                        value_dim=preset.value_dim or width // preset.heads,
                        memories=preset.memories,
                        top_k=preset.top_k,
                        feed_forward=preset.feed_forward,
                        convolution=preset.convolution,
                        tied=preset.tied,
                    )
                    for rate in preset.learning_rates:
                        for seed in preset.seeds:
                            run = dict(
                                vars(settings),
                                task=task.name,
                                model=kind,
                                epochs=preset.epochs,
                                batch_size=preset.batch_size,
                                weight_decay=preset.weight_decay,
                                learning_rate=rate,
                                dtype=keras.config.dtype_policy().name,
                                seed=seed,
                                data=data[:8],
                            )
                            del run["kind"]
                            runs.append((run, settings, task))
    return runs


def examples_of(task, arguments, seed):
    return [
        task.make(**part, seed=(seed, index)) for index, part in enumerate(arguments)
    ]


def describe(arguments, examples):
    """A test in words."""
    words = [f"T {examples.inputs.shape[1]}"]
    for name in ("num_pairs", "num_entries", "num_needles"):
        if name in arguments:
            words.append(f"{arguments[name]} {name.removeprefix('num_')}")
    return ", ".join(words)


def train(run, settings, task, preset, folder, arguments):
    """Trains and tests a model, and returns the lines of its tests."""
    keras.utils.set_random_seed(run["seed"])
    started = time.perf_counter()
    parts = examples_of(task, task.training, run["seed"])
    batches = Batches(parts, preset.batch_size, run["seed"])
    length = parts[0].inputs.shape[1] if task.encoder else None
    model = build_model(settings, task.vocabulary_size, length, task.encoder)
    steps = preset.epochs * len(batches)
    model.compile(
        PeakRate.adamw(
            run["learning_rate"],
            keras.optimizers.schedules.CosineDecay(1.0, steps),
            weight_decay=preset.weight_decay,
        ),
        keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="mean_with_sample_weight"
        ),
        weighted_metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
    )
    backup = Backup(os.path.join(folder, "unfinished", run_name(run)))
    callbacks = [
        backup,
        keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda epoch, logs: batches.set_epoch(epoch)
        ),
        keras.callbacks.TerminateOnNaN(),
    ]
    if arguments.routing and any(
        isinstance(layer, keras_mom.MoMLayer) for layer in model.layers
    ):
        shown = Asked.of(examples_of(task, task.tests[-1:], VALIDATION_SEED)[0])
        pictures = os.path.join(folder, "routing", run_name(run))
        callbacks.append(
            keras_mom.callbacks.RoutingMonitor(
                shown.batch(slice(32))[0],
                token_ids=shown.tokens[:32],
                png_dir=pictures,
            )
        )
    model.fit(
        batches,
        epochs=preset.epochs,
        shuffle=False,
        callbacks=callbacks,
        verbose=arguments.verbose,
    )
    longest = max(part.inputs.shape[1] for part in parts)

    def accuracy(examples):
        share = min(1, longest / examples.inputs.shape[1])
        inputs, targets, weights = Asked.of(examples).batch()
        return model.evaluate(
            inputs,
            targets,
            sample_weight=weights,
            batch_size=max(1, int(preset.batch_size * share)),
            verbose=0,
            return_dict=True,
        )["accuracy"]

    validation = examples_of(task, task.tests, VALIDATION_SEED + run["seed"])
    validation = float(np.mean([accuracy(examples) for examples in validation]))
    tests = examples_of(task, task.tests, TEST_SEED + run["seed"])
    lines = []
    for test, examples in zip(task.tests, tests):
        length = examples.inputs.shape[1]
        state, active = settings.state_size(length)
        lines.append(
            dict(
                test=describe(test, examples),
                length=length,
                state=state,
                active_state=active,
                parameters=model.count_params(),
                validation=round(validation, 5),
                accuracy=round(accuracy(examples), 5),
                backend=keras.config.backend(),
                hardware=arguments.hardware,
            )
        )
    seconds = round(time.perf_counter() - started, 1)
    return [dict(line, seconds=seconds) for line in lines], backup


def is_needed(run, runs, results, sweep_seeds):
    """Whether a run is to be made: True, False, or None if that is not known yet.

    Of a seed that learning rates are not compared with, the best rate alone is needed.
    """
    if run["seed"] in sweep_seeds:
        return True
    compared = []
    for other, _, _ in runs:
        changes = dict(learning_rate=run["learning_rate"], seed=run["seed"])
        if {**other, **changes} == run and other["seed"] in sweep_seeds:
            rows = results.rows_of(other)
            if not rows:
                return None
            compared += rows
    (rows,) = best(compared).values()
    return float(rows[0]["learning_rate"]) == run["learning_rate"]


def next_runs(left, runs, results, arguments, preset, folder):
    """Makes the first run that nobody else makes.

    Returns:
        What is left then, and whether a run was made.
    """
    others = []
    for number, (run, settings, task) in enumerate(left):
        if results.rows_of(run):
            continue
        needed = is_needed(run, runs, results, arguments.sweep_seeds)
        if needed is None:
            others.append(left[number])
        if not needed:
            continue
        with results.claimed(run) as mine:
            if not mine:
                others.append(left[number])
                continue
            if results.rows_of(run):  # finished meanwhile
                continue
            print(f"\n[{len(left) - number} left] {run_name(run)}", flush=True)
            lines, backup = train(run, settings, task, preset, folder, arguments)
            results.add(run, lines)
            backup.remove()
            for line in lines:
                print(f"    {line['test']:<24} accuracy {line['accuracy']:.3f}")
            print(f"    {lines[0]['seconds']:.0f} s", flush=True)
            forget_models()
        return others + left[number + 1 :], True
    if others:  # what is left depends on other processes, or is theirs
        time.sleep(2)
    return others, False


def parse_arguments():
    parser = argparse.ArgumentParser(
        description="Compare what models remember.",
        epilog="Options that are left out are those of the preset.",
    )
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--tasks", nargs="+", help="some of the preset's tasks")
    parser.add_argument("--models", nargs="+", choices=KINDS)
    parser.add_argument("--rules", nargs="+", choices=keras_mom.rules.names())
    parser.add_argument("--widths", nargs="+", type=int)
    for size in ("layers", "heads", "key-dim", "value-dim", "memories", "top-k"):
        parser.add_argument(f"--{size}", type=int)
    parser.add_argument("--learning-rates", nargs="+", type=float)
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument(
        "--sweep-seeds",
        nargs="+",
        type=int,
        help="seeds to compare learning rates with; all of them if none are given",
    )
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--weight-decay", type=float)
    parser.add_argument("--dtype", help="a dtype policy, such as mixed_bfloat16")
    parser.add_argument("--out", help="folder of the results; recall_<preset> if none")
    parser.add_argument(
        "--known",
        nargs="+",
        default=(),
        help="CSV files of finished runs, which are not made again",
    )
    parser.add_argument("--hardware", help="what to name the machine in the results")
    parser.add_argument(
        "--runs", type=int, help="make at most so many; the same command goes on"
    )
    parser.add_argument("--routing", action="store_true", help="pictures of routing")
    parser.add_argument("--list", action="store_true", help="list the runs, run none")
    parser.add_argument("--no-plots", action="store_true")
    parser.add_argument("--verbose", type=int, choices=(0, 1, 2))
    arguments = parser.parse_args()
    if arguments.runs is not None and arguments.runs < 1:
        parser.error(f"--runs: expected 1 or more, not {arguments.runs}")
    if arguments.verbose is None:
        arguments.verbose = 1 if sys.stdout.isatty() else 2
    return arguments


def chosen_preset(arguments):
    preset = PRESETS[arguments.preset]
    tasks = preset.tasks
    if arguments.tasks is not None:
        known = [task.name for task in tasks]
        unknown = set(arguments.tasks) - set(known)
        if unknown:
            sys.exit(f"--tasks: {', '.join(unknown)}; known: {', '.join(known)}")
        tasks = tuple(task for task in tasks if task.name in arguments.tasks)
    names = ("models", "rules", "widths", "layers", "heads", "key_dim", "value_dim")
    names += ("memories", "top_k", "learning_rates", "seeds", "epochs", "batch_size")
    names += ("weight_decay",)
    changes = {name: getattr(arguments, name) for name in names}
    return preset.changed(tasks=tasks, **changes)


def main():
    arguments = parse_arguments()
    if arguments.dtype:
        keras.config.set_dtype_policy(arguments.dtype)
    # The router of a single memory.
    warnings.filterwarnings("ignore", message="You are using a softmax over axis")
    preset = chosen_preset(arguments)
    arguments.hardware = arguments.hardware or hardware(accelerator())
    folder = arguments.out or f"recall_{arguments.preset}"
    results = Results(folder, RUN, MEASURED, run_name, arguments.known)
    runs = list_runs(preset)
    left = [run for run in runs if not results.rows_of(run[0])]
    print(f"{len(runs)} runs, {len(left)} to do; results in {results.path}")
    if arguments.list:
        print("\n".join(run_name(run[0]) for run in left))
        return
    if arguments.sweep_seeds is None:
        arguments.sweep_seeds = preset.seeds
    unknown = set(arguments.sweep_seeds) - set(preset.seeds)
    if unknown:
        sys.exit(f"--sweep-seeds: {unknown} are not among the seeds, {preset.seeds}")
    made = 0
    while left and made != arguments.runs:
        left, trained = next_runs(left, runs, results, arguments, preset, folder)
        made += trained
    rows = [row for run, _, _ in runs for row in results.rows_of(run)]
    if not rows:
        return
    print(f"\n{table(rows)}\n")
    if not arguments.no_plots:
        draw(plot, rows, folder)


if __name__ == "__main__":
    main()
