"""Choice of an operation's implementation."""

import warnings

import pytest

from keras_mom import backend, config
from keras_mom.ops import dispatch as dispatching
from keras_mom.ops.dispatch import dispatch, implementations, preferred, register


@pytest.fixture(autouse=True)
def clean_settings(monkeypatch):
    monkeypatch.setitem(dispatching._REGISTRY, "operation", {})
    monkeypatch.setattr(dispatching, "_warned", set())
    monkeypatch.setattr(config, "_implementation", None)


def add(name, fails=None):
    """Registers an implementation that returns its name, or cannot serve a call."""

    @register("operation", name)
    def implementation(number, *, word):
        if fails:
            raise NotImplementedError(fails)
        return name, number, word


def call(implementation=None):
    return dispatch("operation", implementation, 1, word="a")[0]


def test_the_fastest_comes_first_whatever_the_order_of_registration():
    for name in ("portable", "xla", "triton", "pallas"):
        add(name)
    assert implementations("operation") == ("triton", "pallas", "xla", "portable")
    assert call() == "triton"


def test_arguments_and_results_pass_unchanged():
    add("portable")
    assert dispatch("operation", None, 1, word="a") == ("portable", 1, "a")


def test_one_that_cannot_serve_the_call_is_passed_over():
    add("triton", fails="needs a GPU")
    add("pallas", fails="needs a TPU")
    add("portable")
    assert call() == "portable"


def test_a_named_one_is_used():
    add("triton")
    add("portable")
    assert call("portable") == "portable"


def test_a_named_one_that_cannot_serve_the_call_is_not_replaced():
    add("triton", fails="needs a GPU")
    add("portable")
    with pytest.raises(NotImplementedError, match="needs a GPU"):
        call("triton")


def test_a_named_one_that_is_missing_is_not_replaced():
    add("portable")
    with pytest.raises(NotImplementedError, match="'xla'.*`operation`.*portable"):
        call("xla")


@pytest.mark.parametrize("accelerator, first", [(None, "portable"), ("gpu", "triton")])
def test_what_is_tried_first(monkeypatch, accelerator, first):
    for name in ("triton", "xla", "portable"):
        add(name)
    monkeypatch.setattr(backend, "accelerator", lambda: accelerator)
    assert preferred("operation", None) == first
    assert preferred("operation", "xla") == "xla"
    monkeypatch.setattr(config, "_implementation", "xla")
    assert preferred("operation", None) == "xla"
    assert preferred("operation", "triton") == "triton"


def test_an_unknown_name():
    add("portable")
    with pytest.raises(ValueError, match="`implementation`.*'fastest'"):
        call("fastest")
    with pytest.raises(ValueError, match="`implementation`.*'fastest'"):
        config.set_implementation("fastest")
    with pytest.raises(ValueError, match="`implementation`.*'fastest'"):
        register("operation", "fastest")
    assert config.get_implementation() is None


def test_reasons_are_told_where_none_serves():
    add("triton", fails="needs a GPU")
    add("portable", fails="needs a CPU")
    with pytest.raises(
        NotImplementedError, match="triton: needs a GPU; portable: needs a CPU"
    ):
        call()


def test_other_errors_are_not_hidden():
    @register("operation", "triton")
    def broken(number, *, word):
        raise RuntimeError("broken")

    add("portable")
    with pytest.raises(RuntimeError, match="broken"):
        call()


def test_the_setting_holds_where_a_call_names_none():
    add("triton")
    add("portable")
    config.set_implementation("portable")
    assert config.get_implementation() == "portable"
    assert call() == "portable"
    assert call("triton") == "triton"
    config.set_implementation("xla")
    with pytest.raises(NotImplementedError, match="'xla'"):
        call()
    config.set_implementation(None)
    assert call() == "triton"


def test_an_accelerator_without_its_kernel_warns_once_with_the_reason(monkeypatch):
    monkeypatch.setattr(backend, "accelerator", lambda: "gpu")
    add("triton", fails="needs 80 GiB")
    add("portable")
    with pytest.warns(UserWarning, match="`operation`.*'gpu'.*triton: needs 80 GiB"):
        call()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call()


def test_an_accelerator_for_which_there_is_no_kernel_warns(monkeypatch):
    monkeypatch.setattr(backend, "accelerator", lambda: "tpu")
    add("portable")
    with pytest.warns(UserWarning, match="no kernel for 'tpu' is installed"):
        call()


@pytest.mark.parametrize("accelerator, name", ((None, None), ("gpu", "portable")))
def test_a_cpu_or_a_choice_warns_of_nothing(monkeypatch, accelerator, name):
    monkeypatch.setattr(backend, "accelerator", lambda: accelerator)
    add("triton", fails="needs a GPU")
    add("portable")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(name)
