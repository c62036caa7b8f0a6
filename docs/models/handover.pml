/*
 * The hand-over of a migrated machine: never two, never none. docs/models/README.md says which function each step is,
 * and what is not modelled.
 *
 * `kills` processes are killed at any moments: the source's (the migration, and whoever finishes it), the source's
 * coordinator (a successor has what the journal says), the target's. `losses` messages are lost with their
 * connection. Patience may end at any moment where the guest then runs on; where it stays paused, only when nobody is
 * there to answer.
 *
 * Check kills: -DKILLS=3 -DLOSSES=1
 *
 * Mutant COMMIT_BEFORE_HAND_OVER (kills): the target is told to go on before the machine here is handed over
 * Mutant HAND_OVER_NOT_JOURNALLED (kills): a coordinator's successor does not know that the machine was handed over
 * Mutant STARTED_BEFORE_COMMIT (kills): the target starts when it has everything
 * Mutant RESUMED_WHEN_STRANDED (kills): the guest goes on here when nobody answers Commit
 * Mutant REFUSED_BEFORE_GONE (kills): the target says that it never will, and can still be told to
 * Mutant KILLED_SOURCE_NOT_REPLACED (kills): nobody repeats Commit for a source that was killed
 * Mutant STRUCK_OUT_BEFORE_REPLACED (kills): the dead lease leaves the journal before another process is there
 * Mutant RECOVERER_NOT_WATCHED (kills): it may be killed before it has the lease, and nobody sees that
 */

mtype = { State, Prepared, Commit, Running, Refused, Abort, Done };

chan to_target = [3] of { mtype };
chan to_source = [3] of { mtype };
byte kills = KILLS, losses = LOSSES;

/* --- the machine here, as its coordinator has it --------------------------------------------------------------- */

#define NOBODY 255
byte lease = NOBODY;                    /* in the journal: the process that has it */
bool frozen;                            /* in the journal: by that lease */
bool handed_over, noted;                /* Pauses.handed_over; what the journal says of it */
bool ended;                             /* vmm stop, or the migration's end */
#define RUNS_HERE (!frozen && !handed_over && !ended)

byte begun;                             /* processes of the source so far: the migration's own, then recoverers */
bool lives[KILLS + 3];                     /* each of them */
bool person;                            /* a process has said that the machine stays paused, and a person is to decide */

/* --- the target --------------------------------------------------------------------------------------------------- */

bool runs_there, target_lives = true;
bool target_died;                       /* it was killed: a person is needed, or the machine is gone with it */

/* What does not fit is dropped, as ZeroMQ does for a peer that takes nothing. */
#define say(channel, message) if :: channel!message :: full(channel) :: atomic { losses -> losses-- } fi

/* A process of the source is killed here. */
#define step(name) if :: true :: atomic { kills -> kills--; goto killed } fi

/* vmm.consumers.migration.source.Source: `me` is 0 for the migration, more for those who finish it. */
proctype source(byte me)
{
    if
    :: me > 0 ->                                        /* Source.recover */
       step(attached);
       if                                               /* Leases.take: only one has it */
       :: atomic { lease != NOBODY && lives[lease] -> goto over }
       :: atomic { !(lease != NOBODY && lives[lease]) && handed_over && !ended -> lease = me }
       :: atomic { !handed_over || ended -> goto over }
       fi;
       goto commit
    :: me == 0 ->                                       /* Source._stop_and_copy */
       lease = me;
       frozen = true; step(migrate_frozen);             /* Lease.freeze */
       say(to_target, State); step(migrate_state)
    fi;
    if
    :: to_source?Prepared -> step(migrate_prepared)
    :: to_source?Refused -> goto give_up
    :: goto give_up                                     /* impatience, a signal, anything that goes wrong */
    fi;
#ifdef MUTANT_COMMIT_BEFORE_HAND_OVER
    say(to_target, Commit);
#endif
    step(migrate_hand_over);
#ifdef MUTANT_HAND_OVER_NOT_JOURNALLED
    handed_over = true;
#else
    atomic { noted = true; handed_over = true };        /* Pauses.hand_over: answered when it is in the journal */
#endif
    step(migrate_handed_over);

commit:                                                 /* Source._commit */
    do :: to_source?_ :: empty(to_source) -> break od;  /* on another connection, or nothing was to be heard */
    say(to_target, Commit); step(migrate_commit);
heard:
    if
    :: to_source?Running
    :: to_source?Refused -> goto take_back
    :: to_source?Prepared -> goto heard                 /* out of turn: of an earlier connection */
    :: target_lives && empty(to_target) && empty(to_source) -> goto commit      /* every two seconds */
    :: !target_lives && empty(to_source) -> goto stranded                       /* Unreachable */
    fi;
    step(migrate_stop);                                 /* Source._finish */
    ended = true; step(migrate_done);
    say(to_target, Done);
    atomic { lease = NOBODY; frozen = false; goto over };

take_back:                                              /* Lease.take_back: it is frozen still */
    atomic { noted = false; handed_over = false };
    step(taken_back);
    atomic { lease = NOBODY; frozen = false; goto over };       /* Lease.thaw, Lease.close */
stranded:                                               /* Source._stranded */
#ifdef MUTANT_RESUMED_WHEN_STRANDED
    atomic { noted = false; handed_over = false; frozen = false };
#endif
    person = true; step(stranded);
    atomic { lease = NOBODY; frozen = false; goto over };
give_up:                                                /* Source._give_up */
    say(to_target, Abort); step(given_up);
    atomic { lease = NOBODY; frozen = false };
over:
killed:
    lives[me] = false
}

