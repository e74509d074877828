"""Sets of kernels as files: on disk, on the Hub, and in the catalogue."""
