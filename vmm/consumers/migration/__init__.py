"""Live migration. Both ends run in a client's process: the source's beside the machine that leaves, the target's
beside the one that arrives; to their coordinators they are clients like others.

Down the way of a page, and of the hand-over::

    source.py              offer, stop-and-copy, hand-over                target.py       fill, start, answer
      precopy.py           the rounds                                       peers.py      who is listened to
      converge.py          when to stop (no I/O)                            offers.py     what is taken
      handover.py          what outlives the source's process               memory.py     the memory, filled in
      channels.py          threads that pack and send pages                 ../missing.py holes, filled in later
      postcopy_source.py   what is asked for after the hand-over
      talk.py, progress.py the control connection; what is counted
                  \\                                                        /
                   pages.py     pages and bitmaps, packed and checked
                   wire.py      the messages (docs/protocol.md)
                   sockets.py   connections; keys.py, addresses.py

``report.py`` is what is asked for and said of it all, ``status.py`` where the CLI finds that. ``vmm.migrate`` and
``vmm.receive`` are what others import. These modules import nothing of vmm but the client's side
(``vmm.client.machine``), names, rules, errors and specifications.
"""
