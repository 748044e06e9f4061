"""Which tensors of a published checkpoint hold which weights of a model."""

from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_mom.convert.fla_config import LAYOUTS

EMBEDDING, HEAD = "model.embeddings.weight", "lm_head.weight"


class Part(NamedTuple):
    """Weights of a model, and the tensors that hold them.

    Attributes:
        names: of the tensors, all of one shape. A name comes twice where two sets of
            projections share a tensor.
        shape: of each tensor.
        variables: where the weights are, such as `"blocks.0.mixer_norm.scale"`,
            counted from the backbone.
        kind: `"vector"` for weights that are stored as they are, `"matrix"` for
            kernels side by side, `[inputs, outputs]`, that are stored above each
            other, `[outputs, inputs]`; `"convolution"` for `[width, channels]`,
            stored as `[channels, 1, width]`.
    """

    names: tuple
    shape: tuple
    variables: tuple
    kind: str

    def to_weights(self, tensors, shapes):
        """Float32 weights of these shapes, one a variable, of the named tensors."""
        if self.kind == "vector":
            return [np.array(tensors[0], "float32")]
        if self.kind == "convolution":
            return [np.array(tensors[0][:, 0].T, "float32", order="C")]
        joined = np.concatenate([np.asarray(x, "float32").T for x in tensors], axis=1)
        ends = np.cumsum([np.prod(shape[1:], dtype=int) for shape in shapes])
        return np.split(joined, ends[:-1], axis=1)

    def to_tensors(self, weights):
        """The tensors, by name, of the weights of the variables."""
        if self.kind == "vector":
            return {self.names[0]: weights[0]}
        if self.kind == "convolution":
            return {self.names[0]: weights[0].T[:, None]}
        parts = np.split(np.concatenate(weights, axis=1), len(self.names), axis=1)
        tensors = {}
        for name, part in zip(self.names, parts):
            if name in tensors and not np.array_equal(tensors[name], part.T):
                raise ValueError(
                    f"{name} can hold one projection, which the routed memories share "
                    f"with the shared memory, but in {self.variables[0]} they differ"
                )
            tensors[name] = part.T
        return tensors

    def read(self, backbone):
        """The weights in a backbone, as NumPy arrays."""
        return [ops.convert_to_numpy(_find(backbone, x)) for x in self.variables]

    def dtype(self, backbone):
        """Name of the weights' dtype."""
        dtypes = [_find(backbone, x).dtype for x in self.variables]
        return keras.backend.standardize_dtype(dtypes[0])

    def write(self, backbone, tensors):
        """Writes the named tensors to a backbone."""
        variables = [_find(backbone, x) for x in self.variables]
        weights = self.to_weights(tensors, [x.shape for x in variables])
        for variable, value in zip(variables, weights):
            variable.assign(value)


def parts_of(arguments, layout):
    """All `Part`s of a model, in the order of the published files.

    Args:
        arguments: of `keras_mom.models.MoMBackbone`, a dict.
        layout: key of `keras_mom.convert.fla_config.LAYOUTS`.
    """
    width, vocabulary = arguments["hidden_dim"], arguments["vocabulary_size"]
    embedding = ("token_embedding.embeddings",)
    yield Part((EMBEDDING,), (vocabulary, width), embedding, "vector")
    for i in range(arguments["num_layers"]):
        tensors, block = f"model.layers.{i}.", f"blocks.{i}."
        yield _vector(f"{tensors}attn_norm.weight", width, f"{block}mixer_norm.scale")
        of_mixer = _memories
        if i in arguments["attention_layers"]:
            of_mixer = _attention
        yield from of_mixer(arguments, f"{tensors}attn.", f"{block}mixer.")
        name = f"{block}feed_forward_norm.scale"
        yield _vector(f"{tensors}mlp_norm.weight", width, name)
        inner = f"{block}feed_forward."
        gated = [f"{inner}{x}_projection.kernel" for x in ("gate", "up")]
        hidden = arguments["intermediate_dim"]
        if LAYOUTS[layout].joined_gate:
            yield _matrix(f"{tensors}mlp.gate_proj.weight", 2 * hidden, width, *gated)
        else:
            yield _matrix(f"{tensors}mlp.gate_proj.weight", hidden, width, gated[0])
            yield _matrix(f"{tensors}mlp.up_proj.weight", hidden, width, gated[1])
        name = f"{inner}down_projection.kernel"
        yield _matrix(f"{tensors}mlp.down_proj.weight", width, hidden, name)
    yield _vector("model.norm.weight", width, "final_norm.scale")
    if not arguments["tie_embeddings"]:
        name = "token_embedding.reverse_embeddings"
        yield _matrix(HEAD, vocabulary, width, name)


