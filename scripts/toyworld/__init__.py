"""A procedural world of little scenes with captions, the source of the project's own base models and example data."""
