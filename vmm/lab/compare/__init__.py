"""``vmm compare``: run.py goes through the points, measure.py measures one, report.py shows them."""
