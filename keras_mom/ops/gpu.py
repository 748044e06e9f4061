"""Where the Triton kernels run."""


def check(tensor):
    """Raises `NotImplementedError` if a torch tensor is not on a GPU."""
    device = tensor.device.type
    if device not in ("cuda", "meta"):
        raise NotImplementedError(
            f"the Triton kernels need a GPU; the tensors are on {device!r}"
        )
