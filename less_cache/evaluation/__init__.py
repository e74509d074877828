"""Quality of policies and kernels, measured through the real cache."""
