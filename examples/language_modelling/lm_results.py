"""Results of runs: their columns, tables and plots."""

import hashlib
import math
import os
import statistics
from collections import defaultdict

from bookkeeping import draw_spread, read_rows
from lm_models import KINDS

from keras_mom.visualization import new_figure, save_figure

# What tells one run from another, in the file as text.
RUN = (
    "text",
    "model",
    "rule",
    "balance_weight",
    "layers",
    "width",
    "heads",
    "key_dim",
    "value_dim",
    "memories",
    "top_k",
    "attention_heads",
    "attention_every",
    "target",
    "length",
    "batch",
    "steps",
    "epochs",
    "warmup",
    "weight_decay",
    "learning_rate",
    "dtype",
    "seed",
)
MEASURED = (
    "measure",
    "context",
    "predicted",
    "bits_per_byte",
    "validation",
    "router_entropy",
    "largest_memory_share",
    "feed_forward",
    "parameters",
    "activated",
    "bytes",
    "bytes_per_second",
    "seconds",
    "backend",
    "hardware",
)
_TITLES = {
    "last": ("Bits per byte of the same bytes", "bytes in a window"),
    "window": ("Bits per byte of whole windows", "bytes in a window"),
    "position": ("Bits per byte by place in the longest windows", "up to byte"),
}


def run_name(run):
    """A name for the files of a run."""
    text = repr([str(run[column]) for column in RUN])
    parts = [run["model"], run["rule"]]
    if run["balance_weight"] != "":
        parts.append(f"balance{run['balance_weight']:g}")
    parts += [f"rate{run['learning_rate']:g}", f"seed{run['seed']}"]
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return "-".join([part for part in parts if part] + [digest])


def curve_path(folder, run):
    """Path of the file of a run's training curve."""
    return os.path.join(folder, "curves", f"{run_name(run)}.csv")


def label(row):
    """A model's name in tables."""
    name = KINDS[row["model"]]
    if row["rule"]:
        name += f" ({row['rule']})"
    if row["balance_weight"] not in ("", "0.01"):
        name += f", balance {float(row['balance_weight']):g}"
    return name


def best(rows):
    """Rows of each model at the learning rate that did best on validation text.

    Returns:
        A dict from labels to the rows of all seeds and measures.
    """
    rates = defaultdict(lambda: defaultdict(list))
    for row in rows:
        rates[label(row)][float(row["learning_rate"])].append(row)
    return {
        name: min(
            by_rate.values(),
            key=lambda some: statistics.fmean(float(row["validation"]) for row in some),
        )
        for name, by_rate in rates.items()
    }


def values(rows, measure):
    """Bits per byte of the seeds by context, ascending."""
    found = defaultdict(list)
    for row in rows:
        if row["measure"] == measure:
            found[int(row["context"])].append(float(row["bits_per_byte"]))
    return dict(sorted(found.items()))


def tables(rows):
    """Markdown tables: of the models, and of bits per byte against length."""
    chosen = best(rows)
    head = ["model", "activated", "parameters", "feed-forward", "rate", "seeds"]
    head += ["bits per byte", "router entropy", "largest share", "kB/s"]
    lines = []
    for name, some in chosen.items():
        row = some[0]
        speeds = [float(row["bytes_per_second"]) for row in some]
        (bits,) = values(some, "held out").values()
        lines.append(
            [
                name,
                f"{int(row['activated']):,}",
                f"{int(row['parameters']):,}",
                row["feed_forward"],
                f"{float(row['learning_rate']):.1e}",
                str(len(bits)),
                _cell(bits),
                _mean(some, "router_entropy"),
                _mean(some, "largest_memory_share"),
                f"{statistics.median(speeds) / 1000:,.0f}",
            ]
        )
    row = rows[0]
    seen = f"{int(row['steps']) * int(row['batch']) * int(row['length']):,}"
    title = f"Held-out text, after {seen} bytes, in windows of {row['length']}"
    parts = [_table(title, head, lines)]
    for measure, (title, meaning) in _TITLES.items():
        found = {name: values(some, measure) for name, some in chosen.items()}
        contexts = sorted({context for some in found.values() for context in some})
        if contexts:
            head = ["model", *(f"{context:,}" for context in contexts)]
            lines = [
                [name, *(_cell(some.get(context, [])) for context in contexts)]
                for name, some in found.items()
            ]
            parts.append(_table(f"{title}; {meaning}", head, lines))
    return "\n\n".join(parts)


def _mean(rows, column):
    found = [float(row[column]) for row in rows if row[column]]
    return f"{statistics.fmean(found):.3f}" if found else ""


def _cell(bits):
    if not bits:
        return ""
    cell = f"{statistics.fmean(bits):.4f}"
    if len(bits) > 1:
        cell += f" ({min(bits):.4f} to {max(bits):.4f})"
    return cell


def _table(title, head, lines):
    lines = [head, ["---"] * len(head), *lines]
    return f"{title}\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def plot(rows, folder):
    """Draws bits per byte against length, and training curves; returns the files.

    Raises:
        ImportError: without matplotlib.
    """
    chosen = best(rows)
    files = []
    for measure, (title, meaning) in _TITLES.items():
        figure, axes = new_figure(7, 4.5)
        contexts, lowest = set(), math.inf
        for name, some in chosen.items():
            points = values(some, measure)
            if points:
                draw_spread(axes, name, list(points.items()))
                contexts.update(points)
                lowest = min([lowest, *(min(bits) for bits in points.values())])
        axes.set_xscale("log", base=2)
        ticks = sorted(contexts)
        axes.set_xticks(ticks, [f"{context:,}" for context in ticks])
        axes.set_xlabel(meaning)
        if math.isfinite(lowest):
            # A Transformer behind its training length would leave no room for others.
            axes.set_ylim(top=min(axes.get_ylim()[1], 2 * lowest))
        files.append(_finish(figure, axes, title, folder, f"length_{measure}"))
    figure, axes = new_figure(7, 4.5)
    highest = 0.0
    for name, some in chosen.items():
        seed = some[0]["seed"]
        run = next(row for row in some if row["seed"] == seed)
        run = dict(run, learning_rate=float(run["learning_rate"]))
        if run["balance_weight"]:
            run["balance_weight"] = float(run["balance_weight"])
        curve = read_rows(curve_path(folder, run))
        places = [int(row["bytes"]) / 1e6 for row in curve]
        bits = [float(row["validation"]) for row in curve]
        axes.plot(places, bits, marker=".", label=name)
        # Behind the first steps.
        highest = max([highest, *bits[len(bits) // 8 :]])
    if math.isfinite(highest) and highest:
        axes.set_ylim(top=1.02 * highest)
    axes.set_xlabel("million bytes learned from")
    files.append(_finish(figure, axes, "Validation text", folder, "training"))
    return files


def _finish(figure, axes, title, folder, name):
    axes.set_title(title)
    axes.set_ylabel("bits per byte")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
    path = os.path.join(folder, f"{name}.png")
    save_figure(figure, path)
    return path
