"""Modes of dirty tracking that a worker has itself, whatever its accelerator: ``uffd``."""
