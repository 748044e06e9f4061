"""Several GPUs that compute as one, on JAX: what they return, and how fast.

    PYTHONPATH=.:kernels python benchmarks/gpu_jax_devices.py

A language model of MoM layers runs on one GPU, then with its batch, and then with its
heads, over all of them. Loss and gradients, in float32, have to be those of one GPU,
and so has the loss in bfloat16, where other kernels serve and steps are timed. Ends
with a non-zero status if an error is above its limit.
"""

import os
import sys

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import keras  # noqa: E402
import numpy as np  # noqa: E402
from gpu_jax import compiled, milliseconds  # noqa: E402
from gpu_models import BATCH, LENGTH, VOCABULARY, language_model  # noqa: E402

import keras_mom  # noqa: E402

# Of the loss and of gradients, and of the loss in bfloat16.
LIMITS = 1e-5, 1e-4, 1e-3
DEPTH, CHECKED_LENGTH = 4, 256
distribution = keras.distribution


def distributions():
    """By name: None for a single device."""
    devices = distribution.list_devices("gpu")
    mesh = distribution.DeviceMesh((1, len(devices)), ["batch", "model"], devices)
    layouts = keras_mom.distribution.layout_map(mesh)
    layouts[".*dense.*/kernel"] = (None, "model")
    return {
        "one GPU": None,
        "DataParallel": distribution.DataParallel(devices=devices),
        "ModelParallel": distribution.ModelParallel(
            layout_map=layouts, batch_dim_name="batch"
        ),
    }


def step_of(how, dtype, length):
    """Loss and gradients of a model as a function, and its arguments."""
    distribution.set_distribution(how)
    keras.utils.set_random_seed(0)
    model = language_model(DEPTH, dtype)
    others = [x.value for x in model.non_trainable_variables]
    random = np.random.default_rng(0)
    tokens = jnp.asarray(random.integers(VOCABULARY, size=(BATCH, length + 1)), "int32")
    if how is not None:
        names = ("batch", None)
        layout = distribution.TensorLayout(names, how.device_mesh)
        tokens = distribution.distribute_tensor(tokens, layout)

    def loss(weights, tokens):
        logits, _, losses = model.stateless_call(
            weights, others, tokens[:, :-1], training=True, return_losses=True
        )
        logits = logits.astype("float32")
        chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen) + sum(losses)

    weights = [x.value for x in model.trainable_variables]
    return jax.value_and_grad(loss), (weights, tokens)


def error(x, y):
    x, y = np.asarray(x, "float64"), np.asarray(y, "float64")
    return np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-300)


def main():
    print(
        len(jax.devices()), "of", jax.devices()[0].device_kind, "jax", jax.__version__
    )
    failed, expected, rounded, alone = 0, None, None, None
    for name, how in distributions().items():
        function, arguments = step_of(how, "float32", CHECKED_LENGTH)
        # GPUs would take TF32 for float32, whose rounding differs with the shapes.
        with jax.default_matmul_precision("highest"):
            loss, grads = jax.jit(function)(*arguments)
        grads = [np.asarray(x) for x in grads]
        if expected is None:
            expected = loss, grads
        pairs = zip(grads, expected[1], strict=True)
        worst = [error(loss, expected[0]), max(error(x, y) for x, y in pairs)]
        function, arguments = step_of(how, "bfloat16", LENGTH)
        program, seconds, _ = compiled(function, *arguments)
        loss = program(*arguments)[0]
        rounded = loss if rounded is None else rounded
        worst.append(error(loss, rounded))
        failed += not all(x <= limit for x, limit in zip(worst, LIMITS, strict=True))
        took = milliseconds(lambda program=program, x=arguments: program(*x), 5, 5)
        alone = took if alone is None else alone
        print(
            f"{name:14} loss {worst[0]:.1e}, gradients {worst[1]:.1e}, in bfloat16 "
            f"loss {worst[2]:.1e} from one GPU; "
            f"step {took:.1f} ms, {alone / took:.2f} times as fast; compiled in "
            f"{seconds:.0f} s",
            flush=True,
        )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
