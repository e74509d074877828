"""Training of kernels."""
