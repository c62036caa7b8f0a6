"""Many machines on the hosts of a Ray cluster (``vmm fleet``, the extra ``cluster``)::

    config.py       the file: which machines, how many, how they are spread, where their snapshots are
    client.py       the command's end: finds the fleet of a cluster, and asks it
    fleet.py        an actor on the cluster's head: which machines there are and where; moves and restores them
    records.py      what it writes down for its successor, should its process be lost
    cluster.py      Ray's nodes and actors, as it has them
    members.py      one machine as it knows it; events.py: what it tells of them
    places.py       which host a machine goes to (pure)
    hosts.py        what each host has, as it says itself
    resident.py     an actor for each machine, on the machine's host: launches, receives, migrates, snapshots it
    snapshots.py    the snapshots that it takes by and by
    lease.py        how long it has the machine without a word from the fleet

A machine is its actor's: it ends when the actor does, and an actor ends with its host, or when its host is cut off from
the fleet. So a machine whose actor is lost may be restored elsewhere. What an actor does to its machine, it does as any
client (vmm.client, vmm.consumers); nothing here speaks to a coordinator in another way. Only cluster.py and client.py
know Ray.
"""
