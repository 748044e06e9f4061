"""Times of `MoMLayer` and of a language model of such layers on a GPU, through Keras.

Each is timed as Keras runs it, and captured in a CUDA graph, which leaves out what the
host takes to launch it.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402

import keras_mom  # noqa: E402

BATCH, LENGTH, WIDTH, HEADS, HEAD_DIM = 8, 2048, 1024, 8, 128
DEPTH, INNER_WIDTH, VOCABULARY = 24, 2048, 32_000


def mom_layer(dtype="bfloat16", **options):
    return keras_mom.MoMLayer(
        HEADS, HEAD_DIM, dtype=dtype, implementation="triton", **options
    )


class Model:
    """Tied embeddings and pre-norm blocks of MoM and SwiGLU.

    Args:
        depth: number of blocks.
        dtype: of weights and activations.
    """

    def __init__(self, depth=DEPTH, dtype="bfloat16"):
        layers = keras.layers
        dense = dict(use_bias=False, dtype=dtype)
        self.embedding = layers.ReversibleEmbedding(VOCABULARY, WIDTH, dtype=dtype)
        self.blocks = [
            dict(
                norm=layers.RMSNormalization(dtype=dtype),
                mom=mom_layer(dtype, return_state=True),
                inner_norm=layers.RMSNormalization(dtype=dtype),
                gate=layers.Dense(INNER_WIDTH, **dense),
                up=layers.Dense(INNER_WIDTH, **dense),
                down=layers.Dense(WIDTH, **dense),
            )
            for _ in range(depth)
        ]
        self.norm = layers.RMSNormalization(dtype=dtype)

    def __call__(self, tokens, states=None):
        """Logits, and the states behind the tokens."""
        x, after = self.embedding(tokens), []
        for index, block in enumerate(self.blocks):
            state = None if states is None else states[index]
            mixed, new_state = block["mom"](block["norm"](x), initial_state=state)
            after.append(new_state)
            x = x + mixed
            inner = block["inner_norm"](x)
            inner = keras.ops.silu(block["gate"](inner)) * block["up"](inner)
            x = x + block["down"](inner)
        return self.embedding(self.norm(x), reverse=True), after

    def parameters(self):
        parts = [
            self.embedding,
            self.norm,
            *(x for b in self.blocks for x in b.values()),
        ]
        return [v.value for part in parts for v in part.trainable_variables]

    def initial_state(self, batch):
        return [block["mom"].get_initial_state(batch) for block in self.blocks]


def loss_of(model, tokens):
    logits, _ = model(tokens[:, :-1])
    logits = logits.reshape(-1, VOCABULARY).float()
    return torch.nn.functional.cross_entropy(logits, tokens[:, 1:].reshape(-1))


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

    memory = extra_memory(both)
    memory = extra_memory(both)
    eager = median(forward), median(both)
    graphs = [captured(function)[0] for function in (forward, both)]
    ahead, total = (median(graph.replay) for graph in graphs)
    print(
        f"MoMLayer  forward {ahead:.2f} ms, with backward {total:.2f} ms; launched by "
        f"the host {eager[0]:.2f} and {eager[1]:.2f} ms; extra {memory:.0f} MiB",
        flush=True,
    )
    return graphs[1]


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


def time_training(model):
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH + 1), device="cuda")
    parameters = model.parameters()
    count = sum(x.numel() for x in parameters)

    def step():
        return torch.autograd.grad(
            loss_of(model, tokens), parameters, allow_unused=True
        )

    step()
    torch.cuda.reset_peak_memory_stats()
    eager = median(step, 1000)
    peak = torch.cuda.max_memory_allocated() / 2**30
    print(
        f"{len(model.blocks)} layers, {count / 1e6:.0f}M parameters: training step, "
        f"launched by the host, {eager:.1f} ms, peak {peak:.1f} GiB",
        flush=True,
    )
    graph, _ = captured(step)
    time = median(graph.replay, 1000)
    print(
        f"captured: {time:.1f} ms ({BATCH * LENGTH / time * 1e3:.0f} tokens/s)",
        flush=True,
    )


@torch.no_grad()
def check_decoding(depth=4, length=256):
    """How far decoded logits are from those of all tokens at once, in float32.

    In bfloat16 a rounding can send a token to another memory, which random weights
    amplify from layer to layer.
    """
    model = Model(depth, "float32")
    tokens = torch.randint(VOCABULARY, (1, length), device="cuda")
    logits, _ = model(tokens)
    states, stepped = model.initial_state(1), []
    for t in range(length):
        row, states = model(tokens[:, t : t + 1], states)
        stepped.append(row)
    difference = (torch.cat(stepped, 1) - logits).abs().max()
    print(
        f"decoding, float32: logits of {length} steps within {difference:.1e} of the "
        f"full forward pass (standard deviation {logits.std():.2f})",
        flush=True,
    )


@torch.no_grad()
def time_decoding(model, batches=(1, 32, 256)):
    for batch in batches:
        token = torch.randint(VOCABULARY, (batch, 1), device="cuda")
        held = model.initial_state(batch)

        def step(token=token, held=held):
            logits, states = model(token, held)
            for old, new in zip(held, states):
                for x, y in zip(old, new):
                    x.copy_(y)
            return logits

        step()
        eager = median(step)
        graph, _ = captured(step)
        time = median(graph.replay)
        print(
            f"decoding, batch {batch}: {time:.2f} ms a token "
            f"({batch / time * 1e3:.0f} tokens/s), launched by the host {eager:.1f} ms",
            flush=True,
        )
        if batch == batches[0]:
            profile_graph(graph, 0.003)


def run_layer():
    profile_graph(time_layer())
    check_decoding()
    model = Model()
    time_decoding(model)
    time_training(model)
