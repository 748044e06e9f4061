"""Which axes of the layer's weights `keras.distribution.ModelParallel` shards."""

import re

import keras

# By the paths of weights in their layer: which axis of the device mesh each of their
# axes is sharded over. Heads are the outer part of the channels they are in, memories
# the outer part of that.
_AXES = {
    r"(query|key|value|gate)/(kernel|lora_kernel_b)": (None, "heads"),
    r"output/(kernel|lora_kernel_a)": ("heads", None),
    r"(query|key|value)_convolution": (None, "heads"),
    r"memories": (None, None, "heads"),
    r"[^/]+/(A_log|dt_bias|decay_bias|forget_bias|bonus)": ("heads",),
    r"[^/]+/(decay|forget|rate|step|write_strength)/(kernel|up_kernel|bias)": (
        None,
        "heads",
    ),
}

# The same of the other layers in the blocks of `keras_mom.models.MoMBackbone`.
_BLOCK_AXES = {
    r"attention/(query|key|value)/(kernel|lora_kernel_b)": (None, "heads"),
    r"attention/output/(kernel|lora_kernel_a)": ("heads", None),
    r"feed_forward/(.*/)?(experts_)?(gate|up)/(kernel|lora_kernel_b)": (None, "heads"),
    r"feed_forward/(.*/)?(experts_)?down/(kernel|lora_kernel_a)": ("heads", None),
}


def layout_map(
    device_mesh, *, model_axis="model", layer_names=r"mo_m_layer(_\d+)?|mom"
):
    """Layouts of the weights of `keras_mom.MoMLayer`, for model parallelism.

    Projections, short convolutions, what an update rule has for each head, and the
    memories of stateful layers are sharded by heads, projections of each memory by
    memories and heads; the router and all else is whole on each device. In the blocks
    of `keras_mom.models.MoMBackbone`, attention is sharded by heads too, and
    feed-forward networks by their inner width; the embedding is whole. Others' layouts
    can be added to the map that is returned:

        mesh = keras.distribution.DeviceMesh((2, 4), ["batch", "model"], devices)
        layouts = keras_mom.distribution.layout_map(mesh)
        layouts["dense.*/kernel"] = (None, "model")
        keras.distribution.set_distribution(
            keras.distribution.ModelParallel(
                layout_map=layouts, batch_dim_name="batch"
            )
        )

    The devices along `model_axis` have to divide `num_heads`. Keras distributes over
    devices on JAX.

    Args:
        device_mesh: `keras.distribution.DeviceMesh`.
        model_axis: the axis of the mesh to shard over.
        layer_names: regular expression of the whole names of the layers. The default
            is what Keras calls layers that are given no name, and what they are called
            in a `MoMBackbone`.

    Returns:
        `keras.distribution.LayoutMap`.

    Raises:
        ValueError: if the mesh has no axis `model_axis`, or `layer_names` is no
            regular expression.
        TypeError: if `device_mesh` is no `DeviceMesh`.
    """
    if not isinstance(device_mesh, keras.distribution.DeviceMesh):
        raise TypeError(
            "`device_mesh` must be a `keras.distribution.DeviceMesh`. "
            f"Received: {device_mesh!r} of type {type(device_mesh).__name__}"
        )
    if model_axis not in device_mesh.axis_names:
        raise ValueError(
            f"`model_axis` must be an axis of `device_mesh`, one of "
            f"{tuple(device_mesh.axis_names)}. Received: {model_axis!r}"
        )
    try:
        re.compile(layer_names)
    except (TypeError, re.error) as error:
        raise ValueError(
            "`layer_names` must be a regular expression. "
            f"Received: {layer_names!r} ({error})"
        ) from error
    layouts = keras.distribution.LayoutMap(device_mesh)
    for prefix, paths in ((layer_names, _AXES), (r"block_\d+", _BLOCK_AXES)):
        for path, axes in paths.items():
            axes = tuple(model_axis if axis == "heads" else axis for axis in axes)
            layouts[f"(.*/)?({prefix})/{path}"] = axes
    return layouts
