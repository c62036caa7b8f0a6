"""Live migrations foretold, from what a guest dirties::

    dirtying.py     a guest: its memory, and what it dirties of it, by a dirty trace
    simulate.py     a migration of it, by the migration's own rounds (vmm/consumers/migration/rounds.py)
    costs.py        what a migration takes beside its bytes, on a host like the one where it was measured
    grid.py         many of them: which bandwidths and limits do, and what else would
    rings.py        which ring, and which way of tracking, the guest fits into

Nothing here moves a machine. From a running one, or from a process, a trace is recorded first (vmm/consumers/trace.py).
"""
