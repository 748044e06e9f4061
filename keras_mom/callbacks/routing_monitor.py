"""A callback that watches the routers."""

import io
import os
from typing import Any

import keras
import numpy as np

from keras_mom.checks import check_positive
from keras_mom.visualization import (
    RoutingProbe,
    memory_shares,
    memory_tokens,
    mom_layers,
    new_figure,
    plot_entropy,
    plot_shares,
    plot_tokens,
    router_entropy,
    save_figure,
)
from keras_mom.visualization.event_file import EventFile


class RoutingMonitor(keras.callbacks.Callback):
    """Keeps, at the end of epochs, how the MoM layers route.

    To the logs go `router_entropy`, the layers' mean, and `largest_memory_share`, the
    largest share of the routed tokens that a memory has in any layer; `History` and
    other callbacks find them there. `history` has the figures of each layer.

    Args:
        inputs: what the model is called with to see how it routes: an array, or a dict
            or list of arrays, small. If None, figures are those of the last batch of
            the epoch.
        token_ids: integers `[B, T]`, the tokens in `inputs`, if pictures are to show
            which tokens go to which memory. Defaults to `inputs`, or their
            "token_ids", if those are integers `[B, T]`.
        token_names: a name for each token id, for these pictures.
        png_dir: if given, pictures are written to this folder: `shares_<epoch>.png`,
            `tokens_<layer>_<epoch>.png`, and `entropy.png`.
        tensorboard_dir: if given, numbers and pictures are written to this folder for
            TensorBoard, numbers alone without matplotlib.
        every: after how many epochs each.

    Attributes:
        layer_names: names of the layers, known once training begins.
        history: a dict of lists, one entry for each time: `epoch`, counted from 1,
            `share`, float `[layers, M]`, and `entropy`, float `[layers]`, in nats.

    Raises:
        ValueError: if an argument does not fit, or the model has no MoM layer.
        ImportError: with `png_dir`, if matplotlib is not installed.

    Example:

    >>> monitor = keras_mom.callbacks.RoutingMonitor(x[:8], png_dir="routing")
    >>> model.fit(x, y, epochs=10, callbacks=[monitor])
    """

    def __init__(
        self,
        inputs=None,
        *,
        token_ids=None,
        token_names=None,
        png_dir=None,
        tensorboard_dir=None,
        every=1,
    ):
        super().__init__()
        check_positive("every", every)
        if token_ids is not None and inputs is None:
            raise ValueError(
                "`token_ids` are the tokens in `inputs`, which must be given too. "
                "Received: inputs=None"
            )
        if png_dir is not None:
            new_figure()  # raises without matplotlib
        self.inputs = inputs
        self.token_ids = _token_ids(inputs) if token_ids is None else token_ids
        self.token_names = token_names
        self.png_dir = png_dir
        self.tensorboard_dir = tensorboard_dir
        self.every = every
        self.layer_names: list[str] = []
        self.history: dict[str, list[Any]] = {"epoch": [], "share": [], "entropy": []}
        self._probe: Any = None
        self._events: Any = None

    def on_train_begin(self, logs=None):
        layers = mom_layers(self.model)
        sizes = sorted({layer.num_memories for layer in layers})
        if len(sizes) > 1:
            raise ValueError(
                "`RoutingMonitor` needs layers with the same `num_memories`. "
                f"Received: a model with num_memories of {sizes}"
            )
        self._layers = layers
        self.layer_names = [layer.path for layer in layers]
        # Made here, since a callback outlives a model's compilation.
        self._probe = None if self.inputs is None else RoutingProbe(self.model)
        if self.tensorboard_dir is not None:
            self._events = EventFile(self.tensorboard_dir)

    def on_train_end(self, logs=None):
        if self._events is not None:
            self._events.close()
            self._events = None

    def on_epoch_end(self, epoch, logs=None):
        if (epoch + 1) % self.every:
            return
        routing = None
        if self._probe is None:
            statistics = [layer.routing_statistics for layer in self._layers]
            shares = np.stack([one["share"] for one in statistics]).astype("float64")
            entropy = np.array([one["entropy"] for one in statistics])
        else:
            routing = self._probe(self.inputs)
            self.layer_names = [layer.name for layer in routing]
            shares, entropy = memory_shares(routing), router_entropy(routing)
        self.history["epoch"].append(epoch + 1)
        self.history["share"].append(shares)
        self.history["entropy"].append(entropy)
        if logs is not None:
            logs["router_entropy"] = float(entropy.mean())
            logs["largest_memory_share"] = float(shares.max())
        if self._events is not None:
            self._write_numbers(epoch + 1, shares, entropy)
        if self.png_dir is not None or (self._events is not None and _can_draw()):
            self._draw(epoch + 1, shares, routing)
        if self._events is not None:
            self._events.flush()

    def _write_numbers(self, epoch, shares, entropy):
        for name, share, value in zip(self.layer_names, shares, entropy):
            self._events.add_scalar(f"router_entropy/{name}", value, epoch)
            for memory, part in enumerate(share):
                tag = f"memory_share/{name}/memory_{memory}"
                self._events.add_scalar(tag, part, epoch)

    def _draw(self, epoch, shares, routing):
        title = f"epoch {epoch}"
        names = self.layer_names
        self._keep(f"shares_{epoch:04d}", plot_shares(shares, names, title), epoch)
        if routing is not None and self.token_ids is not None:
            tokens = np.asarray(self.token_ids)
            for name, layer in zip(names, routing):
                counts = memory_tokens(layer, tokens, int(tokens.max()) + 1)
                figure = plot_tokens(counts, self.token_names, title=title)
                self._keep(
                    f"tokens_{name.replace('/', '_')}_{epoch:04d}", figure, epoch
                )
        entropies = np.stack(self.history["entropy"])
        figure = plot_entropy(entropies, names, shares.shape[1])
        self._keep("entropy", figure, epoch)

    def _keep(self, name, figure, epoch):
        if self.png_dir is not None:
            save_figure(figure, os.path.join(self.png_dir, f"{name}.png"))
        if self._events is not None:
            buffer = io.BytesIO()
            save_figure(figure, buffer)
            width, height = figure.canvas.get_width_height()
            tag = f"routing/{name.removesuffix(f'_{epoch:04d}')}"
            self._events.add_image(tag, buffer.getvalue(), width, height, epoch)


def _token_ids(inputs):
    """Integers `[B, T]` among a model's inputs, or None."""
    if isinstance(inputs, dict):
        inputs = inputs.get("token_ids")
    if inputs is None or isinstance(inputs, (list, tuple)):
        return None
    inputs = keras.ops.convert_to_numpy(inputs)
    whole = np.issubdtype(inputs.dtype, np.integer) and inputs.ndim == 2
    return inputs if whole else None


def _can_draw():
    try:
        new_figure()
    except ImportError:
        return False
    return True
