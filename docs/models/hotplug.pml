/*
 * A memory slot that is plugged in and pulled out again and again under one id, with a client of the dirty log, and a
 * coordinator that is killed between any two steps, any number of times. docs/models/README.md says which function
 * each step is, and what is not modelled.
 *
 * The slot has one page. It is known by its `born`, 0 where there is none; of what has gone for good the number may
 * be given out again, so that there are few of them. Reaping is one step here (docs/models/reap.pml has it in full).
 *
 * Check id: -DBORNS=3
 *
 * Mutant NOT_PAUSED (id): the vCPUs run on while the slot is removed
 * Mutant NOT_DRAINED (id): what is in the rings is lost with the slot
 * Mutant REMOVED_BEFORE_STRUCK_OUT (id): the slot's segments go before the journal has no slot any more
 * Mutant WRITTEN_DOWN_BEFORE_MADE (id): the journal names a slot that is not there yet
 * Mutant RETIRED_BEFORE_FOLDED (id): the client's last pages of it are not kept
 * Mutant NOT_MARKED_WHEN_REUSED (id): a new slot under an old id is clean
 * Mutant DROPPED_WHEN_TOLD (id): the last pages go with an answer that may be lost
 * Mutant WORKERS_NOT_TOLD (id): a successor lets them run with slots that the journal does not have
 * Mutant NOT_SWEPT (id): what nobody has is left behind
 */

#define SIZE (BORNS + 1)
#define BIT(b) (1 << (b))

/* --- shared memory and the journal ---------------------------------------------------------------------------------- */

byte segments, bitmaps;         /* which of ram/log<slot>.<born> and client.<client>.<slot>.<born> there are, by born */
bool slot[SIZE];                /* the page's bit in the slot bitmap */
bool pending[SIZE], synced[SIZE];
bool paused;                    /* PAUSE in the control blocks */
bool ring;                      /* an entry for the page: it names the slot's id, not its born */

typedef Log {                   /* DirtyLog, as the journal has it and as the coordinator has it */
    byte now;                   /* the slot; 0: none */
    byte retired;               /* what the client is still to be told of; 0: nothing */
    bool delivered;             /* its last sync told it */
    bool reused                 /* the id had another slot before */
}
Log journal, log;

byte worker[2];                 /* the slot that each worker has */

/* --- what the property is about -------------------------------------------------------------------------------------- */

bool owed[SIZE];                /* the client has not been told of the page since it was written */
bool asks, again;

/* A vCPU dirties the page of the slot that its worker has. */
proctype vcpu(byte w)
{
end:
    do
    :: atomic { !paused && worker[w] && !owed[worker[w]] -> ring = true; owed[worker[w]] = true }
    od
}

/* The coordinator is killed here. Bitmaps, segments and journal are its own, and the vCPUs look at `paused` and their
 * worker's slots alone: what lies between two changes of those is one `atomic`. */
#define step(name) if :: true :: goto dead fi

inline save()                   /* Core.save: whole, or not at all */
{
    d_step {
        journal.now = log.now; journal.retired = log.retired; journal.delivered = log.delivered;
        journal.reused = log.reused;
        assert(!journal.now || ((segments & bitmaps) & BIT(journal.now)));
        assert(!journal.retired || (bitmaps & BIT(journal.retired)))
    }
    step(journal_written)
}

inline committed()              /* DirtyLog.committed: what the journal does not name any more is unlinked */
{
    if :: gone -> bitmaps = bitmaps & ~BIT(gone); gone = 0; step(log_unlink) :: else fi
}

inline drain()                  /* Reaper.drain, or flush: what is in the rings goes into the slot bitmap */
{
    if :: ring && log.now -> slot[log.now] = true :: else fi;
    ring = false
}

inline resume_all()             /* everybody has the same memory */
{
    atomic { assert(worker[0] == journal.now && worker[1] == journal.now); paused = false }
}

inline add_slot()               /* hotplug.add_slot */
{
    atomic {
        do :: !born || ((segments | bitmaps) & BIT(born)) -> born++ :: else -> break od;    /* Core.new_generation */
        assert(born <= BORNS);
#ifdef MUTANT_WRITTEN_DOWN_BEFORE_MADE
        log.now = born; save(); step(memory_add_committed);
#endif
        segments = segments | BIT(born); slot[born] = false; step(memory_add_made);
        bitmaps = bitmaps | BIT(born); pending[born] = false; synced[born] = false; step(memory_add_client);
        log.now = born;
        owed[born] = log.reused;        /* what the client knows under this id is of another slot: it needs all of this */
#ifndef MUTANT_NOT_MARKED_WHEN_REUSED
        slot[born] = log.reused;
#endif
        step(memory_add_logged)
    }
    paused = true;                                      /* VcpuPool.all_paused */
    atomic { worker[0] = born; step(set) }
    atomic { worker[1] = born; step(memory_add_set) }
    atomic { save(); step(memory_add_committed); born = 0 }
    resume_all()
}

