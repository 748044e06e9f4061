from contracts.memory_scan import MemoryScanContract


class TestPortable(MemoryScanContract):
    implementation = "portable"
