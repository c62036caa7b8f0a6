"""Dirty pages of any process of this host, from outside: ``vmm watch``, ``vmm trace record --pid``.

The process is made to call userfaultfd(2) once; from then on its mappings are write-protected, and asked which pages
were written, through that descriptor and /proc/PID/pagemap, without the process. docs/watch.md says what it costs and
what is refused; decision 26 why it is done so. No coordinator has a part in it.

Getting the descriptor, in the order of its way (the first four are the helper process, which imports little):

    frame.py        a signal frame, by which a thread returns to what it was doing, whoever is there to see to it
    gadgets.py      what of the process's own code is used
    threads.py      which thread, and why not another
    injector.py     the helper: one system call in a stopped thread, the descriptor fetched
    attach.py       what is refused before anything is touched; the helper, from the watcher's end

And with it:

    targets.py      who: a process by its number, a VM by its name or its monitor's socket
    blocks.py       what of a process is watched: memory blocks of a VM, or all that it can write
    watcher.py      protects what is watched, follows mappings that come and go, collects
    series.py       intervals one after the other: rates, working sets, recordings
    tracing.py      the same as a dirty trace
    huge.py         huge pages that were split are made huge again
    sampling.py     an estimate from checksums of some pages: no helper, no protection, an error
"""
