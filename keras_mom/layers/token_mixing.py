"""From a single projected token to its mixed output, without packing.

Names are those of `keras_mom.layers.mixing`.
"""

import functools

from keras_mom.ops.memory_mixing import output_norm
from keras_mom.ops.memory_projection import by_set
from keras_mom.ops.memory_step import (
    TokenScan,
    convolution_step,
    memory_step,
    of_memories,
    scan_and_mix,
    spread_routing,
)
from keras_mom.ops.projection import project
from keras_mom.rules.base import MemoryUpdateRule


def mix_token(
    sizes, rule, kernels, norm, tokens, weights, indices, mask, state, options
):
    """`mix_sequence` for T == 1: every memory takes or skips the token.

    `state` is never None here, and there are no documents.
    """
    implementation = options["implementation"]
    weights, active = spread_routing(
        weights[:, 0],
        indices[:, 0],
        None if mask is None else mask[:, 0],
        num_memories=sizes.num_memories,
        shared=sizes.shared,
        implementation=implementation,
    )
    sets = tuple(sizes.projection_of_memory)
    query, key, value, window = convolution_step(
        tokens.query[:, 0],
        by_set(project(tokens.key_projection, tokens.inputs), sizes.projections),
        by_set(project(tokens.value_projection, tokens.inputs), sizes.projections),
        kernels,
        None if kernels is None else state[1],
        active,
        heads=sizes.num_heads,
        set_of_memory=sets,
        activations=(None,) * 3 if kernels is None else rule.convolution_activations,
        normalized=rule.normalized,
        in_place=options["in_place"] and kernels is not None,
        implementation=implementation,
    )
    features = [of_memories(x[:, 0], sets) for x in tokens.features]
    query, key, value, log_decay, beta = rule.prepare(query, key, value, *features)
    if type(rule).scan is MemoryUpdateRule.scan:
        mixed, memories = memory_step(
            query,
            key,
            value,
            log_decay=log_decay,
            beta=beta,
            weights=weights,
            active=active,
            state=state[0],
            write=rule.write,
            erase_before_decay=rule.erase_before_decay,
            read_before_update=rule.read_before_update,
            in_place=options["in_place"],
            implementation=implementation,
        )
    else:
        scan = functools.partial(rule.scan, TokenScan(implementation))
        rows = (query, key, value, log_decay, beta)
        mixed, memories = scan_and_mix(scan, *rows, weights, active, state[0])
    state = (memories,) if kernels is None else (memories, window)
    output = output_norm(mixed[:, None], norm, implementation=implementation)
    return output, state
