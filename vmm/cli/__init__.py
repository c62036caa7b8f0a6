"""The command line. Every verb is a few lines over ``Machine``, a consumer or the laboratory.

    main.py         the entry, which imports next to nothing
    commands.py     the group of all verbs, and those about a machine's dirty log and memory
    launch.py, program.py, programs.py, forward.py, machines.py, console.py, config.py, clients.py, dirty.py, trace.py,
    events.py, report.py, snapshot.py, migrate.py, receive.py, predict.py, compare.py, stress.py, fleet.py, watch.py,
    stats.py, top.py, exporter.py, qmp.py, completion.py, demo.py  a family of verbs each
    faults.py       stress --faults; sampling.py: watch --sample
    common.py       what they share; run.py: those that follow a machine; migrating.py: those of a migration
    examples.py     an example or two of every verb
    text.py         reports, progress and lists, for a person; lines.py: lines of JSON, for a program
    signals.py      signals that end a command
"""
