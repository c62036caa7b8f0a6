"""The path of a dirtied page, from the rings to each client's bitmap; read from the top to the bottom.

    schedule.py     when to reap (no I/O)
    reaper.py       reap and flush: harvest, reset, compare counts, publish
    tracking/       modes of dirty tracking, one file each, and the changing between them
    log.py          from staging to the slot bitmaps, and from there to each client's
    parts.py        the segments that all of that lies in
    verify.py       proof, while the machine runs, that nothing was lost
    recorder.py     what is harvested, for a trace that is recorded

Runs in the coordinator, and knows nothing of its sockets, verbs and journal.
"""
