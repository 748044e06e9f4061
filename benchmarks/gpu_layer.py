"""Times of `MoMLayer` and of a language model of such layers on a GPU, through Keras.

Each is timed as Keras runs it, and captured in a CUDA graph, which leaves out what the
host takes to launch it.
"""

import functools
import gc
import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import gpu_peers  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from gpu_models import (  # noqa: E402
    BATCH,
    DEPTH,
    HEAD_DIM,
    HEADS,
    INNER_WIDTH,
    LENGTH,
    VOCABULARY,
    WIDTH,
    language_model,
    mom_layer,
)

import keras_mom  # noqa: E402


def release():
    """Gives back the memory of models that nobody holds any more."""
    gc.collect()
    torch.cuda.empty_cache()


def random_tokens(*shape):
    return torch.randint(VOCABULARY, shape, device="cuda", dtype=torch.int32)


def loss_of(model, tokens):
    logits = model(tokens[:, :-1], training=True)
    logits = logits.reshape(-1, VOCABULARY).float()
    loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].reshape(-1).long())
    return loss + sum(model.losses)


def median(function, repeats=100):
    return triton.testing.do_bench(
        function, warmup=50, rep=repeats, return_mode="median"
    )


def captured(function):
    """A CUDA graph of `function`, and what it returned while captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


def extra_memory(function):
    """MiB that `function` needs beside what is allocated already."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def time_layer():
    layer = mom_layer()
    layer.build((BATCH, LENGTH, WIDTH))
    x = torch.randn(BATCH, LENGTH, WIDTH, device="cuda", dtype=torch.bfloat16)
    x.requires_grad_()
    leaves = [x, *(v.value for v in layer.trainable_variables)]
    cotangent = torch.randn_like(x)

    def forward():
        with torch.no_grad():
            return layer(x)

    def both():
        return torch.autograd.grad(layer(x), leaves, cotangent, allow_unused=True)

    graphs = [captured(function)[0] for function in (forward, both)]
    eager = median(forward), median(both)
    memory = extra_memory(both)
    ahead, total = (median(graph.replay) for graph in graphs)
    print(
        f"MoMLayer  forward {ahead:.2f} ms, with backward {total:.2f} ms; launched by "
        f"the host {eager[0]:.2f} and {eager[1]:.2f} ms; extra {memory:.0f} MiB",
        flush=True,
    )
    return (ahead, total), graphs[1]


