"""Quality of policies and kernels, measured through the real cache."""

from less_cache.evaluation.perplexity import Measurement, measure, stretches

__all__ = ["Measurement", "measure", "stretches"]
