"""``vmm compare``: measure.py runs the points, report.py shows them."""
