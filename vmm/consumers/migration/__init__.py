"""Live migration. Both ends run in a client's process: the source's beside the machine that leaves, the target's
beside the one that arrives; to their coordinators they are clients like others.

Down the way of a page, and of the hand-over::

    source.py              offer, stop-and-copy, hand-over                target.py       fill, start, answer
      fitness.py           whether the target can run it (checking.py only asks)
      precopy.py           the rounds                                       place.py      its one address (door.py)
      rounds.py            what goes in which (no I/O; so are                peers.py      who is listened to
        converge.py, hot.py    when to stop, what waits until then)
      steering.py          what it is told while it goes on; control.py: where
      handover.py          what outlives the source's process               offers.py     what is taken
      proof.py             in place: that both have one /dev/shm            (both ends)
      channels.py          threads that pack and send pages                 arrivals.py   threads that take pages
      gathered.py          what clients of the dirty log have gathered       (both ends)
      postcopy_source.py   what is asked for after the hand-over            postcopy_target.py, ../missing.py
      talk.py, progress.py the control connection; what is counted
                  \\                                                        /
                   memory.py    the memory, sent and filled in
                   pages.py     pages and bitmaps, packed and checked
                   streams.py   the connections for pages; tls.py
                   wire.py      the messages (docs/protocol.md)
                   sockets.py   connections; keys.py, addresses.py

``upgrade.py`` hands a machine over to new processes of its own host and name; ``guard.py`` does the rest should it be
killed.

``report.py`` is what is asked for and said of it all, ``arrival.py`` that of the target, ``status.py`` where both are
kept. ``vmm.migrate`` and ``vmm.receive`` are what others import. These modules import nothing of vmm but the client's
side (``vmm.client.machine``), names, rules, errors, records and specifications.
"""
