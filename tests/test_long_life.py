"""A cache that lives long: constant memory, finite state, right positions. 100,000 tokens: benchmarks/long_life.py."""

import warnings

import pytest
import torch
from tiny import held_positions, tiny_kernels, tiny_llama

from less_cache import H2O, LESSCache, SinkRecent

STEPS = 1_200


def one_layer(**overrides):
    return tiny_llama(num_hidden_layers=1, **overrides)


def test_positions_stay_right_and_memory_the_same():
    """One layer's keys do not depend on other tokens: its output is that of the kept tokens, where they stood."""
    model = one_layer(max_position_embeddings=2 * STEPS)
    cache = LESSCache(model, SinkRecent(sinks=2, recent=5))
    tokens = torch.randint(1, 97, (1, STEPS))
    held = set()
    with torch.no_grad():
        for step, token in enumerate(tokens.split(1, dim=1)):
            logits = model(token, past_key_values=cache).logits[:, -1]
            if step > 10:
                held.add((cache.memory_footprint().total, cache.layers[0].keys.data_ptr()))
        kept = torch.tensor([0, 1, *range(STEPS - 6, STEPS)])  # the last token saw one more than the budget
        expected = model(tokens[:, kept], position_ids=kept[None]).logits[:, -1]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert len(held) == 1
    assert cache.get_seq_length() == STEPS


def test_state_stays_finite_with_kernels():
    model = one_layer()
    cache = LESSCache(model, H2O(heavy=4, recent=4), tiny_kernels(model))
    with torch.no_grad():
        for token in torch.randint(1, 97, (1, STEPS)).split(1, dim=1):
            logits = model(token, past_key_values=cache).logits
    assert logits.isfinite().all()
    assert all(tensor.isfinite().all() for tensor in cache.layers[0].tensors().values())
    assert held_positions(cache.layers[0])[0][0][-4:] == list(range(STEPS - 4, STEPS))


def test_positions_beyond_training_warn_once():
    model = one_layer(max_position_embeddings=32)
    cache = LESSCache(model, H2O(4, 4))
    token = torch.ones(1, 1, dtype=torch.long)
    with torch.no_grad():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(token.expand(1, 32), past_key_values=cache)
            model(token, past_key_values=cache)
        with pytest.warns(UserWarning, match="longer than the 32 tokens that the model was trained for"):
            model(token, past_key_values=cache)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(token, past_key_values=cache)
            model(token, past_key_values=cache.fork())
