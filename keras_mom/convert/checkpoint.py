"""Reading and writing checkpoints of named tensors, a tensor at a time."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPES = {
    "float32": np.dtype("float32"),
    "float16": np.dtype("float16"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
# As safetensors writes them.
_SHORT_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Pickles: to read one is to run what it says.
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class TensorInfo(NamedTuple):
    """What is known of a tensor before it is read.

    Attributes:
        file: `pathlib.Path` of its file, or None in memory.
        shape: tuple of int.
        dtype: name of the dtype, such as `"bfloat16"`.
    """

    file: Any
    shape: tuple
    dtype: str


class Checkpoint(Mapping):
    """The tensors of a checkpoint by name, each read when it is asked for.

    Opening a checkpoint reads the headers of its files alone. One file is open at a
    time, and nothing that was read is kept.

    Args:
        source: folder with `model.safetensors`, or with `model.safetensors.index.json`
            and the files that it names; either of these files; any other
            `.safetensors` file; or a dict from names to arrays or tensors of NumPy,
            PyTorch, JAX or TensorFlow.

    Attributes:
        info: dict from names to `TensorInfo`, in the order of the files.
        config: what `config.json` beside the files holds, a dict, or None.

    Raises:
        ValueError: if `source` is not such a checkpoint, if its index and its files
            disagree, or if it is a pickle.

    Example:

    >>> checkpoint = keras_mom.convert.Checkpoint("mom-340m")
    >>> checkpoint.info["model.norm.weight"].shape
    (1024,)
    >>> checkpoint["model.norm.weight"]  # a NumPy array, bfloat16 where the file is
    """

    def __init__(self, source):
        self.config = None
        self._tensors = None
        self._open = None
        if isinstance(source, Mapping):
            wrong = [
                f"{name!r}: {type(x).__name__}"
                for name, x in source.items()
                if not (hasattr(x, "shape") and hasattr(x, "dtype"))
            ]
            raise_problems("A state dict must hold tensors.", {"others": wrong})
            self._tensors = source
            self.info = {
                name: TensorInfo(None, tuple(x.shape), dtype_name(x.dtype))
                for name, x in source.items()
            }
            return
        folder, files, weight_map = _find_files(source)
        if (folder / CONFIG).is_file():
            self.config = read_json(folder / CONFIG)
        self.info = _read_headers(files)
        if weight_map is not None:
            _check_index(weight_map, self.info)

    def __getitem__(self, name):
        """The tensor, as a NumPy array of its own dtype."""
        info = self.info[name]
        if self._tensors is not None:
            return _to_numpy(self._tensors[name])
        if self._open is None or self._open[0] != info.file:
            self.close()
            self._open = info.file, _open(info.file)
        return self._open[1].get_tensor(name)

    def __iter__(self):
        return iter(self.info)

    def __len__(self):
        return len(self.info)

    def close(self):
        """Closes the file that is open."""
        if self._open is not None:
            handle, self._open = self._open[1], None
            handle.__exit__(None, None, None)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def write_checkpoint(folder, infos, read, config, max_file_bytes):
    """Writes tensors as safetensors files, one of them in memory at a time.

    Args:
        folder: where to; it is made, and holds no weights yet.
        infos: dict from names to `TensorInfo`, in the order of writing.
        read: function from a name to the NumPy array.
        config: dict, for `config.json`.
        max_file_bytes: most bytes of tensors a file; a larger tensor gets its own.
    """
    from safetensors.numpy import save_file

    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`path` must be a folder. Received: {str(folder)!r}")
    folder.mkdir(parents=True, exist_ok=True)
    present = sorted(x.name for x in folder.glob("*.safetensors*"))
    if present:
        raise ValueError(
            f"`path` holds weights already: {', '.join(present)}. Give an empty "
            f"folder. Received: path={str(folder)!r}"
        )
    _write_json(folder / CONFIG, config)
    shards, total, size = [[]], 0, 0
    for name, info in infos.items():
        count = int(np.prod(info.shape, dtype="int64")) * DTYPES[info.dtype].itemsize
        if shards[-1] and size + count > max_file_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += count
        total += count
    weight_map = {}
    for place, names in enumerate(shards, start=1):
        file = WEIGHTS
        if len(shards) > 1:
            file = f"model-{place:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: np.ascontiguousarray(read(name)) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        del tensors
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / INDEX, index)


def read_json(file):
    """The dict that a JSON file holds."""
    try:
        content = json.loads(Path(file).read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"`{file}` cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"`{file}` must hold a JSON object. Received: {content!r}")
    return content


def dtype_name(dtype):
    """`"bfloat16"` of any framework's, or safetensors', name for it."""
    name = getattr(dtype, "name", None) or str(dtype)
    return _SHORT_NAMES.get(name, name.removeprefix("torch."))


def raise_problems(what, problems):
    """Raises a ValueError with all of `problems`, a dict from kinds to lists."""
    lines = [
        f"{kind} ({len(items)}):\n  " + "\n  ".join(items)
        for kind, items in problems.items()
        if items
    ]
    if lines:
        raise ValueError("\n".join([what, *lines]))


def _find_files(source):
    """The folder, the files, and what the index says of them, or None."""
    path = Path(os.fspath(source))
    if not path.exists():
        raise ValueError(
            "A checkpoint must be a folder or a file on this machine, or a dict of "
            f"tensors. Received: {str(path)!r}, which does not exist"
        )
    if path.is_file():
        if path.suffix in _PICKLED:
            _refuse_pickle([path])
        if path.name.endswith(".safetensors.index.json"):
            return _indexed(path)
        if path.suffix != ".safetensors":
            raise ValueError(
                "A checkpoint's file must end in .safetensors or "
                f".safetensors.index.json. Received: {str(path)!r}"
            )
        return path.parent, [path], None
    single, index = path / WEIGHTS, path / INDEX
    if single.exists() and index.exists():
        raise ValueError(
            f"The folder holds two checkpoints, {WEIGHTS} and {INDEX}: give the path "
            f"of one of them. Received: {str(path)!r}"
        )
    if index.exists():
        return _indexed(index)
    if single.exists():
        return path, [single], None
    pickled = [x for x in sorted(path.iterdir()) if x.suffix in _PICKLED]
    if pickled:
        _refuse_pickle(pickled)
    raise ValueError(
        f"The folder holds neither {WEIGHTS} nor {INDEX}. Received: {str(path)!r}"
    )


def _indexed(index):
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"`{index}` must hold a `weight_map` from tensors to files")
    names = list(dict.fromkeys(str(x) for x in weight_map.values()))
    # A name with a path could point anywhere.
    wrong = [x for x in names if not re.fullmatch(r"[\w.\-]+", x)]
    absent = [x for x in names if x not in wrong and not (index.parent / x).is_file()]
    problems = {
        "not the name of a file in the folder": [repr(x) for x in wrong],
        "missing files": absent,
    }
    raise_problems(f"`{index}` does not fit its folder.", problems)
    return index.parent, [index.parent / x for x in names], weight_map


def _refuse_pickle(files):
    raise ValueError(
        f"{', '.join(x.name for x in files)}: pickled weights are not read, since "
        "a pickle can run any program. Save the model as safetensors: "
        "`model.save_pretrained(folder, safe_serialization=True)`, or give "
        '`torch.load(file, map_location="cpu", weights_only=True)`, a dict of tensors'
    )


def _read_headers(files):
    info, twice = {}, []
    for file in files:
        with _open(file) as handle:
            for name in handle.keys():
                if name in info:
                    twice.append(f"{name}: {info[name].file.name} and {file.name}")
                part = handle.get_slice(name)
                shape, dtype = tuple(part.get_shape()), dtype_name(part.get_dtype())
                info[name] = TensorInfo(file, shape, dtype)
    raise_problems("The checkpoint's files overlap.", {"tensors in two files": twice})
    return info


def _check_index(weight_map, info):
    problems = {
        "missing tensors, which the index names": [
            f"{name}: not in {file}"
            for name, file in weight_map.items()
            if name not in info or info[name].file.name != file
        ],
        "extra tensors, which the index does not name": [
            f"{name}: in {x.file.name}"
            for name, x in info.items()
            if name not in weight_map
        ],
    }
    raise_problems("The checkpoint's index and its files disagree.", problems)


def _open(file):
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(
            "Checkpoints are read with safetensors: pip install 'safetensors>=0.8'"
        ) from error
    try:
        return safe_open(file, framework="np")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"`{file}` is not a safetensors file: {error}") from error


def _to_numpy(tensor):
    if hasattr(tensor, "detach"):
        tensor = tensor.detach().cpu()
        if dtype_name(tensor.dtype) == "bfloat16":
            # PyTorch knows no bfloat16 of NumPy; float32 holds it exactly.
            return tensor.float().numpy().astype(DTYPES["bfloat16"])
        return tensor.numpy()
    return np.asarray(tensor)


def _write_json(file, content):
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")