def profile_graph(graph, least=0.02):
    """Prints the milliseconds of each kernel of a captured graph."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CUDA]
    ) as profile:
        graph.replay()
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda x: -x.device_time_total)
    launches = sum(event.count for event in events)
    print(f"{launches} launches", flush=True)
    for event in events:
        if event.device_time_total / 1e3 > least:
            time = event.device_time_total / 1e3
            print(f"  {event.key[:90]:90} {event.count:4} {time:.3f} ms", flush=True)


def time_training(depth=DEPTH):
    model = language_model(depth)
    tokens = random_tokens(BATCH, LENGTH + 1)
    parameters = [v.value for v in model.trainable_variables]
    count = sum(x.numel() for x in parameters)

    def step():
        return torch.autograd.grad(loss_of(model, tokens), parameters)

    graph, _ = captured(step)
    time = median(graph.replay, 1000)
    del graph, _
    release()
    torch.cuda.reset_peak_memory_stats()
    eager = median(step, 1000)
    peak = torch.cuda.max_memory_allocated() / 2**30
    print(
        f"{depth} layers, {count / 1e6:.0f}M parameters: training step {time:.1f} ms "
        f"({BATCH * LENGTH / time * 1e3:.0f} tokens/s), launched by the host "
        f"{eager:.1f} ms, peak {peak:.1f} GiB",
        flush=True,
    )
    return time


@torch.no_grad()
def check_decoding(depth=4, length=256):
    """How far decoded logits are from those of all tokens at once, in float32.

    In bfloat16 a rounding can send a token to another memory, which random weights
    amplify from layer to layer.
    """
    model = language_model(depth, "float32", batch=1)
    tokens = random_tokens(1, length)
    logits = model(tokens)
    for layer in model.layers:
        if isinstance(layer, keras_mom.MoMLayer):
            layer.reset_state()
    stepped = torch.cat([model(token) for token in tokens.split(1, 1)], 1)
    difference = (stepped - logits).abs().max()
    print(
        f"decoding, float32: logits of {length} steps within {difference:.1e} of the "
        f"full forward pass (standard deviation {logits.std():.2f})",
        flush=True,
    )


@torch.no_grad()
def time_decoding(depth=DEPTH, batches=(1, 32, 256)):
    times = {}
    for batch in batches:
        model = language_model(depth, batch=batch)
        token = random_tokens(batch, 1)
        step = functools.partial(model, token)
        eager = median(step)
        graph, _ = captured(step)
        times[batch] = time = median(graph.replay)
        print(
            f"decoding, batch {batch}: {time:.2f} ms a token "
            f"({batch / time * 1e3:.0f} tokens/s), launched by the host {eager:.1f} ms",
            flush=True,
        )
        if batch in (batches[0], batches[-1]):
            profile_graph(graph)
        del model, step, graph, _
        release()
    return times


def run_layer():
    times, graph = time_layer()
    profile_graph(graph)
    time_peer_layer(times)


def run_model(parts):
    token_time = step = None
    if "decode" in parts:
        check_decoding()
        token_time = time_decoding()[1]
    if "train" in parts:
        step = time_training()
    release()
    time_peer_model(step, token_time)


def time_peer_layer(ours):
    layer = gpu_peers.mom_attention(WIDTH, HEADS, HEAD_DIM)
    if layer is None:
        return
    x = torch.randn(BATCH, LENGTH, WIDTH, device="cuda", dtype=torch.bfloat16)
    x.requires_grad_()
    leaves = [x, *layer.parameters()]
    cotangent = torch.randn_like(x)

    def forward():
        with torch.no_grad():
            return layer(x)[0]

    def both():
        torch.autograd.grad(layer(x)[0], leaves, cotangent, allow_unused=True)

    both()
    memory = extra_memory(both)
    theirs = median(forward), median(both)
    print(
        f"fla's MomAttention  forward {theirs[0]:.2f} ms, with backward "
        f"{theirs[1]:.2f} ms, extra {memory:.0f} MiB; ours takes "
        f"{ours[0] / theirs[0]:.3f} and {ours[1] / theirs[1]:.3f} of it",
        flush=True,
    )


def time_peer_model(step, token_time):
    """fla's model; times of ours are None where they were not taken."""
    sizes = (DEPTH, WIDTH, HEADS, HEAD_DIM, INNER_WIDTH, VOCABULARY)
    model = gpu_peers.mom_language_model(*sizes)
    if model is None:
        return
    tokens = random_tokens(BATCH, LENGTH).long()
    if step is not None:

        def theirs():
            model.zero_grad()
            model(tokens, labels=tokens).loss.backward()

        theirs()
        torch.cuda.reset_peak_memory_stats()
        time = median(theirs, 2000)
        peak = torch.cuda.max_memory_allocated() / 2**30
        count = sum(x.numel() for x in model.parameters())
        print(
            f"fla's MomForCausalLM, {count / 1e6:.0f}M parameters: training step "
            f"{time:.1f} ms, peak {peak:.1f} GiB; ours takes {step / time:.3f} of it",
            flush=True,
        )
    if token_time is not None:
        model.eval()
        with torch.no_grad():
            cache = model(tokens[:1, :64], use_cache=True).past_key_values
            token = tokens[:1, :1]
            time = median(
                lambda: model(token, past_key_values=cache, use_cache=True), 1000
            )
        print(
            f"decoding, batch 1: {time:.1f} ms a token; ours takes "
            f"{token_time / time:.4f} of it",
            flush=True,
        )
