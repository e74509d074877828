"""Reading a prompt twice: the scores of its repetition, and what is chosen by them."""

import pytest
import tiny
import torch

from less_cache import H2O, AttentionMatching, LESSCache

MODEL = tiny.tiny_llama()
TEXT = torch.randint(2, tiny.VOCAB, (2, 120), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("policy", [AttentionMatching(0.3, every=8), H2O(0.1, 0.1)], ids=["fitted", "h2o"])
@pytest.mark.parametrize("more", [5, 20], ids=["less than a block", "more"])
def test_what_follows_a_prompt_is_there_in_every_layer_and_head_budgets_stay(policy, more):
    """Heads keep their shares, and the tokens of a question are among the newest or were chosen from."""
    cache = LESSCache(MODEL, policy, heads="adaptive")
    MODEL(TEXT[:, :60], past_key_values=cache)
    before = torch.cat([layer.held.rows.counts[..., 0] for layer in cache.layers], dim=1)
    MODEL(TEXT[:, 60 : 60 + more], past_key_values=cache, position_ids=torch.arange(60, 60 + more)[None])
    after = torch.cat([layer.held.rows.counts[..., 0] for layer in cache.layers], dim=1)
    assert all(bool(layer.positions.amax(-1).eq(59 + more).all()) for layer in cache.layers)
    assert (after.sum(1) / before.sum(1)).sub((60 + more) / 60).abs().max() < 0.1
    assert not any(layer.allotment.waiting for layer in cache.layers)
    if policy.block_size is not None:
        assert before.float().std(dim=1).min() > 1
    if more == 5 and policy.block_size is not None:
        assert (after - before * 65 / 60).abs().max() < 2
