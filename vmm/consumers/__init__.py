"""Who needs dirty pages. Each is a client like any other program: it imports vmm.client and vmm.machine
(watch/ neither: it looks at processes that are no machines).

    rate.py         dirty rate
    stats.py        samples of a machine as it runs
    workingset.py   which pages are dirtied when
    trace.py        recording of dirty traces
    events/         what a machine does, event by event
    snapshot/       full and incremental snapshots
    missing.py      pages that come while the guest runs already
    pages.py        which pages are zero, and which follow one another
    migration/      live migration, both ends
    watch/          dirty pages of any process of this host, from outside
"""
