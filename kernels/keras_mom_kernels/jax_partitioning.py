"""Kernels on several devices: run shard by shard along batch and heads, on JAX.

Neither partitioner of XLA sees into a kernel: without this it would gather what the
kernel takes, and each device would compute all of it.
"""

import math

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

# The axes along which nothing crosses from one place to another.
INDEPENDENT = ("batch", "heads")


def by_shards(function, operands, results):
    """A function of arrays that runs on the shards that a device has.

    Args:
        function: takes arrays or None, and returns a tuple of arrays or None. Along
            the axes called `"batch"` and `"heads"`, no place of a result depends on
            another place of an operand; axes of these names are as long in all of
            them. `"batch"` is the first axis everywhere.
        operands: the axes' names of each operand, such as `"batch time heads"`.
            Axes of other names are whole on each device.
        results: the same of each result, None for those that are None.

    Returns:
        The function, which `jax.vmap` maps by a longer batch.
    """
    if jax.device_count() == 1:
        return function

    def call(*tensors):
        places = [i for i, x in enumerate(tensors) if x is not None]

        def of_present(*present):
            filled = [None] * len(tensors)
            for place, x in zip(places, present):
                filled[place] = x
            return tuple(x for x in function(*filled) if x is not None)

        names = [operands[i].split() for i in places]
        wanted = [x.split() for x in results if x is not None]
        run = _partitioned(of_present, names, wanted)
        found = iter(run(*(tensors[i] for i in places)))
        return tuple(None if x is None else next(found) for x in results)

    return call


def _partitioned(function, operands, results):
    # Compiled: what is partitioned may hold no constants of its own.
    partitioned = custom_partitioning(jax.jit(function))

    def partition(mesh, shapes, result_shapes):
        del result_shapes
        found = _axes(mesh, operands, shapes)

        def sharding(names):
            axes = (found.get(name) for name in names)
            return NamedSharding(mesh, PartitionSpec(*axes))

        shardings = tuple(map(sharding, results)), tuple(map(sharding, operands))
        return mesh, function, *shardings

    def infer(mesh, shapes, result_shapes):
        return partition(mesh, shapes, result_shapes)[2]

    partitioned.def_partition(
        partition,
        # The one for the older partitioner, the other for Shardy.
        infer_sharding_from_operands=infer,
        sharding_rule=_rule(operands, results),
    )
    return _mapped(partitioned)


def _axes(mesh, operands, shapes):
    """The mesh axes of the first operand that is sharded along batch, and heads."""
    found = {}
    for names, x in zip(operands, shapes):
        spec = getattr(x.sharding, "spec", ())
        for name, axes, size in zip(names, spec, x.shape):
            if name not in INDEPENDENT or axes is None:
                continue
            every = axes if isinstance(axes, tuple) else (axes,)
            # Shards of unequal length are not for kernels.
            if size % math.prod(mesh.shape[axis] for axis in every) == 0:
                found.setdefault(name, axes)
    return found


def _rule(operands, results):
    """A rule in Shardy's notation, in which no other axis than these is shared."""
    count = iter(range(1000))

    def side(tensors):
        return ", ".join(
            " ".join(
                name if name in INDEPENDENT else f"other{next(count)}" for name in names
            )
            for names in tensors
        )

    return f"{side(operands)} -> {side(results)}"


def _mapped(function):
    """`function`, of which `jax.vmap` makes one of a longer batch."""

    @jax.custom_batching.custom_vmap
    def call(*tensors):
        return function(*tensors)

    @call.def_vmap
    def rule(size, mapped, *tensors):
        def merged(x, is_mapped):
            if not is_mapped:
                x = jax.numpy.broadcast_to(x, (size, *x.shape))
            return x.reshape(size * x.shape[1], *x.shape[2:])

        found = call(*map(merged, tensors, mapped))
        split = tuple(x.reshape(size, x.shape[0] // size, *x.shape[1:]) for x in found)
        return split, (True,) * len(split)

    return call
