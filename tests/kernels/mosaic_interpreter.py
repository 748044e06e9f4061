"""What Mosaic GPU's interpreter lacks for `mosaic_scan`, in jax 0.11.2."""

import jax
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def available():
    """Whether there is an interpreter that these can be added to."""
    return jax.__version_info__ >= (0, 11, 2)


def complete(monkeypatch):
    """Adds what is missing, until the test ends."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    wgmma = gpu_callbacks.fail_on_exception(_wgmma)
    monkeypatch.setattr(gpu_callbacks, "wgmma", wgmma)
    monkeypatch.setattr(pl, "run_state", _run_state)


def races_found():
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    return interpret_pallas_call.get_races().races_found


def reset():
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    interpret_pallas_call.reset_gpu_interpret_mode_state()


def _wgmma(
    *,
    token,
    mesh_location,
    thread,
    acc_allocation_key_as_array,
    acc_transforms,
    a_allocation_key_as_array,
    a_transforms,
    b_allocation_key_as_array,
    b_transforms,
    source_info=None,
):
    """As the interpreter's own, whose left operand is never in registers."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    memory = gpu_callbacks._get_shared_memory()
    info = gpu_callbacks.memory.GPULoggingInfo(mesh_location, thread, source_info)

    def place(key, transforms):
        key = gpu_callbacks.HostAllocationKey.from_array(key)
        transforms = gpu_callbacks._remove_noop_transforms(transforms)
        return key, memory.access(key, jax.tree.map(int, transforms))

    def content(key, transforms):
        if key.ndim == 2:
            return np.asarray(key)
        where = place(key, transforms)
        return memory.get_buffer_content(*where, thread, logging_info=info)[0]

    left = content(a_allocation_key_as_array, a_transforms)
    right = content(b_allocation_key_as_array, b_transforms)
    total = content(acc_allocation_key_as_array, acc_transforms)
    total = total + np.matmul(left, right, dtype=total.dtype)
    where = place(acc_allocation_key_as_array, acc_transforms)
    memory.store_buffer_content(*where, total, thread, logging_info=info)
    return token


def _run_state(function):
    """Of accumulators, to which products alone are added; they begin with zeros."""

    def run(accumulators):
        def added(*refs):
            function(refs)
            return [x._init + ref[...] for x, ref in zip(accumulators, refs)]

        empty = [plgpu.ACC(x.shape, x.dtype) for x in accumulators]
        return pl.run_scoped(added, *empty)

    return run