inline remove_slot()            /* hotplug.remove_slot: invariant 6 */
{
#ifndef MUTANT_NOT_PAUSED
    paused = true;
#endif
    atomic {
#ifndef MUTANT_NOT_DRAINED
        drain();
#endif
        born = log.now; step(memory_remove_drained);
#ifdef MUTANT_REMOVED_BEFORE_STRUCK_OUT
        segments = segments & ~BIT(born); step(removed);
#endif
#ifndef MUTANT_RETIRED_BEFORE_FOLDED
        if :: slot[born] -> pending[born] = true; step(fold_client) :: else fi;     /* DirtyLog.retire_slot */
#endif
        slot[born] = false;
        gone = log.retired; owed[gone] = false;         /* of an earlier one, which this one has replaced */
        log.retired = born; log.delivered = false; log.now = 0; log.reused = true;
        step(memory_remove_retired);
        save(); committed(); step(memory_remove_committed)
    }
    atomic { worker[0] = 0; step(set) }
    atomic { worker[1] = 0; step(memory_remove_set) }
    atomic { segments = segments & ~BIT(born); born = 0; step(closed) }
    resume_all()
}

inline sync()                   /* Clients.sync, DirtyLog.take */
{
    atomic {
        drain(); step(sync_flushed);
        if
        :: again ->
           if :: log.now -> pending[log.now] = pending[log.now] || synced[log.now] :: else fi;
           if :: log.retired -> pending[log.retired] = pending[log.retired] || synced[log.retired] :: else fi;
           step(sync_again)
        :: else
        fi;
        if
        :: log.now ->
           synced[log.now] = slot[log.now] || pending[log.now]; step(taken);
           pending[log.now] = false; slot[log.now] = false; step(sync_slot)
        :: else
        fi;
        if
        :: log.retired && (log.now || (log.delivered && !again)) ->     /* DirtyLog._drop_retired */
           owed[log.retired] = owed[log.retired] && !log.now;           /* if another has taken its place */
           gone = log.retired; log.retired = 0; log.delivered = false
        :: log.retired && !log.now && (!log.delivered || again) ->
           synced[log.retired] = pending[log.retired]; step(taken);
           pending[log.retired] = false; log.delivered = true; told = log.retired;
#ifdef MUTANT_DROPPED_WHEN_TOLD
           gone = log.retired; log.retired = 0; log.delivered = false
#endif
        :: else
        fi;
        step(sync_taken);
        save(); committed();
        /* The answer: whatever was written is in it, or is still in a ring. */
        if :: log.now && synced[log.now] && !ring -> owed[log.now] = false :: else fi;
        if :: told && synced[told] -> owed[told] = false :: else fi;
        for (born : 1 .. BORNS) { assert(!owed[born] || ring) }
        born = 0; told = 0; asks = false; again = false
    }
}

active proctype coordinator()
{
    byte born, gone, told;
    atomic { run vcpu(0); run vcpu(1) };
serve:
    do
    :: atomic { !asks -> asks = true }
    :: asks -> sync()
    :: !log.now -> add_slot()
    :: log.now -> remove_slot()
    od;
dead:
    skip;
    d_step {
        born = 0; gone = 0; told = 0; again = asks;
        owed[log.now] = owed[log.now] && log.now == journal.now;    /* nobody ever had it */
        log.now = journal.now; log.retired = journal.retired; log.delivered = journal.delivered;
        log.reused = journal.reused                     /* segments.adopt_parts */
    }
    paused = true;                                      /* takeover._bring_into_line: pause_all, SetMemslots */
#ifndef MUTANT_WORKERS_NOT_TOLD
    atomic { worker[0] = log.now; step(set) }
    atomic { worker[1] = log.now; step(set) }
#endif
    atomic {
        drain(); step(take_over);
        save(); step(take_over_committed);
#ifndef MUTANT_NOT_SWEPT
        segments = segments & BIT(log.now) & ~1; step(take_over_swept);     /* takeover._sweep */
        bitmaps = bitmaps & (BIT(log.now) | BIT(log.retired)) & ~1; step(take_over_swept);
#endif
        assert(!(segments & ~BIT(log.now)) && !(bitmaps & ~(BIT(log.now) | BIT(log.retired))))
    }
    resume_all();
    goto serve
}
