"""What JAX compiles for a test runs once or twice, and need not be fast."""

import os

if os.environ.get("KERAS_BACKEND") not in ("tensorflow", "torch"):
    os.environ.setdefault(
        "XLA_FLAGS",
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    )
