/*
 * An upgrade: two hand-overs in place, from the old processes to those of a machine in between, and from these to new
 * ones that have the name again. Never two, never none, whoever is killed. docs/models/README.md says which function
 * each step is, and what is not modelled.
 *
 * `kills` processes are killed at any moments: whoever upgrades, the guard that goes on in its place, those that the
 * coordinators begin to finish a hand-over. A coordinator that is killed is not seen here: its successor has what the
 * journal says, which is all that is kept of a machine below.
 *
 * Check kills: -DKILLS=3
 *
 * Mutant NOT_LET_GO (kills): the machine there belongs to whoever makes it until it runs
 * Mutant ENTERED_BEFORE_TAKEN (kills): the guest runs there before the memory has been taken away here
 * Mutant GONE_NOT_AWAITED (kills): the machine here goes on while the one there may yet take its memory
 * Mutant HAND_OVER_NOT_JOURNALLED (kills): a machine whose upgrader was killed does not know that it was handed over
 * Mutant NAME_NOT_AWAITED (kills): the machine with the name is made while the old one has it
 * Mutant NO_GUARD (kills): nobody goes on where the upgrader was killed between the two
 */

#define NOBODY 255
#define OLD 0                           /* and the name */
#define BETWEEN 1
#define NEW 2                           /* and the name */
#define UPGRADER 0
#define GUARD 1

typedef Machine {
    bool is;                            /* its keeper has its claim */
    bool let_go;                        /* it lives without whoever made it */
    bool asked;                         /* its coordinator is asked to start it */
    bool noted;                         /* in the journal: it is started */
    bool entered;                       /* its vCPUs have entered the guest */
    bool frozen, handed_over;           /* in the journal */
    byte lease;                         /* in the journal: the process that has it */
    byte maker;
};

Machine machines[3];
byte memory = OLD;                      /* the machine whose names the segments have, and no other's */
bool lives[KILLS + 3];                  /* the processes */
byte begun = 2;                         /* how many of them there have been */
byte kills = KILLS;
bool done;                              /* the guard is not needed */
bool said;                              /* a person knows that it has not got its name back */

#define RUNS(m) (machines[m].is && machines[m].entered && !machines[m].frozen && !machines[m].handed_over)
#define GIVE_BACK(m) machines[m].lease = NOBODY; machines[m].frozen = false

#define step(name) if :: true :: atomic { kills -> kills--; goto killed } fi

/* vmm.consumers.migration.upgrade: both hand-overs, or (the guard) the second. */
proctype upgrader(byte me; byte here)
{
    byte there;
next:
    there = here + 1;
#ifndef MUTANT_NAME_NOT_AWAITED
    if                                                  /* _await_end */
    :: here == BETWEEN -> !machines[OLD].is
    :: here == OLD
    fi;
#endif
    if                                                  /* Source.run, and before it _decide */
    :: atomic { machines[here].is && machines[here].lease == NOBODY && !machines[here].handed_over ->
                machines[here].lease = me }
    :: !machines[here].is -> goto over                  /* somebody else has finished it */
    fi;
    atomic {                                            /* _Target._take_offer; one before it may have gone again */
        machines[there].let_go = false; machines[there].asked = false; machines[there].noted = false;
        machines[there].entered = false; machines[there].maker = me; machines[there].is = true
    };
    step(migrate_begun);
    if
    :: true
    :: atomic { machines[there].is = false; GIVE_BACK(here); goto failed }      /* Source._give_up */
    fi;
    machines[here].frozen = true; step(migrate_frozen);
#ifdef MUTANT_HAND_OVER_NOT_JOURNALLED
    step(migrate_hand_over);
#else
    machines[here].handed_over = true; step(migrate_handed_over);
#endif
#ifndef MUTANT_NOT_LET_GO
    machines[there].let_go = true; step(receive_commit);                /* _Target._start */
#endif
    machines[there].asked = true; step(asked);          /* Machine.start */
    if
    :: machines[there].entered -> machines[there].let_go = true
    :: !machines[there].is ->                           /* it refused: Lease.take_back, Lease.thaw, Lease.close */
       machines[here].handed_over = false; step(taken_back);
       atomic { GIVE_BACK(here); goto failed }
    fi;
    step(receive_started);
    machines[here].is = false; step(migrate_done);      /* Source._finish */
    if
    :: here == OLD -> here = BETWEEN; step(upgrade_between); goto next
    :: here == BETWEEN -> goto over
    fi;
failed:
    said = true;
over:
    done = done || me == UPGRADER;                      /* Guard.__exit__ */
killed:
    lives[me] = false
}

