"""Measuring: what machines cost, and how that grows.

    hoststat.py     what processes use, as the kernel counts it
    demo.py         all of it once, small (``vmm demo``)
    compare/        the same guest under each mode of dirty tracking (``vmm compare``)
    cluster/        points that are independent, on this host or on those of a Ray cluster
    predictions.py  migrations foretold, a grid of them (``vmm predict``)
    stress/         a sweep over what a machine's speed depends on (``vmm stress``)
    report/         pages and figures of what was measured (``vmm report``)
"""
