"""The layer calls its Pallas kernels as these want to be called, on JAX.

They run in Pallas' interpreters, as if JAX ran on a GPU or a TPU.
"""

import functools

import keras
import numpy as np
import pytest
from keras import ops

from keras_mom import MoMLayer
from keras_mom.ops.dispatch import implementations, operations

BATCH, LENGTH, WIDTH = 2, 70, 32

if keras.backend.backend() == "jax":
    import jax
    import jax.numpy as jnp

    from keras_mom.ops import pallas_kernels
    from keras_mom_kernels.memory_scan import jax as scan_kernels
    from keras_mom_kernels.memory_step import jax as step_kernels

    # Compiles in a third of the time.
    fast_compile = functools.partial(
        jax.jit,
        compiler_options={
            "xla_backend_optimization_level": 0,
            "xla_llvm_disable_expensive_passes": True,
        },
    )

    @pytest.fixture(params=("gpu", "tpu"))
    def accelerator(request, monkeypatch):
        """JAX as if on an accelerator, whose kernels count their calls."""
        calls = []

        def counted(function):
            @functools.wraps(function)
            def call(*tensors, **options):
                calls.append(function.__name__)
                options |= dict(kernels=request.param, interpret=True)
                return function(*tensors, **options)

            return call

        for module, name in (
            (scan_kernels, "memory_scan"),
            (step_kernels, "memory_step"),
        ):
            monkeypatch.setattr(module, name, counted(getattr(module, name)))
        monkeypatch.setattr(scan_kernels, "platform", lambda: request.param)
        return calls

    def make_layers(dtype, rule):
        """The same layer through the kernels and through the portable form."""
        layers = [
            MoMLayer(
                2,
                16,
                num_memories=3,
                update_rule=rule,
                implementation=name,
                return_state=True,
                dtype=dtype,
            )
            for name in ("pallas", "portable")
        ]
        for layer in layers:
            layer.build((BATCH, LENGTH, WIDTH))
        layers[0].set_weights(layers[1].get_weights())
        return layers

    def draw():
        random = np.random.default_rng(0)
        inputs = random.normal(size=(BATCH, LENGTH, WIDTH)).astype("float32")
        return inputs, random.uniform(size=(BATCH, LENGTH)) < 0.9

    def error(actual, expected):
        actual, expected = (np.asarray(x, "float64") for x in (actual, expected))
        assert actual.shape == expected.shape
        return np.linalg.norm(actual - expected) / np.linalg.norm(expected)

    @pytest.mark.parametrize(
        "rule, dtype, limits",
        (
            ("gated_delta_net", "float32", (1e-5, 1e-4)),
            ("gated_delta_net", "mixed_bfloat16", (1e-2, 3e-2)),
            ("kda", "float32", (1e-5, 1e-4)),
        ),
    )
    def test_sequences(accelerator, rule, dtype, limits):
        inputs, mask = draw()
        results = []
        for layer in make_layers(dtype, rule):
            others = [x.value for x in layer.non_trainable_variables]

            def loss(weights, layer=layer, others=others):
                (output, (memories, _)), _ = layer.stateless_call(
                    weights, others, inputs, mask=mask
                )
                total = jnp.sum(jnp.sin(output.astype("float32")))
                return total + jnp.sum(jnp.cos(memories)), output

            weights = [x.value for x in layer.trainable_variables]
            gradient = fast_compile(jax.value_and_grad(loss, has_aux=True))
            (_, output), grads = gradient(weights)
            results.append((output, grads))
        assert set(accelerator) == {"memory_scan"}
        (output, grads), (expected, expected_grads) = results
        assert error(output, expected) <= limits[0]
        for actual, wanted in zip(grads, expected_grads, strict=True):
            assert error(actual, wanted) <= limits[1]

    def test_tokens(accelerator):
        inputs, _ = draw()
        layer, portable = make_layers("float32", "gated_delta_net")
        expected, _ = portable(inputs[:, :3])
        state = layer.get_initial_state(BATCH)
        for t in range(3):
            output, state = layer(inputs[:, t : t + 1], initial_state=state)
            assert error(output[:, 0], expected[:, t]) <= 1e-5
        assert set(accelerator) == {"memory_step"}

    def test_what_no_kernel_serves_is_portable(accelerator):
        query, value = jnp.ones((1, 4, 2, 16)), jnp.ones((1, 4, 2, 24))
        options = dict(
            beta=None,
            write="additive",
            erase_before_decay=False,
            cu_seqlens=None,
            aligned=None,
            initial_state=None,
            scale=1.0,
        )
        with pytest.raises(NotImplementedError, match="value channels"):
            pallas_kernels._scan(
                query, query, value, log_decay=-value, decay_axis="value", **options
            )
        assert accelerator == []

    def test_every_operation_is_named():
        for operation in operations():
            assert "pallas" in implementations(operation)

    def test_a_cpu_has_no_kernels():
        inputs, _ = draw()
        layer = MoMLayer(2, 16, implementation="pallas")
        with pytest.raises(NotImplementedError, match="need a GPU or a TPU.*'cpu'"):
            layer(inputs)
        assert ops.shape(MoMLayer(2, 16)(inputs)) == inputs.shape
