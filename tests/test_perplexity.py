"""The rival of equal bytes, by the bytes that caches really hold."""

import pytest
import tiny
import torch

from less_cache import H2O, LESSCache, LESSError
from less_cache.evaluation.perplexity import with_state_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 8, [1, 8], [16, 2]], ids=str)
def test_the_rival_has_the_bytes_of_the_state(rank, dtype):
    """As many tokens more as take them, and not one too many."""
    model = tiny.tiny_llama().to(dtype)
    kernels = tiny.tiny_kernels(model, rank=rank)

    def held(policy, kernels=None):
        cache = LESSCache(model, policy, kernels)
        with torch.no_grad():
            model(torch.arange(1, 90)[None], past_key_values=cache)
        return cache.memory_footprint()

    policy = H2O(4, 4)
    rival = with_state_bytes(policy, kernels, dtype.itemsize)
    wanted = held(policy).keys_values + held(policy, kernels).low_rank_state
    token = held(policy).keys_values // 9  # a slot is free for the next
    assert wanted <= held(rival).keys_values < wanted + token
    assert rival.heavy == 4 and with_state_bytes(policy, kernels, dtype.itemsize, "heavy").recent == 4


def test_fractions_have_no_bytes_yet():
    with pytest.raises(LESSError, match="Expected token counts"):
        with_state_bytes(H2O(0.1, 0.1), tiny.tiny_kernels(tiny.tiny_llama()), 4)
