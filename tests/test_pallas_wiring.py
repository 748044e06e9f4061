"""The layer calls its Pallas kernels as these want to be called, on JAX.

They run in Pallas' interpreters, as if JAX ran on a GPU or a TPU.
"""

import functools
import re
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from keras import ops
from selection import exhaustive

from keras_mom import MoMLayer
from keras_mom.ops.dispatch import implementations, operations

BATCH, LENGTH, WIDTH = 2, 70, 32

if keras.backend.backend() == "jax":
    import jax
    import jax.numpy as jnp

    from keras_mom.ops import pallas_kernels
    from keras_mom_kernels.memory_scan import jax as scan_kernels
    from keras_mom_kernels.memory_step import jax as step_kernels
    from keras_mom_kernels.packed_convolution import jax as row_kernels

    @pytest.fixture(params=("gpu", "tpu"))
    def accelerator(request, monkeypatch):
        """JAX as if on an accelerator, whose kernels count their calls."""
        calls = []

        def counted(function, **interpreted):
            @functools.wraps(function)
            def call(*tensors, **options):
                calls.append(function.__name__)
                return function(*tensors, **options, **interpreted, interpret=True)

            return call

        for module, name, platform in (
            (scan_kernels, "memory_scan", "kernels"),
            (step_kernels, "memory_step", "kernels"),
            (step_kernels, "convolution_step", "platform"),
        ):
            function = counted(getattr(module, name), **{platform: request.param})
            monkeypatch.setattr(module, name, function)
        function = counted(row_kernels.packed_convolution)
        monkeypatch.setattr(row_kernels, "packed_convolution", function)
        monkeypatch.setattr(scan_kernels, "platform", lambda: request.param)
        return SimpleNamespace(name=request.param, calls=calls)

    def make_layer(rule, dtype="float32", implementation="portable"):
        """A layer, whose weights are always the same."""
        keras.utils.set_random_seed(0)
        layer = MoMLayer(
            2,
            16,
            num_memories=3,
            update_rule=rule,
            implementation=implementation,
            return_state=True,
            dtype=dtype,
        )
        layer.build((BATCH, LENGTH, WIDTH))
        return layer

    @functools.cache
    def output_and_gradients(rule, dtype, implementation="portable", accelerator=None):
        """On an accelerator, a layer through kernels."""
        del accelerator
        layer = make_layer(rule, dtype, implementation)
        random = np.random.default_rng(0)
        inputs = random.normal(size=(BATCH, LENGTH, WIDTH)).astype("float32")
        mask = random.uniform(size=(BATCH, LENGTH)) < 0.9
        others = [x.value for x in layer.non_trainable_variables]

        def loss(weights):
            (output, (memories, _)), _ = layer.stateless_call(
                weights, others, inputs, mask=mask
            )
            total = jnp.sum(jnp.sin(output.astype("float32")))
            return total + jnp.sum(jnp.cos(memories)), output

        weights = [x.value for x in layer.trainable_variables]
        gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (_, output), grads = gradient(weights)
        return output, grads

    def error(actual, expected):
        actual, expected = (np.asarray(x, "float64") for x in (actual, expected))
        assert actual.shape == expected.shape
        return np.linalg.norm(actual - expected) / np.linalg.norm(expected)

    @pytest.mark.parametrize(
        "rule, dtype",
        (
            ("gated_delta_net", "mixed_bfloat16"),
            pytest.param("kda", "float32", marks=exhaustive),
        ),
    )
    def test_sequences(accelerator, rule, dtype):
        results = (
            output_and_gradients(rule, dtype, "pallas", accelerator.name),
            output_and_gradients(rule, dtype),
            output_and_gradients(rule, "float32"),
        )
        # On a TPU, XLA computes the convolution.
        convolution = {"packed_convolution"} if accelerator.name == "gpu" else set()
        assert set(accelerator.calls) == {"memory_scan"} | convolution
        limits = (1e-5, 1e-4) if dtype == "float32" else (5e-3, 1e-2)
        for limit, kernels, portable, exact in zip(limits, *results, strict=True):
            # All else in the layer rounds too: as in the portable form.
            trees = map(jax.tree.leaves, (kernels, portable, exact))
            for x, y, z in zip(*trees, strict=True):
                assert error(x, z) <= max(limit, 1.5 * error(y, z))

    def test_short_sequences(accelerator):
        inputs = np.random.default_rng(0).normal(size=(BATCH, 5, WIDTH))
        output, _ = make_layer("gated_delta_net", implementation="pallas")(inputs)
        expected, _ = make_layer("gated_delta_net")(inputs)
        assert error(output, expected) <= 1e-5
        assert "memory_scan" in accelerator.calls

    def test_tokens(accelerator):
        inputs = np.random.default_rng(0).normal(size=(BATCH, 3, WIDTH))
        layer = make_layer("gated_delta_net", implementation="pallas")
        expected, _ = make_layer("gated_delta_net")(inputs)
        state = layer.get_initial_state(BATCH)
        for t in range(3):
            output, state = layer(inputs[:, t : t + 1], initial_state=state)
            assert error(output[:, 0], expected[:, t]) <= 1e-5
        assert set(accelerator.calls) == {"convolution_step", "memory_step"}

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
        assert accelerator.calls == []

    def test_the_page_runs():
        page = Path(__file__).resolve().parents[1] / "docs" / "jax.md"
        code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))
        names: dict = {}
        try:
            exec(code, names)
            outputs = names["model"].predict(np.ones((2, 9, 16)), verbose=0)
            assert outputs.shape == (2, 9, 16)
        finally:
            keras.distribution.set_distribution(None)
        for gradient in names["gradients"]:
            assert jnp.any(gradient != 0)
        assert names["outputs"].shape == (5, 1, 2, 16)
        written = jnp.any(names["state"] != 0, axis=(0, 2, 3, 4))
        np.testing.assert_array_equal(written, [True, True, False, False])

    def test_every_operation_is_named():
        for operation in operations():
            assert "pallas" in implementations(operation)

    def test_the_device_in_force_decides(monkeypatch):
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(scan_kernels, "_new_enough", lambda: True)
        assert scan_kernels.platform() == "gpu"
        with keras.device("cpu:0"), pytest.raises(NotImplementedError, match="'cpu'"):
            scan_kernels.platform()
        monkeypatch.setattr(scan_kernels, "_new_enough", lambda: False)
        with pytest.raises(NotImplementedError, match="sm_80"):
            scan_kernels.platform()

    def test_a_cpu_has_no_kernels():
        inputs = np.ones((BATCH, LENGTH, WIDTH))
        layer = MoMLayer(2, 16, implementation="pallas")
        with pytest.raises(NotImplementedError, match="need a GPU or a TPU.*'cpu'"):
            layer(inputs)
        assert ops.shape(MoMLayer(2, 16)(inputs)) == inputs.shape
