"""vCPU workers as the coordinator has them. Imports ipc, and what forks workers.

    handle.py       one: its process, its control block, its ring
    link.py         the sockets that they are spoken to over
    pool.py         all of them: started, asked, kicked, paused, given up
"""
