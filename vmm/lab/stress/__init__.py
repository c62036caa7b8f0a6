"""``vmm stress``: sweep.py goes from point to point, measure.py measures one and proves it, model.py fits,
report.py shows."""