#ifdef MUTANT_RECOVERER_NOT_WATCHED
#define REPLACEABLE (!began)
#else
#define REPLACEABLE (!began || !lives[began])
#endif

/* The source's coordinator. What it knows is in the journal, but for what a mutant forgets. */
active proctype coordinator()
{
    byte began;                                         /* the process that this very coordinator has begun last */
    atomic { lives[0] = true; begun = 1; run source(0) };
end:
    do
    :: atomic { kills -> kills--; handed_over = noted; began = 0 }      /* it is killed; takeover.take_over */
    :: atomic { lease != NOBODY && !lives[lease] && !handed_over -> lease = NOBODY; frozen = false }  /* Leases._gone */
#ifndef MUTANT_KILLED_SOURCE_NOT_REPLACED
#ifdef MUTANT_STRUCK_OUT_BEFORE_REPLACED
    :: atomic { lease != NOBODY && !lives[lease] && handed_over && !person -> lease = NOBODY; frozen = false };
       if
       :: atomic { lives[begun] = true; run source(begun); begun++ }
       :: atomic { kills -> kills--; handed_over = noted; began = 0 }
       fi
#else
    /* Leases._gone: the dead one's lease stays in the journal until another has it. */
    :: atomic { lease != NOBODY && !lives[lease] && handed_over && !ended && REPLACEABLE ->
                lives[begun] = true; run source(begun); began = begun; begun++ }        /* Recovery.begin */
#endif
#endif
    od
}

/* vmm.consumers.migration.target._Target */
active proctype target()
{
    if
    :: to_target?State
    :: to_target?Abort -> goto refuse
    :: true -> goto refuse                              /* it has waited long enough */
    fi;
#ifdef MUTANT_STARTED_BEFORE_COMMIT
    runs_there = true;
#endif
    say(to_source, Prepared);
    do                                                  /* _Target._until_commit */
    :: to_target?Commit -> break
    :: to_target?Abort -> goto refuse
    :: goto refuse                                      /* _Target._be_patient, or vmm stop there */
    :: atomic { kills -> kills--; goto killed }
    od;
    if                                                  /* _Target._start */
    :: runs_there = true
    :: goto refuse                                      /* it cannot be started */
    :: atomic { kills -> kills--; goto killed }
    fi;
    say(to_source, Running);
end_running:
    do                                                  /* _Target._answer_until_heard */
    :: to_target?Commit -> say(to_source, Running)
    :: to_target?Done -> goto over
    :: atomic { kills && !ended -> kills--; if :: runs_there = false :: true fi; goto killed }   /* --detach: it runs on */
    od;

refuse:                                                 /* _Target._refuse: nothing is left of the machine here */
    say(to_source, Refused);
end_refused:
    do
    :: to_target?Commit ->
#ifdef MUTANT_REFUSED_BEFORE_GONE
       runs_there = true;
#endif
       say(to_source, Refused)
    :: to_target?Abort -> goto over
    :: to_target?State
    :: atomic { kills -> kills--; goto killed }
    od;
killed:
    target_died = true;
over:
    target_lives = false
}

/* Never two. */
active proctype never_two()
{
end:
    atomic { RUNS_HERE && runs_there -> assert(false) }
}

/* Never none, when nothing can happen any more: but where the target was killed. A person is asked for no other
 * reason, and is told whenever the machine stays paused. */
active proctype never_none()
{
    atomic {
        timeout ->
        assert(RUNS_HERE || runs_there || target_died);
        assert(!person || target_died);
        assert(!handed_over || ended || person)
    }
}
