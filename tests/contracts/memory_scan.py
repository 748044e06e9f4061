"""What every implementation of the memory scan promises.

Subclass `MemoryScanContract` in a test module, and name the implementation there.
"""

import functools

import keras
import numpy as np
import pytest
import torch
from agreement import VALUE_TOLERANCE, assert_close, assert_values_and_gradients
from gradients import (
    compiled_value_and_grad,
    evaluate,
    kept_for_backward,
    reference_value_and_grad,
    value_and_grad,
)
from keras import ops
from selection import covering

from keras_mom.ops import memory_scan
from keras_mom_kernels.memory_scan import reference
from keras_mom_kernels.memory_scan.shapes import (
    CASES,
    PACKED,
    PACKED_ROWS,
    RULES,
    Case,
    make_inputs,
    rule_name,
)

EVERY_RULE = pytest.mark.parametrize("rule", RULES, ids=rule_name)
DELTA = ("head", "delta", False)
_SOME = (("none", "additive", False), DELTA, ("channel", "delta", True))
SOME_RULES = pytest.mark.parametrize("rule", _SOME, ids=rule_name)
# Every recurrence is met in rows of a batch, and one of each decay otherwise.
EACH_DECAY = (*_SOME, RULES[-1])
EACH_RULE_OR_DECAY = pytest.mark.parametrize(
    "rule", covering(RULES, EACH_DECAY), ids=rule_name
)


def _cases():
    decays = {f"{rule_name(rule)}-packed" for rule in EACH_DECAY}
    left_out = {f"{rule_name(rule)}-packed" for rule in RULES} - decays
    left_out |= {
        "none-additive-packed-no-state",
        "none-additive-length-1100",
        "channel-delta-erase-before-decay-length-1100",
        "head-delta-length-2",
        "channel-delta-erase-before-decay-length-7",
        "head-delta-sizes-16-16",
        "none-additive-bfloat16",
        "head-delta-float16",
        "head-delta-bfloat16-packed",
    }
    assert left_out < {case.name for case in CASES}
    return covering(CASES, [case for case in CASES if case.name not in left_out])


@functools.cache
def scan(implementation, rule, scale=None):
    """The memory scan under test as a function of its tensors alone."""
    decay, write, erase_before_decay = rule

    def function(**tensors):
        return memory_scan(
            **tensors,
            write=write,
            erase_before_decay=erase_before_decay,
            decay_axis="value" if decay == "value" else "key",
            return_state=True,
            scale=scale,
            implementation=implementation,
        )

    return function


def reference_scan(rule, scale=None):
    """The token-by-token recurrence as a function of torch tensors."""
    decay, write, erase_before_decay = rule
    return functools.partial(
        reference.memory_scan,
        write=write,
        erase_before_decay=erase_before_decay,
        decay_axis="value" if decay == "value" else "key",
        scale=scale,
        xp=torch,
    )


def inputs_of(rule, *, seed=0, **sizes):
    decay, write, erase_before_decay = rule
    case = Case(
        "", decay=decay, write=write, erase_before_decay=erase_before_decay, **sizes
    )
    return make_inputs(case, seed)


def cotangents_of(inputs, seed=1):
    """Random cotangents of the output and of the final state."""
    random = np.random.default_rng(seed)
    batch, _, heads, key_dim = inputs["query"].shape
    if "cu_seqlens" in inputs:
        batch = len(inputs["cu_seqlens"]) - 1
    state = (batch, heads, key_dim, inputs["value"].shape[-1])
    output = random.normal(size=inputs["value"].shape).astype("float32")
    return output, random.normal(size=state).astype("float32")


def changed(inputs, rows, amount):
    """Inputs with something added to every argument at `rows`, an index of [B, T]."""
    inputs = {name: array.copy() for name, array in inputs.items()}
    for name in ("query", "key", "value", "beta"):
        inputs[name][rows] += amount
    if "log_decay" in inputs:
        inputs["log_decay"][rows] -= amount
    return inputs


def pieces_of(inputs, lengths):
    """Consecutive pieces of the rows."""
    borders = np.cumsum([0, *lengths])
    assert borders[-1] == inputs["query"].shape[1]
    for start, end in zip(borders[:-1], borders[1:]):
        yield {
            name: array[:, start:end]
            for name, array in inputs.items()
            if name != "initial_state"
        }


