"""A model as named tensors in one flat vector for each dtype, and updates of it."""
