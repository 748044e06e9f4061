"""Results of runs: their columns, tables and plots."""

import hashlib
import os
import statistics
from collections import defaultdict

from bookkeeping import draw_spread
from recall_models import KINDS, WITHOUT_RULE

from keras_mom.visualization import new_figure, save_figure

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
    "convolution",
    "tied",
    "epochs",
    "batch_size",
    "weight_decay",
    "learning_rate",
    "dtype",
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


def run_name(run):
    """A name for the files of a run."""
    text = repr([str(run[column]) for column in RUN])
    parts = [run["task"], run["model"], run["rule"], f"D{run['width']}"]
    parts += [f"rate{run['learning_rate']:g}", f"seed{run['seed']}"]
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return "-".join([part for part in parts if part] + [digest])


def label(row):
    """A model's name in tables."""
    name = KINDS[row["model"]]
    return name if row["model"] in WITHOUT_RULE else f"{name} ({row['rule']})"


def best(rows):
    """Rows of each model at the learning rate that did best on validation data.

    Rates are compared with the seeds that all of them have.

    Returns:
        A dict from (task, label, width) to the rows of all seeds and tests.
    """
    rates = defaultdict(lambda: defaultdict(list))
    for row in rows:
        key = row["task"], label(row), int(row["width"])
        rates[key][float(row["learning_rate"])].append(row)
    return {
        key: by_rate[max(by_rate, key=_validation(by_rate))]
        for key, by_rate in rates.items()
    }


def _validation(by_rate):
    """A rate's accuracy on validation data, with the seeds that all rates have."""
    seeds = set.intersection(
        *({row["seed"] for row in rows} for rows in by_rate.values())
    )

    def mean(rate):
        return statistics.fmean(
            float(row["validation"])
            for row in by_rate[rate]
            if row["seed"] in seeds or not seeds
        )

    return mean


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
            row = some[-1]
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

    Against state size: at the last, hardest, test. Bars go from the lowest to the
    highest seed.

    Raises:
        ImportError: without matplotlib.
    """
    chosen = best(rows)
    files = []
    for task in dict.fromkeys(row["task"] for row in rows):
        models = {key: some for key, some in chosen.items() if key[0] == task}
        for against, draw in (("state", _against_state), ("length", _against_length)):
            figure, axes = new_figure(7, 4.5)
            draw(axes, task, models)
            axes.set_ylim(-0.02, 1.02)
            axes.set_ylabel("accuracy")
            axes.legend(fontsize="small")
            files.append(os.path.join(folder, f"{task}_against_{against}.png"))
            save_figure(figure, files[-1])
    return files


def _against_state(axes, task, models):
    curves = defaultdict(list)
    for (_, name, _), some in models.items():
        last = some[-1]
        values = accuracies(some)[last["test"]]
        curves[name].append((int(last["state"]), values))
        axes.set_title(f"{task}: {last['test']}")
    for name, points in curves.items():
        draw_spread(axes, name, sorted(points))
    axes.set_xscale("log", base=2)
    axes.set_xlabel("numbers in the state")


def _against_length(axes, task, models):
    several_widths = len({width for _, _, width in models}) > 1
    tests = []
    for (_, name, width), some in models.items():
        found = accuracies(some)
        tests = list(found)
        name = f"{name}, D {width}" if several_widths else name
        draw_spread(axes, name, list(enumerate(found.values())))
    axes.set_xticks(range(len(tests)), tests, rotation=20, ha="right")
    axes.set_title(task)
