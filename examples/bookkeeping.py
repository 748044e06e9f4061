"""What examples of many runs share: results, learning rates, backups."""

import contextlib
import csv
import os
import platform
import shutil
import statistics
import subprocess
from typing import Any

import keras

try:
    import fcntl
except ImportError:
    fcntl = None


class Backup(keras.callbacks.Callback):
    """Keeps weights and optimizer of the last epoch, and goes on from there.

    Unlike `keras.callbacks.BackupAndRestore`, whose file is torn where it is killed in
    the midst of writing: a file gets its name when it is complete.

    Args:
        folder: folder of the backup, of this training alone.
    """

    model: Any

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def on_train_begin(self, logs=None):
        os.makedirs(self.folder, exist_ok=True)
        kept = self._kept()
        if kept:
            # Without its variables the optimizer would begin anew.
            self.model.optimizer.build(self.model.trainable_variables)
            self.model.load_weights(os.path.join(self.folder, kept[-1]))
            self.model._initial_epoch = int(kept[-1].partition(".")[0])

    def on_epoch_end(self, epoch, logs=None):
        before = self._kept()
        draft = os.path.join(self.folder, "draft.weights.h5")
        self.model.save_weights(draft, overwrite=True)
        name = f"{epoch + 1:06d}.weights.h5"
        os.replace(draft, os.path.join(self.folder, name))
        for old in before:
            if old != name:
                os.remove(os.path.join(self.folder, old))

    def remove(self):
        """Removes the backup of a training that is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _kept(self):
        names = os.listdir(self.folder)
        return sorted(name for name in names if name[0].isdigit())


def forget_models():
    """Frees what the models of this process hold; the dtype policy in force stays.

    `keras.utils.clear_session` alone sets it back to float32.
    """
    policy = keras.config.dtype_policy()
    keras.utils.clear_session(free_memory=True)
    keras.config.set_dtype_policy(policy)


class PeakRate(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule times a highest learning rate that is a variable of an optimizer.

    Written into a program as a number, each rate of a sweep would be compiled anew.

    Args:
        schedule: from a step to a share of the highest rate.
    """

    def __init__(self, schedule):
        self.schedule = schedule
        self.peak: Any = None

    def __call__(self, step):
        return self.peak * self.schedule(step)

    @classmethod
    def adamw(cls, learning_rate, schedule, **options):
        """`keras.optimizers.AdamW` with such a schedule."""
        rates = cls(schedule)
        optimizer = keras.optimizers.AdamW(rates, **options)
        rates.peak = optimizer.add_variable(
            (), keras.initializers.Constant(learning_rate), "float32", name="peak_rate"
        )
        return optimizer


class Results:
    """Finished runs: a CSV file each, with a line for each test, and one of all.

    Several commands may share a folder. A file is put in its place as a whole, so that
    none ever holds half a run.

    Args:
        folder: where they are kept.
        columns: what tells one run from another.
        measured: the columns of what was measured.
        name: a function from a run to the name of its file.
        known: CSV files of finished runs that were kept elsewhere; the file of all has
            them too.

    Raises:
        ValueError: if a file of `known` is not there, or none of such runs.
    """

    def __init__(self, folder, columns, measured, name, known=()):
        self.columns, self.measured, self.name = columns, measured, name
        self.folder = os.path.join(folder, "runs")
        self.path = os.path.join(folder, "results.csv")
        os.makedirs(self.folder, exist_ok=True)
        self.known = []
        for path in known:
            if not os.path.exists(path):
                raise ValueError(f"`--known`: there is no {path}")
            rows = read_rows(path)
            missing = {*columns, *measured} - set(rows[0] if rows else ())
            if missing:
                raise ValueError(
                    f"`--known`: {path} is no file of such runs; it has no column "
                    f"{', '.join(sorted(missing))}"
                )
            rows = [{c: row[c] for c in (*columns, *measured)} for row in rows]
            self.known += [row for row in rows if row not in self.known]

    def rows_of(self, run):
        """The lines of a run, a dict of `columns`; none if it is not finished."""
        wanted = {column: str(run[column]) for column in self.columns}
        for rows in (read_rows(self._file(run)), self.known):
            found = [row for row in rows if wanted.items() <= row.items()]
            if found:
                return found
        return []

    def add(self, run, lines):
        """Adds a run with the lines of its tests, dicts of what was measured."""
        columns = (*self.columns, *self.measured)
        write_rows(self._file(run), columns, [{**run, **line} for line in lines])
        names = sorted(os.listdir(self.folder))
        rows = [
            row
            for name in names
            if name.endswith(".csv")
            for row in read_rows(os.path.join(self.folder, name))
        ]
        known = [row for row in self.known if row not in rows]
        write_rows(self.path, columns, known + rows)

    @contextlib.contextmanager
    def claimed(self, run):
        """Keeps other processes from a run; whether it was not theirs already.

        A process that dies lets go of its run.
        """
        if fcntl is None:  # not on Windows, where commands do not share runs
            yield True
            return
        path = os.path.join(self.folder, f"{self.name(run)}.lock")
        with open(path, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
                return
            try:
                yield True
            finally:
                os.remove(path)

    def _file(self, run):
        return os.path.join(self.folder, f"{self.name(run)}.csv")


def read_rows(path):
    """The lines of a CSV file, none if there is no such file."""
    if not os.path.exists(path):
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path, columns, rows):
    """Writes a CSV file, and puts it in its place as a whole."""
    draft = f"{path}.{os.getpid()}.tmp"
    with open(draft, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(draft, path)


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


def draw(plot, rows, folder):
    """Prints the files of `plot(rows, folder)`, if matplotlib is installed."""
    try:
        files = plot(rows, folder)
    except ImportError as error:
        print(f"No plots: {error}")
    else:
        print("\n".join(files))


def draw_spread(axes, name, points):
    """Draws places and the values of the seeds at each: mean, lowest and highest."""
    means = [statistics.fmean(values) for _, values in points]
    # Rounding may put the mean of equal values outside of them.
    spread = [
        [max(0.0, mean - min(values)) for mean, (_, values) in zip(means, points)],
        [max(0.0, max(values) - mean) for mean, (_, values) in zip(means, points)],
    ]
    places = [place for place, _ in points]
    # Colours begin again after ten.
    line = ("-", "--", ":")[len(axes.containers) // 10 % 3]
    axes.errorbar(places, means, spread, fmt=f"o{line}", capsize=3, label=name)
