"""Who does a layer's work: PyTorch, the oracle, or a form of it for one kind of device."""
