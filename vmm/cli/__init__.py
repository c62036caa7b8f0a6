"""The command line. Every verb is a few lines over ``Machine``, a consumer or the laboratory.

    main.py         the entry, which imports next to nothing
    commands.py     the group of all verbs, and those about a machine's dirty log and memory
    machines.py, run.py, signals.py, clients.py, dirty.py, trace.py, snapshot.py, migrate.py, receive.py, compare.py,
    stress.py, fleet.py, watch.py, stats.py, top.py, exporter.py, qmp.py, demo.py  a family of verbs each
    common.py       what they share; migrating.py: those of a migration
    text.py         reports, progress and lists, for a person
"""
