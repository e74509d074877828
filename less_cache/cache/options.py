"""What a cache is made with, once all that was not said is chosen."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig

from less_cache.cache import spending
from less_cache.errors import LESSError
from less_cache.integration.families import geometry
from less_cache.kernels.head_budgets import BUDGETS_NAME, HeadBudgets
from less_cache.kernels.kernels import LESSKernels
from less_cache.policies import H2O, USUAL_BUDGET, AttentionMatching, EvictionPolicy, policy_class, policy_from_dict
from less_cache.slots import format_of

Heads = str | HeadBudgets | Sequence[Any]  # "equal", "adaptive", "profile", or shares [g] for each layer under LESS


@dataclasses.dataclass(frozen=True)
class Options:
    """Of a `LESSCache`, which explains them."""

    policy: EvictionPolicy
    kernels: LESSKernels | None
    heads: Heads
    slots: str
    fit: bool

    @classmethod
    def chosen(
        cls,
        config: PreTrainedConfig,
        policy: EvictionPolicy | None,
        kernels: LESSKernels | None,
        static: bool,
        budget: int | float | None,
        heads: Heads | None,
        slots: str | None,
        fit: bool | None,
    ) -> "Options":
        """Those that were given, and the usual ones for the others. Raises `LESSError` for what cannot be, with the reason."""
        if kernels is not None and not isinstance(kernels, LESSKernels):
            raise LESSError(
                f"LESSCache: expected kernels to be LESSKernels or None, got {type(kernels).__name__}. "
                "Load them with LESSKernels.from_pretrained(…)."
            )
        if budget is not None and (policy is not None or kernels is not None):
            raise LESSError(
                f"LESSCache: expected a budget or a policy, got budget={budget!r}, policy={policy!r} and kernels={kernels!r}. "
                "Pass the whole policy, such as AttentionMatching(budget=256)."
            )
        if policy is None and kernels is not None and kernels.config.policy is not None:
            try:
                policy = policy_from_dict(kernels.config.policy)
            except LESSError as error:
                raise LESSError(f"The kernels' config: {error} Pass policy= to use another.") from error
        elif policy is None and kernels is None and not static:
            heads, slots, kernels = heads or "adaptive", slots or "int4", _untrained(config)
            policy = _fitted(USUAL_BUDGET if budget is None else budget, config, slots, kernels)
        if not isinstance(policy, EvictionPolicy):
            raise LESSError(f"LESSCache: expected a policy such as H2O(heavy=64, recent=64), got {policy!r}.")
        heads = _heads(heads, policy, kernels, static)
        options = cls(policy, kernels, heads, slots or "float", policy.asks_references if fit is None else fit)
        format_of(options.slots)
        options._check_together(static)
        return options

    def __str__(self) -> str:
        heads = self.heads if isinstance(self.heads, str) else "as given"
        if isinstance(self.heads, HeadBudgets):
            heads = "profile" if self.heads.source is None else f"profile of {self.heads.source}"
        kernels = "none" if self.kernels is None else self.kernels.source
        return f"{self.policy}, heads {heads}, slots {self.slots}, kernels {kernels}"

    def to_dict(self) -> dict[str, Any]:
        """JSON form of what neither policy nor kernels say, as the file of a saved cache repeats it."""
        heads: Any = self.heads
        if isinstance(heads, HeadBudgets):
            heads = heads.to_dict()
        elif not isinstance(heads, str):
            heads = [torch.as_tensor(each).tolist() for each in heads]
        return {"heads": heads, "slots": self.slots, "fit": self.fit}

    def shares(self, position: int) -> torch.Tensor | None:
        """How much of the budget the KV heads of a layer get, `[g]`, by its place among those under LESS; None: equal."""
        if isinstance(self.heads, str):
            return None
        shares = self.heads.shares if isinstance(self.heads, HeadBudgets) else self.heads
        return torch.as_tensor(shares[position], dtype=torch.float32)

    def _check_together(self, static: bool) -> None:
        """Raise for what cannot go together."""
        if isinstance(self.heads, str) and self.heads not in ("equal", "adaptive"):
            raise LESSError(
                f"LESSCache: expected heads to be 'equal', 'adaptive', 'profile', HeadBudgets or shares for each layer, got "
                f"{self.heads!r}."
            )
        if static and self.policy.block_size is not None:
            raise LESSError(
                f"LESSCache: static=True needs a step that is the same for every token, but {self.policy} chooses in blocks. "
                "Use another policy, or static=False."
            )
        if isinstance(self.heads, str) and self.heads == "adaptive":
            if static:
                raise LESSError(
                    "LESSCache: static=True needs shapes that no prompt changes, but heads='adaptive' gives every prompt "
                    "others. Use heads='profile' or 'equal', shares of your own, or static=False."
                )
            if not self.policy.compares_heads:
                raise LESSError(
                    f"LESSCache: heads='adaptive' compares the scores of tokens over all heads, but {self.policy} has none to "
                    "compare. Use heads='profile' or 'equal', or another policy."
                )


def _heads(heads: Heads | None, policy: EvictionPolicy, kernels: LESSKernels | None, static: bool) -> Heads:
    """What was asked for; where nothing was, the kernels' profile if heads cannot be adaptive and there is one, else equal."""
    profile = None if kernels is None else kernels.head_budgets
    if heads is None:
        has_budget = policy.capacity(policy.resolve(torch.ones(1, dtype=torch.long)).T[:, :, None, None]) is not None
        cannot_adapt = has_budget and (static or not policy.compares_heads)
        return profile if profile is not None and cannot_adapt else "equal"
    if not isinstance(heads, str) or heads != "profile":
        return heads
    if profile is None:
        found = "there are no kernels" if kernels is None else f"the kernels ({kernels.source}) have none beside them"
        raise LESSError(
            f"LESSCache: heads='profile' needs a {BUDGETS_NAME} in the kernels' folder, but {found}. Measure it with "
            "less-cache profile, or pass heads=HeadBudgets.from_pretrained(…)."
        )
    return profile


def with_budget(
    budget: int | float | None, policy: EvictionPolicy | None, kernels: LESSKernels | None
) -> EvictionPolicy | None:
    """The policy that the kernels were trained with, at another budget; `policy` where no budget is given. H2O where there is
    nothing that says which.
    """
    if policy is None and kernels is None:
        return H2O.from_budget(USUAL_BUDGET if budget is None else budget)
    if budget is None:
        return policy
    trained_with = (kernels.config.policy or {}).get("name") if kernels is not None else None
    if policy is not None or trained_with is None:
        raise LESSError(
            f"LESSCache: expected a budget for the kernels' policy, got budget={budget!r}, policy={policy!r} and kernels "
            f"trained with {trained_with!r}. Pass the whole policy instead, such as policy=H2O.from_budget({budget!r})."
        )
    return policy_class(trained_with).from_budget(budget)


def _untrained(config: PreTrainedConfig) -> LESSKernels | None:
    """The state that needs no training; None for a model whose layers differ in size."""
    try:
        return LESSKernels.untrained(config)
    except LESSError:
        return None


def _fitted(budget: int | float, config: PreTrainedConfig, slots: str, kernels: LESSKernels | None) -> EvictionPolicy:
    """Attention matching for a budget in tokens, or in a share of a full cache's bytes."""
    if isinstance(budget, int) and not isinstance(budget, bool):
        return AttentionMatching.from_budget(budget)
    return spending.within(budget, geometry(config), format_of(slots), kernels)
