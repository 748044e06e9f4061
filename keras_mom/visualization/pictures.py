"""Pictures of routing, drawn with matplotlib."""

import os

import numpy as np


def new_figure(width=6.0, height=4.0):
    """A matplotlib figure without a window, of a size in inches, and its axes.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Pictures need matplotlib, which is not installed: pip install matplotlib"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def save_figure(figure, path):
    """Writes a figure to a file, such as a .png, and makes its folder.

    Args:
        figure: as the functions of this module return it.
        path: path of the file, or a binary file.
    """
    if isinstance(path, (str, os.PathLike)):
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    figure.savefig(path, dpi=120, format=None if _has_suffix(path) else "png")


def _has_suffix(path):
    return isinstance(path, (str, os.PathLike)) and os.path.splitext(path)[1]


def plot_shares(shares, layer_names=None, title=None):
    """Each memory's share of the tokens, layer by layer, as a grid.

    Source: arXiv 2502.13685, Figures 5 and 9.

    Args:
        shares: `[layers, M]`, as `memory_shares` gives it.
        layer_names: a name for each layer; numbers if None.
        title: title of the picture.

    Returns:
        A matplotlib figure.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    shares = np.asarray(shares)
    layers, memories = shares.shape
    figure, axes = new_figure(1.5 + 0.9 * memories, 1.2 + 0.35 * layers)
    _grid(figure, axes, shares, "share of the tokens")
    axes.set_xticks(range(memories))
    axes.set_xlabel("memory")
    axes.set_yticks(range(layers), _names(layer_names, layers))
    axes.set_ylabel("layer" if layer_names is None else "")
    if title:
        axes.set_title(title)
    return figure


def plot_tokens(counts, token_names=None, most=24, title=None):
    """Which tokens go to which memory, as a grid, most frequent tokens first.

    Args:
        counts: `[vocabulary_size, M]`, as `memory_tokens` gives it.
        token_names: a name for each token id; the ids if None.
        most: number of tokens that are shown.
        title: title of the picture.

    Returns:
        A matplotlib figure. A row shows where a token went, and adds up to 1.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    counts = np.asarray(counts)
    memories = counts.shape[1]
    total = counts.sum(axis=1)
    shown = np.argsort(-total, kind="stable")[:most]
    shown = shown[total[shown] > 0]
    if not shown.size:
        raise ValueError("`counts` must hold a token. Received: zeros only")
    shares = counts[shown] / total[shown, None]
    # Neighbours go to the same memory.
    order = np.lexsort((-shares.max(axis=1), shares.argmax(axis=1)))
    names = [str(i) if token_names is None else str(token_names[i]) for i in shown]
    figure, axes = new_figure(1.5 + 0.9 * memories, 1.2 + 0.22 * len(shown))
    _grid(figure, axes, shares[order], "share of the token's visits")
    axes.set_xticks(range(memories))
    axes.set_xlabel("memory")
    axes.set_yticks(range(len(shown)), [names[i] for i in order], fontsize="small")
    axes.set_ylabel("token")
    if title:
        axes.set_title(title)
    return figure


def plot_text(layer, row=0, token_names=None, title=None):
    """Where the tokens of one sequence go, as a grid over time.

    Args:
        layer: `LayerRouting`.
        row: the batch row that is shown.
        token_names: a name for each of its T tokens; their places if None.
        title: title of the picture.

    Returns:
        A matplotlib figure of the weights `[M, T]`; masked tokens have none.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    length, memories = layer.probabilities.shape[1:]
    weights = np.zeros((memories, length))
    weights[layer.indices[row], np.arange(length)[:, None]] = layer.weights[row]
    weights[:, ~layer.mask[row]] = 0
    figure, axes = new_figure(min(2 + 0.22 * length, 24), 1.4 + 0.3 * memories)
    _grid(figure, axes, weights, "weight")
    axes.set_yticks(range(memories))
    axes.set_ylabel("memory")
    if token_names is not None:
        names = [str(name) for name in token_names]
        axes.set_xticks(range(length), names, rotation=90, fontsize="small")
    axes.set_xlabel("token")
    if title:
        axes.set_title(title)
    return figure


def plot_entropy(entropies, layer_names=None, num_memories=None, title=None):
    """The routers' entropy over training, a line for each layer.

    Args:
        entropies: `[epochs, layers]`, in nats.
        layer_names: a name for each layer; numbers if None.
        num_memories: M; if given, the entropy of a router that tells nothing apart,
            `log(M)`, is drawn too.
        title: title of the picture.

    Returns:
        A matplotlib figure.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    entropies = np.asarray(entropies)
    epochs, layers = entropies.shape
    figure, axes = new_figure()
    for name, values in zip(_names(layer_names, layers), entropies.T):
        axes.plot(np.arange(1, epochs + 1), values, marker=".", label=name)
    if num_memories is not None:
        axes.axhline(np.log(num_memories), linestyle=":", color="gray", label="uniform")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("epoch")
    axes.set_ylabel("entropy of the router (nats)")
    axes.legend(title="layer" if layer_names is None else None, fontsize="small")
    if title:
        axes.set_title(title)
    return figure


def _grid(figure, axes, values, meaning):
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0)
    figure.colorbar(image, ax=axes, label=meaning)


def _names(names, count):
    return [str(i) for i in range(count)] if names is None else list(names)
