"""Backups of a training that survive a kill at any moment."""

import os
import shutil
from typing import Any

import keras


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
