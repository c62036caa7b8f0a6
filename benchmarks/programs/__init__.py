"""Programs that nobody here wrote, in machines against the same natively (see __main__.py)."""
