"""Generation as one function of tensors, by the protocol of KerasHub's samplers."""

import keras
from keras import ops

from keras_mom.models import samplers


def generate_step(lm, sampler, inputs, stop_token_ids, seed):
    """See `GenerationMixin.generate_step`."""
    token_ids = ops.convert_to_tensor(inputs["token_ids"])
    mask = ops.cast(ops.convert_to_tensor(inputs["padding_mask"]), "bool")
    if isinstance(sampler, samplers.KerasHubSampler):
        filled = _by_keras_hub(lm, sampler.sampler, token_ids, mask, stop_token_ids)
    elif isinstance(sampler, samplers.BeamSampler):
        raise ValueError(
            "`generate_step` cannot search beams; `generate` does. "
            "Received: a model whose sampler is a BeamSampler"
        )
    else:
        filled = _by_own(lm, sampler, token_ids, mask, stop_token_ids, seed)
    after = ops.cast(_ends(filled, mask, stop_token_ids), "int32")
    # What stands behind a stop token, and not the stop token.
    behind = ops.cumsum(after, axis=-1) - after
    return {"token_ids": filled, "padding_mask": ops.equal(behind, 0)}


def _ends(token_ids, mask, stop_token_ids):
    """Where a new token is one that ends the row: bool `[B, T]`."""
    if stop_token_ids is None:
        return ops.zeros_like(token_ids, "bool")
    stops = ops.convert_to_tensor(list(stop_token_ids), token_ids.dtype)
    ends = ops.any(ops.equal(token_ids[..., None], stops), axis=-1)
    return ops.logical_and(ends, ops.logical_not(mask))


def _read(lm, token_ids, mask, columns):
    """Reads the tokens in the first columns; the cache behind them."""
    batch, length = ops.shape(token_ids)
    index = ops.arange(length, dtype="int32")
    fed = ops.logical_and(mask, index < columns[..., None])
    cache = lm.backbone.get_initial_cache(batch, length)
    return lm.backbone.call_with_cache(token_ids, cache, padding_mask=fed)


def _by_keras_hub(lm, sampler, token_ids, mask, stop_token_ids):
    # All rows go on from the shortest prompt's end; longer ones keep what they have.
    index = ops.min(ops.sum(ops.cast(mask, "int32"), axis=1))
    # The token before the first new one is fed by `next`, and only there.
    hidden, cache = _read(lm, token_ids, mask, index - 1)

    def next(prompt, cache, index):
        token = ops.slice(prompt, [0, index - 1], [ops.shape(prompt)[0], 1])
        logits, hidden, cache = lm.call_with_cache(ops.cast(token, "int32"), cache)
        return logits[:, 0], hidden[:, 0], cache

    return sampler(
        next=next,
        prompt=token_ids,
        cache=cache,
        index=index,
        mask=mask,
        stop_token_ids=stop_token_ids,
        hidden_states=hidden,
        model=lm,
    )


def _by_own(lm, sampler, token_ids, mask, stop_token_ids, seed):
    if seed is None:
        seed = 0 if sampler.seed is None else sampler.seed
    seed = ops.cast(ops.convert_to_tensor(seed), "int32")
    batch, length = ops.shape(token_ids)
    column = ops.arange(length, dtype="int32")
    # The column of each row's last token, which is fed in the loop.
    last = ops.max(ops.where(mask, column, 0), axis=1)
    _, cache = _read(lm, token_ids, mask, last)

    def at(tokens, place):
        # Masked rows may be beyond the end.
        place = ops.minimum(place, length - 1)
        return ops.take_along_axis(tokens, place[:, None], axis=1)

    def proceed(step, tokens, done, cache):
        del cache
        del tokens
        return ops.logical_and(step < length, ops.logical_not(ops.all(done)))

    def advance(step, tokens, done, cache):
        logits, _, cache = lm.call_with_cache(
            ops.cast(at(tokens, last + step), "int32"),
            cache,
            padding_mask=ops.logical_not(done)[:, None],
        )
        chosen = ops.cast(sampler.sample(logits[:, 0], seed, step), tokens.dtype)
        step = step + 1
        here = ops.equal(column, (last + step)[:, None])
        here = ops.logical_and(here, ops.logical_not(done)[:, None])
        tokens = ops.where(here, chosen[:, None], tokens)
        ended = ops.any(_ends(tokens, mask, stop_token_ids), axis=1)
        done = ops.logical_or(ended, last + step >= length - 1)
        return step, tokens, done, cache

    step = ops.zeros((), "int32")
    state = (step, token_ids, ops.equal(last, length - 1), cache)
    # Variables keep the values that they have here inside of the loop too.
    mapping = [(variable, variable.value) for variable in lm.weights]

    def advance_in_scope(*state):
        with keras.StatelessScope(mapping):
            return advance(*state)

    return ops.while_loop(proceed, advance_in_scope, state)[1]
