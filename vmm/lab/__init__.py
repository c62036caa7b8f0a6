"""Measuring: what machines cost, and how that grows.

    hoststat.py     what processes use, as the kernel counts it
    compare/        the same guest under each mode of dirty tracking (``vmm compare``)
    stress/         a sweep over what a machine's speed depends on (``vmm stress``)
"""
