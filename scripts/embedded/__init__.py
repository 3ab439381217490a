"""Trains the small base models that ship inside the package, and the independent readers that judge them."""
