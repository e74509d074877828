"""Policies alone: what they keep, drop and protect, for columns that the tests make up."""

import collections
import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import policies

from less_cache import CORM, H2O, POLICIES, LESSError, SinkRecent
from less_cache.policies import policy_from_dict


def resolved(policy, *prompt_lengths: int) -> torch.Tensor:
    """Token counts in the form that policies take, `[f, b, 1, 1]`."""
    return policy.resolve(torch.tensor(prompt_lengths)).T[:, :, None, None]


BOUNDED = [
    name
    for name, policy in POLICIES.items()
    if policy.from_budget(16).capacity(resolved(policy.from_budget(16), 1)) is not None
]


def kept(policy, scores: list[float], positions: list[int], seen: int) -> list[int]:
    """Positions that the one head of a policy keeps."""
    columns = torch.tensor(positions, dtype=torch.int32).view(1, 1, -1)
    keep = policy.keep(torch.tensor(scores).view(1, 1, -1), columns, torch.tensor(seen).view(1, 1, 1), resolved(policy, seen))
    return sorted(columns[keep].tolist())


@pytest.mark.parametrize(
    ("policy", "scores", "positions", "seen", "expected"),
    [
        (H2O(1, 2), [5.0, 1.0, 9.0, 0.0, 0.0], [0, 1, 2, 3, 4], 5, [2, 3, 4]),
        (H2O(2, 2), [5.0, 1.0, 9.0, 0.0, 0.0], [0, 1, 2, 3, 4], 5, [0, 2, 3, 4]),
        (H2O(2, 1), [9.0, 1.0, 0.0, 5.0, 0.0], [3, 4, -1, 0, 2], 5, [0, 3, 4]),  # slots in no order, one empty
        (H2O(1, 1), [7.0, 7.0, 7.0], [0, 1, 2], 3, [1, 2]),  # tied: the newer stays
        (H2O(1, 1), [torch.inf, 7.0, 0.0], [-1, 0, 1], 2, [0, 1]),  # an empty column never stays
        (H2O(9, 9), [1.0, 1.0], [0, 1], 2, [0, 1]),
        (SinkRecent(1, 2), [0.0] * 5, [0, 1, 2, 3, 4], 5, [0, 3, 4]),
        (SinkRecent(0, 2), [0.0] * 5, [0, 1, 2, 3, 4], 5, [3, 4]),
        (SinkRecent(2, 2), [0.0] * 3, [0, 1, 2], 3, [0, 1, 2]),
        (SinkRecent(2, 2), [0.0] * 4, [0, 4, 5, 3], 6, [0, 3, 4, 5]),  # sink 1 was lost before: the newest stands in
        (CORM(2, 1), [4.0, 2.0, 1.0, 2.0, 3.0], [0, 1, 2, 3, 4], 5, [0, 4]),  # last two queries: 3 and 4
        (CORM(3, 1), [4.0, 2.0, 1.0, 2.0, 3.0], [0, 1, 2, 3, 4], 5, [0, 1, 3, 4]),
        (CORM(1, 3), [0.0, 0.0, 0.0, 0.0, 0.0], [0, 1, 2, 3, 4], 5, [2, 3, 4]),
    ],
)
def test_policy_keeps(policy, scores, positions, seen, expected):
    assert kept(policy, scores, positions, seen) == expected


@st.composite
def heads_over_capacity(draw, name: str):
    """Columns of heads that are one token over their capacity; scores tie more often than not."""
    policy = draw(policies(name, fractions=True))
    b, g = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    seen = [draw(st.integers(30, 40)) for _ in range(b)]
    counts = resolved(policy, *draw(st.lists(st.integers(1, 20), min_size=b, max_size=b)))
    columns = int(policy.capacity(counts).max()) + 1 + draw(st.integers(0, 3))
    positions, scores = [], []
    for row in range(b):
        alive = int(policy.capacity(counts)[row]) + 1
        for _ in range(g):
            held = draw(st.lists(st.integers(0, seen[row] - 1), min_size=alive, max_size=alive, unique=True))
            positions.append(draw(st.permutations(held + [-1] * (columns - alive))))
            scores.append(draw(st.lists(st.sampled_from([0.0, 1.0, 2.5]), min_size=columns, max_size=columns)))
    positions = torch.tensor(positions, dtype=torch.int32).view(b, g, columns)
    return policy, torch.tensor(scores).view(b, g, columns), positions, torch.tensor(seen).view(b, 1, 1), counts


@pytest.mark.parametrize("name", BOUNDED)
@given(st.data())
def test_victim_is_the_column_that_keep_drops(name, data):
    policy, scores, positions, seen, counts = data.draw(heads_over_capacity(name))
    dropped = (positions >= 0) & ~policy.keep(scores, positions, seen, counts)  # [b, g, c]
    assert (dropped.sum(dim=-1) == 1).all()
    victim = policy.victim(scores, positions, seen, counts)  # [b, g, 1]
    assert torch.equal(victim, dropped.int().argmax(dim=-1, keepdim=True))


