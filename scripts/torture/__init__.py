"""Kills the real command at its file operations, and shows that nothing is lost."""
