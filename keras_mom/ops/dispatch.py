"""Choice of the implementation of an operation.

An operation registers its implementations, fastest first. One that cannot serve a
call raises `NotImplementedError`, and the next is tried; one that was asked for by
name is used or raises.
"""

import warnings

from keras_mom import backend, config

_REGISTRY = {}
_warned = set()


def register(operation, name):
    """Decorator: registers an implementation of `operation` under `name`.

    Args:
        operation: name of the operation.
        name: one of `keras_mom.config.IMPLEMENTATIONS`.
    """
    config.check_implementation(name)

    def decorator(function):
        _REGISTRY.setdefault(operation, {})[name] = function
        return function

    return decorator


def operations():
    """Names of the operations that have an implementation."""
    return tuple(_REGISTRY)


def registered(operation, name):
    """The implementation of `operation` that is registered under `name`."""
    return _REGISTRY[operation][name]


def implementations(operation):
    """Names of the implementations of `operation`, fastest first."""
    return tuple(
        name for name in config.IMPLEMENTATIONS if name in _REGISTRY[operation]
    )


def _asked_for(implementation):
    """The name that a call gives, or the setting; None where neither names one."""
    return config.check_implementation(implementation) or config.get_implementation()


def preferred(operation, implementation):
    """The implementation that `dispatch` tries first.

    Without an accelerator that is the portable one: kernels then refuse their calls.
    """
    name = _asked_for(implementation)
    if name is not None:
        return name
    names = implementations(operation)
    return names[-1] if backend.accelerator() is None else names[0]


def dispatch(operation, implementation, *args, **kwargs):
    """Runs `operation` through the named implementation, or the fastest that works.

    Raises:
        ValueError: if `implementation` is no implementation's name.
        NotImplementedError: if the named implementation does not exist for this
            operation, or cannot serve this call.
    """
    name = _asked_for(implementation)
    candidates = _REGISTRY[operation]
    if name is not None:
        if name not in candidates:
            raise NotImplementedError(
                f"implementation={name!r} of `{operation}` is not available here. "
                f"Available: {implementations(operation)}"
            )
        return candidates[name](*args, **kwargs)
    reasons = []
    for name in implementations(operation):
        if name == "portable":
            _warn_portable(operation, reasons)
        try:
            return candidates[name](*args, **kwargs)
        except NotImplementedError as error:
            reasons.append(f"{name}: {error}")
    raise NotImplementedError(
        f"No implementation of `{operation}` serves this call. {'; '.join(reasons)}"
    )


def _warn_portable(operation, reasons):
    accelerator = backend.accelerator()
    if accelerator is None or operation in _warned:
        return
    _warned.add(operation)
    reason = "; ".join(reasons) or f"no kernel for {accelerator!r} is installed"
    warnings.warn(
        f"`{operation}` runs on {accelerator!r} through its portable form, which is "
        f"slower than a kernel: {reason}.",
        stacklevel=3,
    )
