"""What XLA compiles for a test runs once or twice, and need not be fast."""

import gc
import os

import pytest

os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    # Each fusion would pass through MLIR, which takes most of the time.
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
)
# Programs are traced into many objects that live on: looking through all of them again
# and again takes a tenth of the time.
gc.set_threshold(20_000, 20, 100)

# One of these that is left for the end leaves the other test processes waiting.
LONGEST = (
    "test_devices_train_as_one",
    "test_a_file_loads_on_every_backend",
    "test_fit_with_a_length_that_is_not_known",
    "test_onnx",
    "test_two_replicas_train_like_one",
    "test_the_page_runs",
    "test_the_layer",
)


# Nothing in these is special to a backend: `make test` runs them on torch.
ON_TORCH = (
    "test_language_modelling.py",
    "test_recall_example.py",
    "test_tasks.py",
    "test_tokenizers.py",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.name.partition("[")[0] not in LONGEST)
    if os.environ.get("KERAS_BACKEND") != "torch":
        for item in items:
            if item.path.name in ON_TORCH:
                item.add_marker(pytest.mark.exhaustive)
