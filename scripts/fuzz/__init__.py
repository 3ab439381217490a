"""Odd values and damaged files, put through the real commands: each must end soon, in words, and leave inputs alone."""
