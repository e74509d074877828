"""Which kernels belong to a model: from the installed catalogue, then from the Hub, then the untrained state."""

import logging
import warnings

from transformers import PreTrainedConfig, PreTrainedModel

from less_cache.errors import LESSError
from less_cache.hub import catalogue, client
from less_cache.hub.explaining import UnreachableError
from less_cache.integration.families import fingerprint, unwrapped
from less_cache.kernels.kernels import LESSKernels

logger = logging.getLogger(__name__)


def kernels_for(model: PreTrainedModel | PreTrainedConfig, token: str | bool | None = None) -> LESSKernels | None:
    """Kernels trained for the model's weights, wherever they were loaded from; of a config, for the model of its name.

    Says in the log where they come from. Where there are none, the untrained state with one warning that has the reasons;
    None for a model whose heads differ in size.
    """
    model = unwrapped(model)
    identity = fingerprint(model) if isinstance(model, PreTrainedModel) else None
    name = getattr(model, "name_or_path", None) or ""
    base_model = name if client.is_repo_id(name) else None
    reasons, reachable = [], True
    for place, look in (
        ("the catalogue", lambda: catalogue.find(base_model, identity)),
        ("the Hub", lambda: client.search(base_model, identity, token)),
    ):
        if place == "the Hub" and not reachable:
            continue  # the catalogue named a repository, and the Hub gave no answer
        try:
            sources = look()
        except LESSError as error:
            reasons.append(str(error))
            continue
        for source in sources:
            try:
                kernels = LESSKernels.from_pretrained(source, token=token)
            except LESSError as error:
                reasons.append(str(error))
                reachable = reachable and not isinstance(error, UnreachableError)
                continue
            described = kernels.config
            if described.base_model_fingerprint == identity if identity else described.base_model == base_model:
                level = logging.INFO if place == "the catalogue" else logging.WARNING  # anyone may publish on the Hub
                logger.log(level, "Kernels for %s: %s, found in %s (%s).", name or "this model", source, place, kernels.source)
                return kernels
            reasons.append(f"{source} is for other weights ({described.base_model})")
    untrained, used = None, "the policy alone is used, and forgets what it evicts"
    try:
        untrained, used = LESSKernels.untrained(model), "the untrained state is used, which remembers less than trained kernels"
    except LESSError as error:  # heads of several sizes
        reasons.append(str(error))
    warnings.warn(
        f"No kernels for {name or 'this model'} in the catalogue or on the Hub: {used}. Train some with less-cache train. "
        f"{'; '.join(reasons)}".strip(),
        stacklevel=3,
    )
    return untrained
