"""Eviction policies: a new one is one file here and one line in `POLICIES`."""

import dataclasses

from less_cache.errors import LESSError
from less_cache.policies.attention_matching import AttentionMatching
from less_cache.policies.base import EvictionPolicy
from less_cache.policies.corm import CORM
from less_cache.policies.h2o import H2O
from less_cache.policies.sink_recent import SinkRecent

USUAL_BUDGET = 0.05  # of the prompt, where nobody says
POLICIES: dict[str, type[EvictionPolicy]] = {
    "h2o": H2O,
    "sink_recent": SinkRecent,
    "corm": CORM,
    "attention_matching": AttentionMatching,
}


def policy_from_dict(description: dict) -> EvictionPolicy:
    """The policy of `EvictionPolicy.to_dict`'s form, such as `{"name": "h2o", "heavy": 64, "recent": 64}`."""
    counts = dict(description)
    name = counts.pop("name", None)
    try:
        return policy_class(name)(**counts)
    except TypeError as error:
        wanted = [field.name for field in dataclasses.fields(policy_class(name))]
        raise LESSError(f"Policy {name!r}: expected the counts {wanted}, got {counts}.") from error


def policy_class(name: object) -> type[EvictionPolicy]:
    """The policy of that name in `POLICIES`."""
    if not isinstance(name, str) or name not in POLICIES:
        raise LESSError(f"Expected a policy name out of {sorted(POLICIES)}, got {name!r}.")
    return POLICIES[name]


__all__ = ["CORM", "H2O", "POLICIES", "AttentionMatching", "EvictionPolicy", "SinkRecent", "policy_class", "policy_from_dict"]
