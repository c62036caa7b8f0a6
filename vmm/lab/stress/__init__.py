"""``vmm stress``: sweep.py says what the points are and keeps their results, run.py goes from point to point, here or
on a cluster, measure.py measures one and proves it, model.py fits, report.py shows."""
