/*
 * Host writes and the last copy: what a process of the host writes into guest memory is in the final copy of a frozen
 * machine, whoever is killed. docs/models/README.md says which function each step is, and what is not modelled.
 *
 * One page; the guest stands still. The coordinator is one thread, so a verb is one `atomic` to others: what a kill
 * leaves of it is seen by its successor alone. Kills and rounds are unlimited, and each writer writes again and again.
 *
 * Check two: -DWRITERS=2
 *
 * Mutant BEGUN_WHEN_FROZEN (two): a write may begin although the machine is frozen
 * Mutant FREEZE_DOES_NOT_WAIT (two): nobody looks whether a write is under way
 * Mutant FREEZE_NOT_JOURNALLED (two): a successor lets writes begin
 * Mutant WRITES_NOT_JOURNALLED (two): a successor does not know that a write is under way
 * Mutant NOT_MARKED_AT_END (two): a write is marked before it is made alone
 * Mutant STRUCK_OUT_BEFORE_MARKED (two): the journal has no write any more, and the page no mark yet
 * Mutant DEAD_WRITER_NOT_MARKED (two): what a writer wrote before it was killed is in no log
 */

/* --- shared memory ------------------------------------------------------------------------------------------------ */

bool slot, pending, synced;             /* the page's bit in the slot bitmap, and in the client's two */
bool noted[WRITERS], noted_frozen;      /* in the journal: HostWrites.held, Lease.frozen */

/* --- in the coordinator's own memory ------------------------------------------------------------------------------- */

bool held[WRITERS], frozen;

/* --- what the property is about ------------------------------------------------------------------------------------ */

bool stale;                             /* the page was written after the client copied it */
bool copied;                            /* for the last time */

#if WRITERS != 2
#error "two writers are spelt out below"
#endif
#define WRITING (held[0] || held[1])    /* the answer to freeze; DirtyLog.open_writes */

/* The coordinator is killed: its successor adopts what the journal says (HostWrites.adopt). */
#define killed() \
    held[0] = noted[0]; held[1] = noted[1]; frozen = noted_frozen; \
    if :: WRITING -> slot = true :: else fi

/* It may be killed here, within a verb; whoever asked for that asks its successor again. */
#define step(name, again) if :: true :: killed(); goto again fi

/* vmm.client.holds.host_write */
proctype writer(byte w)
{
end_begin:
    atomic {                                            /* table._mark, HostWrites.begin */
#ifndef MUTANT_BEGUN_WHEN_FROZEN
        !frozen ->                                      /* Leases.require: refused until then */
#endif
        slot = true; step(marked, end_begin);
        held[w] = true;
#ifndef MUTANT_WRITES_NOT_JOURNALLED
        noted[w] = true;
#endif
        step(write_begun, end_begin)
    }
    do                                                  /* bytes are written, one after the other */
    :: atomic { !stale -> assert(!copied); stale = true }
    :: assert(!copied); break
    :: goto dead          /* host-write-begun, host-write-made */
    od;
end:
    atomic {                                            /* HostWrites.end */
        if
        :: held[w] ->
#if defined(MUTANT_NOT_MARKED_AT_END)
           held[w] = false; noted[w] = false
#elif defined(MUTANT_STRUCK_OUT_BEFORE_MARKED)
           held[w] = false; noted[w] = false; step(struck_out, end);
           slot = true
#else
           held[w] = false; slot = true; step(write_ended, end);
           noted[w] = false; step(noted, end)
#endif
        :: else
        fi
    }
    goto end_begin;
dead:
    atomic {                                            /* HostWrites._gone, by whichever coordinator sees it */
        if
        :: held[w] ->
#ifndef MUTANT_DEAD_WRITER_NOT_MARKED
           slot = true; step(marked, dead);
#endif
           held[w] = false; noted[w] = false
        :: else
        fi;
        goto end_begin                     /* another one */
    }
}

/* The coordinator is killed between two verbs. */
active proctype killer()
{
    do :: atomic { killed() } od
}

/* A migration: rounds, then the last copy of a frozen machine. */
active proctype source()
{
    bool again, last;
    atomic { run writer(0); run writer(1) };
    do
    :: last -> break
    :: !last ->
       if
       :: true                                          /* a round while the machine runs */
       :: true ->                                       /* Lease.freeze: asked until no write is under way */
freeze:
          atomic {
              frozen = true; step(frozen, freeze);
#ifndef MUTANT_FREEZE_NOT_JOURNALLED
              noted_frozen = true; step(freeze_noted, freeze);
#endif
#ifdef MUTANT_FREEZE_DOES_NOT_WAIT
              last = true
#else
              if :: WRITING -> goto freeze :: else -> last = true fi
#endif
          }
       fi;
sync:
       atomic {                                         /* Clients.sync, DirtyLog.take */
           if :: WRITING -> slot = true :: else fi;
           if :: again -> pending = pending || synced :: else fi;
           again = true;                                /* what a client asks with, should no answer come */
           synced = slot || pending; step(taken, sync);
           pending = false; step(taken, sync);
           slot = false; step(sync_taken, sync);
           again = false
       }
       atomic { stale = stale && !synced }              /* it copies the page */
    od;
    atomic { copied = true; assert(!stale) }
}
