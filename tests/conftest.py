"""What XLA compiles for a test runs once or twice, and need not be fast."""

import gc
import os

os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    # Each fusion would pass through MLIR, which takes most of the time.
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
)
# Programs are traced into many objects that live on: looking through all of them again
# and again takes a tenth of the time.
gc.set_threshold(20_000, 20, 100)

# Nothing in these is special to a backend; two run them.
if os.environ.get("KERAS_BACKEND") == "tensorflow":
    collect_ignore = [
        "test_language_modelling.py",
        "test_recall_example.py",
        "test_tasks.py",
        "test_tokenizers.py",
    ]
