"""A converted model against flash-linear-attention's own, on an NVIDIA GPU.

Builds `MomForCausalLM` (flash-linear-attention 0.6.0) with random weights, converts
it, and compares the logits of both in inference mode, ours routed as theirs routed:
in bfloat16 rounding alone changes which memories a token goes to. Then converts back,
and compares bit for bit.

    KERAS_BACKEND=torch python benchmarks/gpu_convert.py --dtype float32 bfloat16

Without a GPU, their kernels run in Triton's interpreter, minutes for a small model:

    TRITON_INTERPRET=1 KERAS_BACKEND=torch python benchmarks/gpu_convert.py \\
        --device cpu --batch 1 --layers 2 --width 32 --heads 2 --head-dim 16
"""

# pyright: reportMissingImports=false

import argparse
import functools
import importlib.util
import os
import sys
from typing import Any
from unittest import mock

os.environ.setdefault("KERAS_BACKEND", "torch")
# Their kernels would take TF32 for float32, which is off by more than what is measured.
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")

import keras  # noqa: E402
import numpy as np  # noqa: E402

import keras_mom  # noqa: E402
from keras_mom.convert import from_fla, to_fla  # noqa: E402

# Relative root-mean-square errors of the logits.
LIMITS = {"float32": 1e-3, "bfloat16": 2e-2}


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    add = parser.add_argument
    add("--dtype", nargs="+", choices=sorted(LIMITS), default=sorted(LIMITS))
    add("--device", choices=("cuda", "cpu"), default="cuda")
    for name, default in (("length", 512), ("batch", 2), ("layers", 4)):
        add(f"--{name}", type=_positive, default=default)
    for name, default in (("width", 512), ("heads", 4), ("head-dim", 128)):
        add(f"--{name}", type=_positive, default=default)
    for name, default in (("vocabulary", 32_000), ("memories", 4), ("top-k", 2)):
        add(f"--{name}", type=_positive, default=default)
    options = parser.parse_args(arguments)
    if options.top_k > options.memories:
        parser.error(f"--top-k {options.top_k} exceeds --memories {options.memories}")
    return options


def _positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def interpret():
    """Makes their model run on a CPU, under `TRITON_INTERPRET=1`."""
    from triton.runtime.autotuner import Autotuner

    # There is nothing to time, and no driver to do it.
    setattr(Autotuner, "_bench", lambda *args, **kwargs: [1.0] * 3)  # noqa: B010
    keras_mom.config.set_implementation("portable")


def take_first_configurations():
    """Spares their tuning, minutes of compilation: the first that runs is taken."""
    from triton.runtime.autotuner import Autotuner

    tune = Autotuner._bench
    tuned = {}

    def try_once(self, *args, **options):
        # Each call has its arguments in a dict of its own.
        if tuned.get(id(self)) is self.nargs:
            return [float("inf")] * 3
        times = tune(self, *args, **options)
        if times[0] < float("inf"):
            tuned[id(self)] = self.nargs
        return times

    setattr(Autotuner, "_bench", try_once)  # noqa: B010


def published_model(options, dtype):
    """Their model, with weights at which every part matters."""
    import torch
    from fla.models import MomConfig, MomForCausalLM

    config = MomConfig(
        hidden_size=options.width,
        num_heads=options.heads,
        head_dim=options.head_dim,
        num_hidden_layers=options.layers,
        vocab_size=options.vocabulary,
        num_memories=options.memories,
        topk=options.top_k,
        architectures=["MomForCausalLM"],
    )
    torch.manual_seed(0)
    model = MomForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.add_(0.3 * torch.randn_like(weight))
            elif weight.ndim == 2:
                weight.normal_(std=weight.shape[1] ** -0.5)
            # As in a trained model, no layer outweighs all that came before.
            if "embeddings" in name:
                weight.normal_()
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_((2 * options.layers) ** -0.5)
    if options.device == "cpu":
        for layer in model.model.layers:
            # The interpreter does not run their chunkwise kernels.
            layer.attn.mode = "fused_recurrent"
    return model.to(options.device, getattr(torch, dtype)).eval()


