"""Times of `MoMLayer` and of a language model of such layers on a GPU, on JAX."""

import functools
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from gpu_jax import compiled, milliseconds
from gpu_models import (
    BATCH,
    DEPTH,
    LENGTH,
    VOCABULARY,
    WIDTH,
    language_model,
    mom_layer,
)
from gpu_scan import kernel_time, print_kernels

from keras_mom_kernels.memory_scan import jax as scans


def values(variables):
    return [variable.value for variable in variables]


def time_layer(name, layer):
    layer.build((BATCH, LENGTH, WIDTH))
    x = jax.random.normal(jax.random.key(0), (BATCH, LENGTH, WIDTH), jnp.bfloat16)
    weights, others = (
        values(layer.trainable_variables),
        values(layer.non_trainable_variables),
    )

    def forward(weights, x):
        return layer.stateless_call(weights, others, x)[0]

    def both(weights, x):
        output, pull = jax.vjp(forward, weights, x)
        return output, pull(output)

    found = []
    for function in (forward, both):
        program, seconds, memory = compiled(function, weights, x)

        def call(program=program):
            return jax.block_until_ready(program(weights, x))

        took = milliseconds(lambda program=program: program(weights, x))
        found.append((took, kernel_time(call), seconds, memory))
    (ahead, ahead_kernels, *_), (total, total_kernels, seconds, memory) = found
    print(
        f"{name}  forward {ahead:.2f} ms, with backward {total:.2f} ms; kernels "
        f"{ahead_kernels:.2f} and {total_kernels:.2f} ms; extra {memory:.0f} MiB; "
        f"compiled in {seconds:.1f} s",
        flush=True,
    )
    print_kernels(lambda: jax.block_until_ready(program(weights, x)), least=0.03)


def run_layer(with_portable=False, with_mosaic=False):
    time_layer("MoMLayer", mom_layer())
    if with_mosaic:
        scan = functools.partial(scans.memory_scan, kernels="gpu")
        with mock.patch.object(scans, "memory_scan", scan):
            time_layer("MoMLayer, no Mosaic", mom_layer())
    if with_portable:
        time_layer("MoMLayer, portable", mom_layer(implementation="portable"))


def time_training(depth=DEPTH):
    model = language_model(depth)
    others = values(model.non_trainable_variables)
    random = np.random.default_rng(0)
    tokens = jnp.asarray(random.integers(VOCABULARY, size=(BATCH, LENGTH + 1)), "int32")

    def loss(weights, tokens):
        logits, _, losses = model.stateless_call(
            weights, others, tokens[:, :-1], training=True, return_losses=True
        )
        logits = logits.astype("float32")
        chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen) + sum(losses)

    weights = values(model.trainable_variables)
    count = sum(x.size for x in weights)
    program, seconds, memory = compiled(jax.grad(loss), weights, tokens)
    took = milliseconds(lambda: program(weights, tokens), 3, 5)
    print(
        f"{depth} layers, {count / 1e6:.0f}M parameters: training step {took:.1f} ms "
        f"({BATCH * LENGTH / took * 1e3:.0f} tokens/s), {memory / 1024:.1f} GiB beside "
        f"the weights, compiled in {seconds:.1f} s",
        flush=True,
    )


def time_decoding(depth=DEPTH, batches=(1, 32, 256), steps=64):
    for batch in batches:
        model = language_model(depth, batch=batch)
        weights = values(model.trainable_variables)
        token = jnp.zeros((batch, 1), "int32")

        def step(state, token, weights, model=model):
            logits, state = model.stateless_call(weights, state, token)
            return state, jnp.argmax(logits, -1).astype("int32")

        def decode(state, token, weights, step=step):
            def body(carry, _):
                return step(*carry, weights), None

            return jax.lax.scan(body, (state, token), length=steps)[0]

        once = jax.jit(step, donate_argnums=0)
        many = jax.jit(decode, donate_argnums=0)
        times = []
        for function, count in ((once, steps), (many, 1)):
            state = [jnp.array(x) for x in values(model.non_trainable_variables)]
            state, last = function(state, token, weights)
            best = float("inf")
            for _ in range(5):
                jax.block_until_ready(state)
                started = time.perf_counter()
                for _ in range(count):
                    state, last = function(state, last, weights)
                jax.block_until_ready(last)
                best = min(best, (time.perf_counter() - started) / steps * 1e3)
            times.append(best)
        print(
            f"decoding, batch {batch}: {times[1]:.2f} ms a token in a loop on the GPU "
            f"({batch / times[1] * 1e3:.0f} tokens/s), launched by the host "
            f"{times[0]:.2f} ms",
            flush=True,
        )


def run_model(parts):
    if "decode" in parts:
        time_decoding()
    if "train" in parts:
        time_training()
