"""Conversations about the toy world: seeded, in one plain voice, with facts that a program can check."""