/* vmm.consumers.migration.guard.main: it waits for the end of whoever upgrades. */
proctype guard()
{
    !lives[UPGRADER];
#ifndef MUTANT_NO_GUARD
    if
    :: done
    :: !done && machines[BETWEEN].is && machines[BETWEEN].entered -> run upgrader(GUARD, BETWEEN)
    :: !done && !machines[BETWEEN].is
    fi
#endif
}

/* vmm.consumers.migration.source.Source.recover, with _await_decision */
proctype recoverer(byte me; byte here)
{
    byte there = here + 1;
    if                                                  /* Leases.take */
    :: atomic { machines[here].is && machines[here].handed_over &&
                (machines[here].lease == NOBODY || !lives[machines[here].lease]) -> machines[here].lease = me }
    :: !machines[here].is || !machines[here].handed_over -> goto over
    fi;
    step(attached);
    if
    :: memory != here
#ifdef MUTANT_GONE_NOT_AWAITED
    :: memory == here ->
#else
    :: !machines[there].is ->                           /* first: from then on it takes nothing */
       if
       :: memory != here -> goto finish
       :: memory == here
       fi;
#endif
       machines[here].handed_over = false; step(taken_back);
       atomic { GIVE_BACK(here); goto over }
    fi;
finish:
    step(migrate_stop);
    machines[here].is = false;
over:
killed:
    lives[me] = false
}

#define M machines[me]

/* The coordinator and the keeper of each. */
proctype machine(byte me)
{
    byte replaced = NOBODY;                             /* the process that this has begun last */
end:
    do
    :: M.is && M.asked && !M.noted ->                   /* Life.start */
       if
       :: atomic { M.is -> M.noted = true }
       :: M.is = false                                  /* it cannot be started */
       fi
#ifdef MUTANT_ENTERED_BEFORE_TAKEN
    :: atomic { M.is && M.noted && !M.entered -> M.entered = true }
    :: atomic { M.is && M.entered && memory + 1 == me -> memory = me }
#else
    :: atomic { M.is && M.noted && memory + 1 == me -> memory = me }            /* Core.take_memory */
    :: atomic { M.is && M.noted && memory == me && !M.entered -> M.entered = true }
#endif
    /* The keeper's pipe from its maker; the lease "incoming" of a machine that is not started. */
    :: atomic { M.is && !lives[M.maker] && (!M.let_go || !M.noted) -> M.is = false }
    /* Leases._gone */
    :: atomic { M.is && M.lease != NOBODY && !lives[M.lease] && !M.handed_over -> GIVE_BACK(me) }
    :: atomic { M.is && M.lease != NOBODY && !lives[M.lease] && M.handed_over && (replaced == NOBODY ||
                !lives[replaced]) -> replaced = begun; begun++; lives[replaced] = true; run recoverer(replaced, me) }
    od
}

init
{
    atomic {
        machines[OLD].lease = NOBODY; machines[BETWEEN].lease = NOBODY; machines[NEW].lease = NOBODY;
        machines[OLD].is = true; machines[OLD].let_go = true; machines[OLD].noted = true; machines[OLD].entered = true;
        run machine(OLD); run machine(BETWEEN); run machine(NEW);
        lives[UPGRADER] = true; run upgrader(UPGRADER, OLD);
        lives[GUARD] = true; run guard()
    }
}

/* Never two, and never two of one name. */
active proctype never_two()
{
end:
    if
    :: atomic { (RUNS(OLD) && RUNS(BETWEEN)) || (RUNS(OLD) && RUNS(NEW)) || (RUNS(BETWEEN) && RUNS(NEW)) ->
                assert(false) }
    :: atomic { machines[OLD].is && machines[NEW].is -> assert(false) }
    fi
}

/* Never none, when nothing can happen any more; with its name, unless a person knows or the guard was killed too. It
 * has the memory. */
active proctype never_none()
{
    atomic {
        timeout ->
        assert(RUNS(OLD) || RUNS(BETWEEN) || RUNS(NEW));
        assert(RUNS(memory));
        assert(!RUNS(BETWEEN) || said || (kills < KILLS - 1 && !lives[GUARD]))
    }
}
