"""Implementations of other projects, where installed, as functions of our inputs.

flash-linear-attention 0.6.0 (`fla`) tunes its kernels at the first call of a shape,
for minutes; FlashQLA 0.1.3 compiles for about one. rwkv_ops 0.11 needs jax-triton, and
does not compile for 128 channels, where its wrappers contradict its kernels' settings.
"""

# pyright: reportMissingImports=false

import importlib.util


def scans(shape):
    """Functions of query, key, value, log_decay, beta and cu_seqlens, by name."""
    found = {}
    if installed("fla"):
        found |= _fla_scans(shape.decay)
    if installed("flash_qla") and shape.decay == "head" and shape.key_dim == 128:
        found["FlashQLA"] = _flash_qla
    return found


def installed(name):
    return importlib.util.find_spec(name) is not None


def _fla_scans(decay):
    if decay == "head":
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        return {"fla": _with_borders(chunk_gated_delta_rule)}
    from fla.ops.gla import chunk_gla
    from fla.ops.kda import chunk_kda

    def gla(query, key, value, log_decay, beta, borders):
        del beta
        return chunk_gla(query, key, value, log_decay, cu_seqlens=borders.long())[0]

    return {"fla's KDA": _with_borders(chunk_kda), "fla's GLA": gla}


def _with_borders(function):
    def scan(query, key, value, log_decay, beta, borders):
        borders = borders.long()
        return function(query, key, value, log_decay, beta, cu_seqlens=borders)[0]

    return scan


def _flash_qla(query, key, value, log_decay, beta, borders):
    from flash_qla import chunk_gated_delta_rule

    options = dict(cu_seqlens=borders.long())
    return chunk_gated_delta_rule(query, key, value, log_decay, beta, **options)[0]


def rwkv_scan(shape):
    """rwkv_ops' chunk kernel on JAX, for sequences of equal length; None without it."""
    if not installed("rwkv_ops") or len(set(shape.lengths)) > 1:
        return None
    import os

    # Its package does not import as a whole with "triton"; this module does.
    os.environ.setdefault("KERNEL_TYPE", "native")
    cache = os.environ.get("TRITON_CACHE_DIR")
    from rwkv_ops.gdn_chunk.jax_triton_kernel import gated_delta_net_chunk

    # jax-triton takes Triton's cache away, from the kernels beside it too.
    os.environ.pop("TRITON_CACHE_DIR", None)
    if cache is not None:
        os.environ["TRITON_CACHE_DIR"] = cache

    def scan(query, key, value, log_decay, beta):
        rows = (query, key, value, log_decay, beta)
        count = len(shape.lengths)
        rows = (x.reshape(count, -1, *x.shape[2:]) for x in rows)
        output, _ = gated_delta_net_chunk(*rows, chunk_size=64)
        return output.reshape(value.shape)

    return scan


def mom_attention(width, heads, head_dim):
    """fla's layer, in bfloat16 on the GPU; None without it."""
    if not installed("fla"):
        return None
    import torch
    from fla.layers.mom import MomAttention

    layer = MomAttention(
        hidden_size=width,
        head_dim=head_dim,
        num_heads=heads,
        expand_v=1,
        num_memories=4,
        topk=2,
        shared_mem=True,
    )
    return layer.to("cuda", torch.bfloat16).train()


def mom_language_model(depth, width, heads, head_dim, inner_width, vocabulary):
    """fla's language model of such layers; None without it."""
    if not installed("fla"):
        return None
    import torch
    from fla.models import MomConfig, MomForCausalLM

    config = MomConfig(
        hidden_size=width,
        num_heads=heads,
        head_dim=head_dim,
        num_hidden_layers=depth,
        intermediate_size=inner_width,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
    )
    return MomForCausalLM(config).to("cuda", torch.bfloat16).train()
