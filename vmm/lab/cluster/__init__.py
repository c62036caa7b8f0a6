"""Many independent points, on this host or on the hosts of a Ray cluster: points.py runs them either way, nodes.py is
the way by Ray (the extra ``cluster``), connection.py what leads there."""
