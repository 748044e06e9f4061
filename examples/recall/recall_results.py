"""Results of runs: the file they are kept in, tables and plots."""

import csv
import os
import platform
import statistics
import subprocess
from collections import defaultdict

from recall_models import KINDS, WITHOUT_RULE

# What tells one run from another, in the file as text.
RUN = (
    "task",
    "model",
    "rule",
    "layers",
    "width",
    "heads",
    "key_dim",
    "value_dim",
    "memories",
    "top_k",
    "feed_forward",
    "epochs",
    "batch_size",
    "weight_decay",
    "learning_rate",
    "seed",
    "data",
)
MEASURED = (
    "test",
    "length",
    "state",
    "active_state",
    "parameters",
    "validation",
    "accuracy",
    "seconds",
    "backend",
    "hardware",
)
COLUMNS = RUN + MEASURED


class Results:
    """Lines of a CSV file: one for each test of each finished run.

    The file is replaced as a whole, so that it never holds half a run.
    """

    def __init__(self, path):
        self.path = path
        self.rows = []
        if os.path.exists(path):
            with open(path, newline="") as file:
                self.rows = list(csv.DictReader(file))
        self._finished = {_name(row) for row in self.rows}

    def finished(self, run):
        """Whether a run, a dict of the columns `RUN`, is in the file."""
        return _name(run) in self._finished

    def rows_of(self, run):
        """The lines of a run."""
        return [row for row in self.rows if _name(row) == _name(run)]

    def add(self, run, lines):
        """Adds a run with the lines of its tests, dicts of the columns `MEASURED`."""
        for line in lines:
            self.rows.append({k: str(v) for k, v in {**run, **line}.items()})
        self._finished.add(_name(run))
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        draft = f"{self.path}.tmp"
        with open(draft, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(draft, self.path)


def _name(row):
    return tuple(str(row[column]) for column in RUN)


def hardware(accelerator):
    """What the runs are made on, in words; `accelerator` is its kind, or None."""
    if accelerator in ("gpu", "cuda"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        try:
            return subprocess.check_output(query, text=True).splitlines()[0].strip()
        except (OSError, subprocess.CalledProcessError, IndexError):
            pass
    if accelerator:
        return accelerator
    return f"{os.cpu_count()} {platform.machine()} cores"


def label(row):
    """A model's name in tables."""
    name = KINDS[row["model"]]
    return name if row["model"] in WITHOUT_RULE else f"{name} ({row['rule']})"


def best(rows):
    """Rows of each model at the learning rate that did best on validation data.

    Returns:
        A dict from (task, label, width) to the rows of all seeds and tests.
    """
    rates = defaultdict(lambda: defaultdict(list))
    for row in rows:
        key = row["task"], label(row), int(row["width"])
        rates[key][float(row["learning_rate"])].append(row)
    return {
        key: max(
            by_rate.values(),
            key=lambda some: statistics.fmean(float(row["validation"]) for row in some),
        )
        for key, by_rate in rates.items()
    }


def accuracies(rows):
    """Accuracies of the seeds by test, in the order of the tests."""
    tests = defaultdict(list)
    for row in rows:
        tests[row["test"]].append(float(row["accuracy"]))
    return tests


def table(rows):
    """Markdown tables, one for each task: mean accuracy and spread over seeds."""
    parts = []
    chosen = best(rows)
    for task in dict.fromkeys(row["task"] for row in rows):
        models = {key: some for key, some in chosen.items() if key[0] == task}
        tests = list(
            dict.fromkeys(row["test"] for some in models.values() for row in some)
        )
        head = ["model", "D", "state (active)", "parameters", "rate", "seeds", *tests]
        lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for (_, name, width), some in models.items():
            row = some[0]
            seeds = len({row["seed"] for row in some})
            state = f"{int(row['state']):,} ({int(row['active_state']):,})"
            cells = [name, str(width), state, f"{int(row['parameters']):,}"]
            cells += [f"{float(row['learning_rate']):.1e}", str(seeds)]
            found = accuracies(some)
            for test in tests:
                values = found.get(test, [])
                cell = f"{statistics.fmean(values):.3f}" if values else ""
                if len(values) > 1:
                    cell += f" ({min(values):.3f} to {max(values):.3f})"
                cells.append(cell)
            lines.append(f"| {' | '.join(cells)} |")
        parts.append(f"{task}\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def plot(rows, folder):
    """Draws accuracy against state size and against length; returns the files.

    Raises:
        ImportError: without matplotlib.
    """
    from keras_mom.visualization import pyplot

    plt = pyplot()
    chosen = best(rows)
    files = []
    for task in dict.fromkeys(row["task"] for row in rows):
        models = {key: some for key, some in chosen.items() if key[0] == task}
        for against in ("state", "length"):
            figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
            curves = defaultdict(list)
            for (_, name, width), some in models.items():
                if against == "state":
                    last = list(accuracies(some))[-1]
                    points = [_point(some, last, "state")]
                else:
                    name = f"{name}, D {width}" if _several_widths(models) else name
                    points = [
                        _point(some, test, "test_order") for test in accuracies(some)
                    ]
                curves[name] += points
            for name, points in curves.items():
                x, mean, low, high = zip(*sorted(points))
                spread = [
                    [m - a for m, a in zip(mean, low)],
                    [b - m for m, b in zip(mean, high)],
                ]
                axes.errorbar(x, mean, spread, marker="o", capsize=3, label=name)
            axes.set_ylim(-0.02, 1.02)
            axes.set_ylabel("accuracy")
            if against == "state":
                test = list(accuracies(next(iter(models.values()))))[-1]
                axes.set_xscale("log")
                axes.set_xlabel("numbers in the state")
                axes.set_title(f"{task}: {test}")
            else:
                tests = list(accuracies(next(iter(models.values()))))
                axes.set_xticks(range(len(tests)), tests, rotation=30, ha="right")
                axes.set_title(task)
            axes.legend(fontsize="small")
            path = os.path.join(folder, f"{task}_against_{against}.png")
            figure.savefig(path, dpi=150)
            plt.close(figure)
            files.append(path)
    return files


def _several_widths(models):
    return len({width for _, _, width in models}) > 1


def _point(rows, test, against):
    """Place on the axis, and mean, lowest and highest accuracy of a test."""
    values = accuracies(rows)[test]
    if against == "test_order":
        place = list(accuracies(rows)).index(test)
    else:
        place = next(int(row["state"]) for row in rows if row["test"] == test)
    return place, statistics.fmean(values), min(values), max(values)
