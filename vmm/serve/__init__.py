"""What machines say to other programs: metrics, for Prometheus.

    metrics.py      which there are, as a table; docs/metrics.md has it for people
    collector.py    samples of machines, made into them
    endpoint.py     where they are served: a port or a Unix socket
    dashboard.json  a dashboard for Grafana that shows them

Needs the extra ``metrics`` (prometheus_client). Like the command line it imports consumers and below.
"""
