"""``vmm stress --faults``: machines whose processes are killed and stopped while clients work with them.

    plan.py     what is done, and what goes wrong meanwhile: drawn from a seed, as data
    oracle.py   what a client got, against the memory it sees
    run.py      carries a plan out; what it found
    hit.py      a signal to a process, at its moment
    move.py     a migration by two processes; whose the machine is afterwards
    delay.py    messages that come late
    campaign.py one episode after the other, and what they came to
    shrink.py   a shorter plan that finds the same

Whatever a client is told is held against memory that the oracle has read itself; nothing here looks into the
coordinator, whose own verifier runs beside it in half of the machines.
"""
