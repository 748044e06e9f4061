"""The memory scan: reference, and the cases that every implementation is held to."""