class MemoryScanContract:
    implementation = "portable"

    def function(self, rule, scale=None):
        return scan(self.implementation, rule, scale)

    def run(self, rule, inputs):
        """Output and final state, in float32."""
        return evaluate(self.function(rule), inputs)

    def gradients(self, rule, inputs, cotangents=None):
        cotangents = cotangents or cotangents_of(inputs)
        return value_and_grad(self.function(rule), inputs, cotangents)

    # Against the recurrence.

    @pytest.mark.parametrize("case", _cases(), ids=lambda case: case.name)
    def test_values_and_gradients_are_those_of_the_recurrence(self, case):
        inputs = make_inputs(case)
        cotangents = cotangents_of(inputs)
        actual = self.gradients(case.rule, inputs, cotangents)
        expected = reference_value_and_grad(
            reference_scan(case.rule), inputs, cotangents
        )
        names = ("output", "final state")
        assert_values_and_gradients(actual, expected, case.dtype, names)

    @pytest.mark.parametrize("scale", (None, 2.5))
    def test_scale_is_that_of_the_query(self, scale):
        inputs = inputs_of(DELTA, T=7)
        output, _ = evaluate(self.function(DELTA, scale), inputs)
        inputs = {name: np.float64(array) for name, array in inputs.items()}
        expected, _ = reference.memory_scan(**inputs, scale=1.0)
        factor = 24**-0.5 if scale is None else scale
        assert_close(output, factor * expected, VALUE_TOLERANCE["float32"], "output")

    @SOME_RULES
    def test_no_beta_is_a_beta_of_1(self, rule):
        inputs = inputs_of(rule, beta=None)
        ones = {**inputs, "beta": np.ones(inputs["query"].shape[:3], "float32")}
        for x, y in zip(self.run(rule, inputs), self.run(rule, ones)):
            assert_close(x, y, 1e-6, "without beta")

    @pytest.mark.parametrize(
        "rule",
        covering(RULES[3:9], [DELTA, ("channel", "additive", False)]),
        ids=rule_name,
    )
    def test_no_log_decay_is_one_of_0(self, rule):
        write = ("none", *rule[1:])
        inputs = inputs_of(rule, log_decays=(0.0,))
        without = {k: x for k, x in inputs.items() if k != "log_decay"}
        for x, y in zip(self.run(rule, inputs), self.run(write, without)):
            assert_close(x, y, 1e-6, "without log_decay")

    @pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16"))
    def test_output_has_the_dtype_of_value_and_the_state_is_float32(self, dtype):
        inputs = inputs_of(DELTA, T=2, dtype=dtype)
        tensors = {k: ops.convert_to_tensor(x, x.dtype.name) for k, x in inputs.items()}
        output, state = self.function(DELTA)(**tensors)
        assert keras.backend.standardize_dtype(output.dtype) == dtype
        assert keras.backend.standardize_dtype(state.dtype) == "float32"

    def test_the_state_is_returned_on_request_only(self):
        inputs = inputs_of(DELTA, T=7)
        alone = memory_scan(**inputs, implementation=self.implementation)
        output, _ = self.run(DELTA, inputs)
        np.testing.assert_allclose(ops.convert_to_numpy(alone), output, atol=1e-6)

    @pytest.mark.parametrize(
        "rule, packed",
        [(DELTA, False), *((rule, True) for rule in _SOME)],
        ids=lambda x: x if isinstance(x, bool) else rule_name(x),
    )
    def test_the_framework_compiles_it(self, rule, packed):
        packing = {"B": 1, "cu_seqlens": (0, 1, 1, 5)} if packed else {}
        inputs = inputs_of(rule, T=7, **packing)
        cotangents = cotangents_of(inputs)
        actual = compiled_value_and_grad(self.function(rule), inputs, cotangents, 7)
        expected = reference_value_and_grad(reference_scan(rule), inputs, cotangents)
        names = ("output", "final state")
        assert_values_and_gradients(actual, expected, "float32", names)

    # One call and many.

    @EACH_RULE_OR_DECAY
    def test_tokens_one_at_a_time_give_what_one_call_gives(self, rule):
        self.check_split(rule, [1] * 24)

    @pytest.mark.parametrize(
        "rule, lengths",
        [
            *((rule, (1, 64, 65)) for rule in _SOME),
            *((DELTA, lengths) for lengths in ((7, 1, 122), (65, 65))),
        ],
        ids=lambda x: str(x) if isinstance(x[0], int) else rule_name(x),
    )
    def test_any_split_gives_what_one_call_gives(self, rule, lengths):
        self.check_split(rule, lengths)

    def check_split(self, rule, lengths):
        inputs = inputs_of(rule, B=1, T=sum(lengths))
        output, final_state = self.run(rule, inputs)
        outputs, state = [], inputs["initial_state"]
        for piece in pieces_of(inputs, lengths):
            piece_output, state = self.run(rule, {**piece, "initial_state": state})
            outputs.append(piece_output)
        joined = np.concatenate(outputs, axis=1)
        assert_close(joined, output, VALUE_TOLERANCE["float32"], "output")
        assert_close(state, final_state, VALUE_TOLERANCE["float32"], "final state")

    @SOME_RULES
    def test_packed_sequences_give_what_each_alone_gives(self, rule):
        inputs = inputs_of(rule, B=1, T=PACKED_ROWS, cu_seqlens=PACKED)
        output, states = self.run(rule, inputs)
        for s, (start, end) in enumerate(zip(PACKED[:-1], PACKED[1:])):
            alone = {
                name: array[:, start:end]
                for name, array in inputs.items()
                if name not in ("initial_state", "cu_seqlens")
            }
            state = inputs["initial_state"][s : s + 1]
            if start == end:
                np.testing.assert_array_equal(states[s], state[0])
                continue
            alone_output, alone_state = self.run(
                rule, {**alone, "initial_state": state}
            )
            tolerance = VALUE_TOLERANCE["float32"]
            assert_close(output[:, start:end], alone_output, tolerance, f"output {s}")
            assert_close(states[s], alone_state[0], tolerance, f"state {s}")

    def test_rows_behind_the_last_sequence_give_zeros_and_get_no_gradient(self):
        inputs = inputs_of(DELTA, B=1, T=PACKED_ROWS, cu_seqlens=PACKED)
        (output, _), gradients = self.gradients(DELTA, inputs)
        assert not output[:, PACKED[-1] :].any()
        del gradients["initial_state"]
        for name, gradient in gradients.items():
            assert not gradient[:, PACKED[-1] :].any(), name

    def test_sequences_may_all_be_empty(self):
        inputs = inputs_of(DELTA, B=1, T=PACKED_ROWS, cu_seqlens=[0] * len(PACKED))
        (output, state), gradients = self.gradients(DELTA, inputs)
        assert not output.any()
        np.testing.assert_array_equal(state, inputs["initial_state"])
        np.testing.assert_array_equal(
            gradients["initial_state"], cotangents_of(inputs)[1]
        )

    @pytest.mark.parametrize("kind", (list, tuple, np.int64))
    def test_cu_seqlens_may_be_a_list_or_of_another_integer_dtype(self, kind):
        inputs = inputs_of(DELTA, B=1, T=7, cu_seqlens=(0, 3, 7))
        output, _ = self.run(DELTA, inputs)
        borders = inputs.pop("cu_seqlens")
        borders = borders.astype(kind) if kind is np.int64 else kind(borders.tolist())
        other, _ = self.function(DELTA)(**inputs, cu_seqlens=borders)
        np.testing.assert_allclose(ops.convert_to_numpy(other), output, atol=1e-6)

    # What must not meet.

    @SOME_RULES
    @pytest.mark.parametrize("t", (0, 63, 64, 129))
    def test_a_token_changes_nothing_before_it(self, rule, t):
        inputs = inputs_of(rule)
        output, _ = self.run(rule, inputs)
        other, _ = self.run(rule, changed(inputs, (slice(None), t), 0.5))
        np.testing.assert_array_equal(other[:, :t], output[:, :t])
        assert (other[:, t] != output[:, t]).any()

    @SOME_RULES
    @pytest.mark.parametrize("amount", (0.5, np.nan))
    def test_a_packed_sequence_changes_no_other(self, rule, amount):
        inputs = inputs_of(rule, B=1, T=PACKED_ROWS, cu_seqlens=PACKED)
        cotangents = cotangents_of(inputs)
        (output, states), gradients = self.gradients(rule, inputs, cotangents)
        for s in (1, 3, 6):
            rows = slice(PACKED[s], PACKED[s + 1])
            one_changed = changed(inputs, (0, rows), amount)
            one_changed["initial_state"][s] += amount
            (other, other_states), other_gradients = self.gradients(
                rule, one_changed, cotangents
            )
            same_rows = np.ones(PACKED_ROWS, bool)
            same_rows[rows] = False
            same_states = np.arange(len(states)) != s
            np.testing.assert_array_equal(other[:, same_rows], output[:, same_rows])
            np.testing.assert_array_equal(
                other_states[same_states], states[same_states]
            )
            assert (other[:, rows] != output[:, rows]).any()
            for name, gradient in gradients.items():
                if name == "initial_state":
                    same = (same_states,)
                else:
                    same = (slice(None), same_rows)
                np.testing.assert_array_equal(
                    other_gradients[name][same], gradient[same], name
                )

    @SOME_RULES
    def test_a_batch_row_changes_no_other(self, rule):
        inputs = inputs_of(rule)
        cotangents = cotangents_of(inputs)
        (output, states), gradients = self.gradients(rule, inputs, cotangents)
        (other, other_states), other_gradients = self.gradients(
            rule, changed(inputs, 0, np.nan), cotangents
        )
        assert np.isnan(other[0]).all()
        np.testing.assert_array_equal(other[1], output[1])
        np.testing.assert_array_equal(other_states[1], states[1])
        for name, gradient in gradients.items():
            np.testing.assert_array_equal(other_gradients[name][1], gradient[1], name)

    def test_the_state_passed_in_stays_as_it_is(self):
        for sizes in ({"T": 1}, {}, {"B": 1, "T": PACKED_ROWS, "cu_seqlens": PACKED}):
            inputs = inputs_of(DELTA, **sizes)
            before = inputs["initial_state"].copy()
            inputs["initial_state"] = ops.convert_to_tensor(before)
            _, state = self.function(DELTA)(**inputs)
            after = ops.convert_to_numpy(inputs["initial_state"])
            np.testing.assert_array_equal(after, before)
            assert (ops.convert_to_numpy(state) != before).any()

    # Length and memory.

    @pytest.mark.parametrize(
        "rule, changes",
        (
            (("head", "delta", False), {"log_decays": (0.0,)}),
            (("head", "delta", False), {"key_norm": 10.0, "beta": (0.01, 0.02)}),
            (("head", "additive", False), {"key_norm": 10.0, "log_decays": (0.0,)}),
            (("head", "additive", False), {"log_decays": (-20.0, -0.001, 0.0)}),
        ),
        ids=("delta", "delta-key-norm-10", "additive-key-norm-10", "additive-decays"),
    )
    def test_64k_tokens_stay_finite(self, rule, changes):
        inputs = inputs_of(
            rule, B=1, T=65536, H=1, K=8, V=8, initial_state=False, **changes
        )
        (output, state), gradients = self.gradients(rule, inputs)
        assert np.isfinite(output).all() and np.isfinite(state).all()
        for name, gradient in gradients.items():
            assert np.isfinite(gradient).all(), name

    @pytest.mark.parametrize("rule", covering(_SOME, _SOME[:2]), ids=rule_name)
    def test_no_state_a_token_is_kept_for_the_gradient(self, rule):
        kept = {}
        for length in (512, 1024):
            inputs = inputs_of(
                rule, B=1, T=length, H=1, K=32, V=32, initial_state=False
            )
            kept[length] = kept_for_backward(
                self.function(rule), inputs, cotangents_of(inputs)
            )
            one_state_a_token = 4 * length * 32 * 32
            assert kept[length] < one_state_a_token / 2
        assert kept[1024] <= 2.1 * kept[512]
