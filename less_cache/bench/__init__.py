"""Speed and memory of caches on a model, measured."""
