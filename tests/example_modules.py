"""Examples as modules, for tests that call what they are made of."""

import contextlib
import importlib.util
import pathlib
import sys

import keras

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


@contextlib.contextmanager
def example_module(name):
    """`examples/<name>.py`, which finds the modules that it imports by their name.

    The dtype policy that it sets ends with the context.
    """
    path = EXAMPLES / f"{name}.py"
    folders = [str(EXAMPLES), str(path.parent)]
    unique = name.replace("/", "_")
    specification = importlib.util.spec_from_file_location(unique, path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.path += folders
    specification.loader.exec_module(module)
    policy = keras.config.dtype_policy()
    yield module
    keras.config.set_dtype_policy(policy)
    for folder in folders:
        sys.path.remove(folder)
