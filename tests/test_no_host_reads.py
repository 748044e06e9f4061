"""No routing result is read back to the host, and no graph depends on one."""

import contextlib

import keras
import numpy as np
import pytest

import keras_mom
from tests.layer_helpers import BACKEND, make_layer, tokens

BATCH, LENGTH, WIDTH = 2, 12, 12


def routings(layer):
    """Router kernels that route in ways that differ as much as they can."""
    shape = layer.router.kernel.shape
    favour_last = np.zeros(shape, "float32")
    favour_last[:, -1] = 5.0
    return [np.zeros(shape, "float32"), favour_last, tokens(*shape, seed=8)]


def call_arguments(layer, case, length=LENGTH):
    mask = np.ones((BATCH, length), bool)
    mask[0, length // 2 :] = False
    ids = np.repeat([[1], [2]], length, axis=1).astype("int32")
    ids[:, length // 3 :] += 3
    return {
        "plain": {},
        "mask": {"mask": mask},
        "documents": {"mask": mask, "segment_ids": ids},
        "state": {"initial_state": layer.get_initial_state(BATCH)},
    }[case]


each_case = pytest.mark.parametrize("case", ["plain", "mask", "documents", "state"])
each_length = pytest.mark.parametrize("length", [1, LENGTH])

if BACKEND == "torch":
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from keras_mom.ops import chunked_scan, rows

    READS = (
        "_local_scalar_dense",
        "item",
        "is_nonzero",
        "nonzero",
        "nonzero_numpy",
        "equal",
        "masked_select",
        "argwhere",
        "repeat_interleave.Tensor",
        "_assert_async",
    )

    def reads_values(function, arguments):
        """Whether an operation's result, or its shape, needs values on the host."""
        name = str(function).removeprefix("aten.")
        base = name.partition(".")[0]
        if name in READS or base in READS or "unique" in base or "bincount" in base:
            return True
        # A boolean index has a result of a size that only the values tell.
        if base in ("index", "index_put", "index_put_", "_unsafe_index"):
            return any(
                isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8)
                for x in arguments[1]
            )
        return False

    class Recorder(TorchDispatchMode):
        """Records all operations, and fails on those that read values."""

        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.append(str(function))
            assert not reads_values(function, args), f"{function} reads values"
            return function(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def record(monkeypatch):
        """A `Recorder` that also sees what the library's own operators run.

        Modes are off inside a custom operator: its parts turn the mode on again.
        """
        mode = Recorder()

        def watched(function):
            def call(*args):
                mode.names.append("inside an operator")
                with mode:
                    return function(*args)

            return call

        def refused(tensor, *args, **kwargs):
            raise AssertionError("a tensor's method reads values")

        with monkeypatch.context() as patch:
            # These read CPU memory without an operation.
            for name in ("numpy", "tolist", "__array__"):
                patch.setattr(torch.Tensor, name, refused)
            for part in (chunked_scan._SCAN, rows._GATHER, rows._SUM):
                for name in ("forward", "backward"):
                    patch.setattr(part, name, watched(getattr(part, name)))
            with mode:
                yield mode

    @each_length
    @each_case
    @pytest.mark.parametrize("training", [False, True])
    def test_no_operation_reads_values(case, length, training, monkeypatch):
        check_reads_nothing("gated_delta_net", case, length, training, monkeypatch)

    @each_length
    @pytest.mark.parametrize("name", keras_mom.rules.names())
    def test_no_rule_reads_values(name, length, monkeypatch):
        check_reads_nothing(name, "documents", length, True, monkeypatch)

    def check_reads_nothing(name, case, length, training, monkeypatch):
        layer = make_layer(return_state=True, update_rule=name)
        inputs = torch.tensor(tokens(BATCH, length, WIDTH), requires_grad=True)
        given = keras.tree.map_structure(
            keras.ops.convert_to_tensor, call_arguments(layer, case, length)
        )
        with record(monkeypatch) as mode:
            output, state = layer(inputs, training=training, **given)
            loss = output.sum() + sum(x.sum() for x in state) + sum(layer.losses)
            loss.backward()
        assert torch.isfinite(inputs.grad).all()
        # The recorder saw the model, and inside of the library's operators.
        assert any(name.startswith("aten.mm") for name in mode.names)
        if length > 1:
            assert "keras_mom.memory_scan_backward.default" in mode.names
            assert mode.names.count("inside an operator") > 10

    @pytest.mark.parametrize(
        "read",
        [
            lambda x: x.sum().item(),
            lambda x: bool(x.sum() > 0),
            lambda x: x[x > 0],
            lambda x: torch.nonzero(x),
            lambda x: torch.unique(x),
            lambda x: torch.masked_select(x, x > 0),
            lambda x: int(x.argmax()),
            lambda x: x.tolist(),
            lambda x: np.asarray(x),
            lambda x: x.numpy(),
            lambda x: torch.equal(x, x),
        ],
    )
    def test_the_recorder_notices_a_read(read, monkeypatch):
        x = torch.ones(3)
        with pytest.raises(AssertionError, match="reads values"):
            with record(monkeypatch):
                read(x)

    def test_the_recorder_notices_a_read_inside_an_operator(monkeypatch):
        forward = rows._GATHER.forward

        def reading(options, inputs, source, targets):
            assert source.max().item() >= -1
            return forward(options, inputs, source, targets)

        monkeypatch.setattr(rows._GATHER, "forward", reading)
        layer = make_layer()
        with pytest.raises(AssertionError, match=r"(item|scalar_dense).* reads values"):
            with record(monkeypatch):
                layer(torch.tensor(tokens(BATCH, LENGTH, WIDTH)))

    @pytest.mark.parametrize("name", ["gated_delta_net", "rwkv6", "gsa"])
    def test_the_layer_is_one_graph(name):
        """`fullgraph=True` raises at anything that has to run in Python."""
        layer = make_layer(update_rule=name)
        inputs = torch.tensor(tokens(BATCH, LENGTH, WIDTH))
        graphs = []

        def count(graph, example_inputs):
            graphs.append(graph)
            return graph.forward

        function = torch.compile(layer, fullgraph=True, backend=count)
        for kernel in routings(layer):
            layer.router.kernel.assign(kernel)
            expected = keras.ops.convert_to_numpy(layer(inputs))
            output = keras.ops.convert_to_numpy(function(inputs))
            np.testing.assert_allclose(output, expected, atol=1e-6)
        assert len(graphs) == 1


if BACKEND == "jax":
    import jax

    def pure(layer, length):
        """The layer as a function of its weights and inputs, and these."""

        def function(trainable, non_trainable, inputs, given):
            (output, state), non_trainable, losses = layer.stateless_call(
                trainable,
                non_trainable,
                inputs,
                training=True,
                return_losses=True,
                **given,
            )
            return output.sum() + sum(losses), (state, non_trainable)

        arguments = (
            [v.value for v in layer.trainable_variables],
            [v.value for v in layer.non_trainable_variables],
            tokens(BATCH, length, WIDTH),
        )
        return jax.grad(function, has_aux=True), arguments

    def primitives(jaxpr):
        """Names of all primitives, those of inner functions included."""
        for equation in jaxpr.eqns:
            yield equation.primitive.name
            for value in jax.tree.leaves(
                equation.params, is_leaf=lambda x: hasattr(x, "eqns")
            ):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from primitives(inner)

    @each_length
    @each_case
    def test_the_program_calls_nothing_on_the_host(case, length):
        layer = make_layer(return_state=True)
        function, arguments = pure(layer, length)
        given = call_arguments(layer, case, length)
        names = set(primitives(jax.make_jaxpr(function)(*arguments, given).jaxpr))
        assert {"dot_general", "exp"} <= names
        assert not {n for n in names if "callback" in n or "infeed" in n}

    def test_one_program_serves_every_routing():
        layer = make_layer(return_state=True)
        traces = []
        function, (trainable, *rest) = pure(layer, LENGTH)

        def counted(*arguments):
            traces.append(1)
            return function(*arguments)

        compiled = jax.jit(counted)
        index = next(
            i
            for i, v in enumerate(layer.trainable_variables)
            if v is layer.router.kernel
        )
        shares = []
        for kernel in routings(layer):
            trainable[index] = kernel
            _, (_, non_trainable) = compiled(trainable, *rest, {})
            shares.append(np.array(non_trainable[0]))
        assert len(traces) == 1
        assert len(np.unique(shares, axis=0)) == len(shares)


if BACKEND == "tensorflow":
    import tensorflow as tf

    @each_length
    def test_one_compiled_program_serves_every_routing(length):
        """XLA compiles no operation that has to read values."""
        layer = make_layer(return_state=True)
        traces = []

        @tf.function(jit_compile=True, autograph=False)
        def function(inputs, given):
            traces.append(1)
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                output, _ = layer(inputs, training=True, **given)
                loss = tf.reduce_sum(output) + sum(layer.losses)
            return output, tape.gradient(loss, inputs)

        inputs = tf.constant(tokens(BATCH, length, WIDTH))
        given = call_arguments(layer, "documents", length)
        shares = []
        for kernel in routings(layer):
            layer.router.kernel.assign(kernel)
            output, gradient = function(inputs, given)
            expected, _ = layer(inputs, **given)
            np.testing.assert_allclose(output, expected, atol=1e-5)
            assert np.isfinite(gradient).all()
            shares.append(layer.routing_statistics["share"])
        assert len(traces) == 1
        assert len(np.unique(shares, axis=0)) > 1
