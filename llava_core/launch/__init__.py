"""Starts the processes of a run on this machine, watches them, and says which one failed."""