def published_logits(model, tokens):
    """Their logits, and the routers' logits, `[B, T, M]` a layer."""
    import torch

    # Tokens of a memory keep their order in time only if the sort is stable.
    stable = functools.partialmethod(torch.Tensor.argsort, stable=True)
    with mock.patch.object(torch.Tensor, "argsort", stable), torch.no_grad():
        outputs = model(tokens, use_cache=False)
    shape = (*tokens.shape, -1)
    return outputs.logits, [x.reshape(shape) for x in outputs.router_logits]


def route_as(lm, router_logits, top_k):
    """Fixes the routing of every layer of ours."""
    import torch

    for block, logits in zip(lm.backbone.blocks, router_logits):
        probabilities = torch.softmax(logits, -1, dtype=torch.float32)
        weights, indices = torch.topk(probabilities, top_k)
        weights = weights / weights.sum(-1, keepdim=True)
        route = probabilities, weights, indices.to(torch.int32)
        block.mixer._route = lambda inputs, route=route: route


def our_logits(lm, tokens):
    import torch

    ids = tokens.to(torch.int32)
    with torch.no_grad():
        return lm({"token_ids": ids, "padding_mask": torch.ones_like(ids)})


def relative_rms(actual, expected):
    error = (actual.double() - expected.double()).square().mean().sqrt()
    return float(error / expected.double().square().mean().sqrt())


def compare(options, dtype):
    """Compares the two models.

    Returns:
        The relative error of our logits against theirs; that of theirs and of ours
        against ours in float32; and the tensors that do not come back.
    """
    import torch

    theirs = published_model(options, dtype)
    shape = options.batch, options.length
    tokens = torch.randint(options.vocabulary, shape, device=options.device)
    expected, router_logits = published_logits(theirs, tokens)
    state = theirs.state_dict()
    logits = {}
    for ours in ("float32", dtype):
        lm = from_fla(state, theirs.config, dtype=ours)
        route_as(lm, router_logits, options.top_k)
        logits[ours] = our_logits(lm, tokens)
    back: Any = to_fla(lm)
    changed = set(state) ^ set(back)
    for name in set(state) & set(back):
        bits = state[name].cpu().contiguous().view(torch.uint8).numpy()
        if not np.array_equal(bits, back[name].view("uint8")):
            changed.add(name)
    error = relative_rms(logits[dtype], expected)
    against_float32 = [
        relative_rms(x, logits["float32"]) for x in (expected, logits[dtype])
    ]
    return error, against_float32, sorted(changed)


def main(arguments=None):
    options = parse(arguments)
    if keras.backend.backend() != "torch":
        sys.exit("fla's model runs on PyTorch: set KERAS_BACKEND=torch")
    if importlib.util.find_spec("fla") is None:
        sys.exit("flash-linear-attention is missing: see benchmarks/gpu_peers.py")
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no NVIDIA GPU; --device cpu runs without")
    if options.device == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            sys.exit("--device cpu needs TRITON_INTERPRET=1")
        interpret()
    else:
        take_first_configurations()
    failed = False
    for dtype in options.dtype:
        error, (theirs, ours), changed = compare(options, dtype)
        good = error < LIMITS[dtype] and not changed
        failed |= not good
        print(
            f"{'ok' if good else 'FAIL':4} {dtype}, T {options.length}: logits differ "
            f"by {error:.1e} (limit {LIMITS[dtype]:.0e}); from float32, theirs by "
            f"{theirs:.1e} and ours by {ours:.1e}; {len(changed)} tensors changed by "
            f"the round trip{''.join(f' {x}' for x in changed)}",
            flush=True,
        )
    return failed


if __name__ == "__main__":
    sys.exit(main())
