"""A program's end of a machine. Imports vmm.machine and below; nothing that runs in the coordinator.

    config.py, yamlfile.py  the YAML file; models.py: its keys; origins.py: where each was given; explain.py says what
                            is wrong with it, advice.py what works badly; samples.py: the examples, by name
    schema.py, templates.py its published schema, and files to begin with
    accelerators.py         which accelerator it gets
    plan.py                 from a configuration to a machine that this host can run
    launch.py               starting its keeper, and ending it
    connection.py           the control socket
    machine.py              ``Machine``: what all consumers are written with
    views.py                its shared memory, mapped here
    holds.py                what a process can hold of a machine: a pause, a lease, limits, a host write
    doctor.py               what this host can do
    interrupts.py           Ctrl-C for those that keep what they have
"""
