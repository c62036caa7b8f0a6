"""vCPU workers as the coordinator has them. Imports ipc, and what forks workers.

    handle.py       one: its process, its control block, its ring
    pool.py         all of them: started, asked, kicked, paused, given up
"""
