"""How a model is put together, found out by following one forward pass on fake tensors."""
