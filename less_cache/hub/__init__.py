"""Sets of kernels on the Hub and in the catalogue: all that needs the network."""
