"""The coordinator process: it reaps, keeps the dirty log, and serves the control socket.

    entry           its beginning and end; the keeper starts it
    keeper          the process that starts it, and another one when it has died
    segments        a machine's memory, made or adopted
    loop            one loop, one thread: what is due, what has come; from the first vCPU to the last
    takeover        how it begins where another one died
    rounds          the verifier's rounds
    server, table   the control socket: a verb in, a call out, an answer; and which call
    core            what all of the modules below share, and the checks that many verbs begin with
    owners          processes that hold something here, watched by pidfd
    journal         what the machine is, for a replacement coordinator
    life            started, asked to end, ended
    pauses, leases, clients, writes, hotplug, limits, tracking, recording, incoming, vcpu_states
                    a family of verbs each
    families        all of them together
    status, outcome the report; what an end means

Nobody outside this package imports any of it.
"""

from __future__ import annotations

__all__ = ["STOP_TIMEOUT"]

STOP_TIMEOUT = 25      # seconds after SIGTERM in which the coordinator is gone, whatever it is doing
