"""Library-wide settings.

`implementation` names how the operations of `keras_mom.ops` run. None, the default,
takes the fastest that works for the call at hand.
"""

IMPLEMENTATIONS = ("triton", "pallas", "xla", "portable")

_implementation = None


def set_implementation(name):
    """Sets the implementation of every operation that is not told one itself.

    Args:
        name: `"triton"`, `"pallas"`, `"xla"`, `"portable"`, or None for the fastest
            that works. A name is used or raises; it is never replaced.

    Raises:
        ValueError: if the name is none of these.
    """
    global _implementation
    _implementation = check_implementation(name)


def get_implementation():
    """The name set by `set_implementation`, or None."""
    return _implementation


def check_implementation(name):
    """Returns `name`; raises `ValueError` if no implementation is called so."""
    if name is not None and name not in IMPLEMENTATIONS:
        raise ValueError(
            f"`implementation` must be None or one of {IMPLEMENTATIONS}. "
            f"Received: implementation={name!r}"
        )
    return name