@pytest.mark.parametrize("name", BOUNDED)
@given(st.data())
def test_keep_never_drops_the_protected_nor_exceeds_capacity(name, data):
    policy, scores, positions, seen, counts = data.draw(heads_over_capacity(name))
    keep = policy.keep(scores, positions, seen, counts)
    protected = (positions >= 0) & policy.protected(positions, seen, counts)
    assert not (protected & ~keep).any()
    assert not (keep & (positions < 0)).any()
    assert (keep.sum(dim=-1, keepdim=True) <= policy.capacity(counts)).all()


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 30), st.integers(0, 2**16))
def test_corm_score_says_the_same_as_a_ring_of_bits(window, recent, steps, seed):
    """Literal CORM: a ring of `window` bits a token, 1 where a query found it important; evicted when full and all 0."""
    generator = torch.Generator().manual_seed(seed)
    policy = CORM(window, recent)
    scores = torch.zeros(1, 1, steps)
    positions = torch.full((1, 1, steps), -1, dtype=torch.int32)  # token t is in column t
    rings = {}
    for t in range(steps):
        positions[..., t] = t
        scores[..., t] = policy.arrival(positions[..., t])
        rings[t] = collections.deque(maxlen=window)
        logits = 4 * torch.randn(1, 1, 2, 1, steps, generator=generator)  # [b, g, s, n, c]: few tokens get most weight
        weights = logits.masked_fill((positions < 0)[:, :, None, None], -torch.inf).softmax(dim=-1)
        scores = policy.observe(scores, weights, torch.tensor([[t]]))
        keep = policy.keep(scores, positions, torch.tensor(t + 1).view(1, 1, 1), resolved(policy, 1))
        positions = positions.masked_fill(~keep, -1)
        for token, ring in rings.items():
            ring.append(bool((weights[..., token] >= 1 / (t + 1)).any()))
        minor = [token for token, ring in rings.items() if len(ring) == window and not any(ring)]
        for token in minor:
            if token <= t - recent:
                del rings[token]
        assert positions[positions >= 0].tolist() == list(rings)


def test_grouped_queries_are_pooled():
    scores = torch.zeros(1, 1, 3)
    weights = torch.tensor([[0.1, 0.8, 0.1], [0.4, 0.5, 0.1]]).view(1, 1, 2, 1, 3)
    at = torch.tensor([[2]])
    torch.testing.assert_close(H2O(1, 1).observe(scores, weights, at), torch.tensor([0.5, 1.3, 0.2]).view(1, 1, 3))
    assert CORM(1, 1).observe(scores, weights, at).flatten().tolist() == [2.0, 2.0, 0.0]  # important from 1 / 3


def test_padding_queries_leave_scores_alone():
    scores = torch.tensor([3.0, 0.5]).view(1, 1, 2)
    weights = torch.zeros(1, 1, 1, 2, 2)
    for policy in (H2O(1, 1), SinkRecent(1, 1), CORM(1, 1)):
        assert torch.equal(policy.observe(scores, weights, torch.tensor([[-1, -1]])), scores)


@pytest.mark.parametrize(
    ("policy", "prompt_length", "expected"),
    [
        (H2O(3, 4), 100, [3, 4]),
        (H2O(0.25, 0.5), 100, [25, 50]),
        (H2O(0.28, 2), 10, [3, 2]),
        (H2O(0.01, 0.01), 10, [1, 1]),
        (SinkRecent(0, 0.1), 3, [0, 1]),
        (CORM(0.5, 0.26), 50, [25, 13]),
    ],
)
def test_fractions_of_the_prompt_are_rounded_and_at_least_one(policy, prompt_length, expected):
    assert policy.resolve(torch.tensor([prompt_length])).tolist() == [expected]


def test_fractions_are_resolved_for_every_row():
    assert H2O(0.5, 3).resolve(torch.tensor([10, 20, 1])).tolist() == [[5, 3], [10, 3], [1, 3]]
    assert H2O(0.5, 3).is_fractional
    assert not H2O(5, 3).is_fractional


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("budget", [16, 17, 0.5])
def test_a_budget_is_spent_whole(name, budget):
    policy = POLICIES[name].from_budget(budget)
    tokens = [field.name for field in dataclasses.fields(policy) if not field.metadata.get("whole")]
    spent = sum(getattr(policy, name) for name in tokens)
    assert spent == (budget if isinstance(budget, int) or name != "sink_recent" else 4 + budget)


@pytest.mark.parametrize("name", POLICIES)
@given(st.data())
def test_policies_survive_their_dict(name, data):
    policy = data.draw(policies(name, fractions=True))
    assert policy_from_dict(policy.to_dict()) == policy


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: H2O(0, 1), r"H2O: expected heavy to be an int >= 1 .* got 0\."),
        (lambda: H2O(1, -2), r"expected recent .* got -2\."),
        (lambda: H2O(1, 1.5), r"expected recent .* got 1.5\. For a token count pass an int"),
        (lambda: H2O(1, 1.0), r"got 1.0\. For a token count pass an int"),
        (lambda: H2O(1, 0.0), r"got 0.0"),
        (lambda: H2O(float("nan"), 1), r"got nan"),
        (lambda: H2O("8", 1), r"expected heavy .* got '8' of type str"),
        (lambda: H2O(True, 1), r"got True of type bool"),
        (lambda: SinkRecent(-1, 1), r"expected sinks to be an int >= 0"),
        (lambda: CORM(0, 1), r"CORM: expected window to be an int >= 1"),
        (lambda: H2O.from_budget(1), r"H2O: expected budget to be an int >= 2"),
        (lambda: SinkRecent.from_budget(4), r"expected a budget above its 4 sinks, got 4"),
        (lambda: policy_from_dict({"name": "lru"}), r"expected a policy name out of .*'h2o'.*, got 'lru'"),
        (lambda: policy_from_dict({"name": "h2o", "heavy": 1}), r"Policy 'h2o'.*\{'heavy': 1\}"),
        (lambda: policy_from_dict({"name": "h2o", "heavy": 1, "recent": 1, "window": 2}), r"Policy 'h2o'.*'window': 2"),
    ],
)
def test_bad_counts_are_refused(make, message):
    with pytest.raises(LESSError, match=f"(?i){message}"):
        make()