def unused_tensors(arguments, layout):
    """Names and shapes of tensors that are in a file although nothing reads them."""
    return {
        f"model.layers.{i}.attn.{name}": (arguments["num_heads"],)
        for i in range(arguments["num_layers"])
        if i not in arguments["attention_layers"]
        for name in LAYOUTS[layout].unused
    }


def _memories(arguments, tensors, layer):
    """A Mixture-of-Memories layer."""
    width, heads = arguments["hidden_dim"], arguments["num_heads"]
    keys = heads * arguments["key_dim"]
    values = heads * arguments["value_dim"]
    yield _vector(f"{tensors}A_log", heads, f"{layer}update_rule.a_log")
    yield _vector(f"{tensors}dt_bias", heads, f"{layer}update_rule.dt_bias")
    kernel = f"{layer}query_projection.kernel"
    yield _matrix(f"{tensors}q_proj.weight", keys, width, kernel)
    kernel = f"{layer}router.kernel"
    yield _matrix(f"{tensors}gate.weight", arguments["num_memories"], width, kernel)
    for short, units, kernel in (
        ("k", keys, f"{layer}key_projection.kernel"),
        ("v", values, f"{layer}value_projection.kernel"),
        ("b", heads, f"{layer}update_rule.write_strength_projection.kernel"),
        ("a", heads, f"{layer}update_rule.decay_projection.kernel"),
    ):
        shared = f"{tensors}shared_{short}.weight"
        names = [shared]
        if arguments["per_memory_projections"]:
            memories = range(arguments["num_memories"])
            names = [f"{tensors}{short}_proj.{m}.weight" for m in memories]
        if arguments["shared_memory"]:
            names.append(shared)
        yield Part(tuple(names), (units, width), (kernel,), "matrix")
    for place, (short, channels) in enumerate(
        (("q", keys), ("k", keys), ("v", values))
    ):
        shape = channels, 1, arguments["conv_width"]
        kernel = f"{layer}convolution_kernels.{place}"
        name = f"{tensors}{short}_conv1d.weight"
        yield Part((name,), shape, (kernel,), "convolution")
    if arguments["use_output_gate"]:
        kernel = f"{layer}gate_projection.kernel"
        yield _matrix(f"{tensors}g_proj.weight", values, width, kernel)
    value_dim = arguments["value_dim"]
    yield _vector(f"{tensors}o_norm.weight", value_dim, f"{layer}norm_scale")
    kernel = f"{layer}output_projection.kernel"
    yield _matrix(f"{tensors}o_proj.weight", width, values, kernel)


def _attention(arguments, tensors, layer):
    """An attention layer of a hybrid model."""
    width, heads = arguments["hidden_dim"], arguments["num_attention_heads"]
    keys = width // heads * arguments["num_key_value_heads"]
    for short, name, units in (
        ("q", "query", width),
        ("k", "key", keys),
        ("v", "value", keys),
        ("o", "output", width),
    ):
        kernel = f"{layer}{name}_projection.kernel"
        yield _matrix(f"{tensors}{short}_proj.weight", units, width, kernel)


def _vector(name, size, variable):
    return Part((name,), (size,), (variable,), "vector")


def _matrix(name, outputs, inputs, *variables):
    return Part((name,), (outputs, inputs), variables, "matrix")


def _find(layer, path):
    for name in path.split("."):
        layer = layer[int(name)] if name.isdigit() else getattr(layer, name)
    return layer
