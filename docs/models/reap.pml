/*
 * The dirty log, from a vCPU's store to a client's sync, under a coordinator that is killed between any two steps,
 * any number of times. docs/models/README.md says which function each step is, and what is not modelled.
 *
 * There is one slot. A bitmap is a mask with one bit per page; each page stands for a word of its own, so a bitmap is
 * copied page by page and may be torn in between. Nothing that grows is counted: stores, reaps, syncs and kills are
 * unlimited.
 *
 * What must hold: `stale[c]` has the pages whose contents client c has not copied yet. What was stale when the flush
 * of a sync began must be in what the sync gives. A client copies at the moment of the answer, the earliest there is;
 * copying later can only find more.
 *
 * Check one:     -DVCPUS=1 -DPAGES=1 -DRING=2 -DSOFT=1 -DCLIENTS=1 -DFAILS
 * Check entries: -DVCPUS=1 -DPAGES=2 -DRING=3 -DSOFT=2 -DCLIENTS=1
 * Check clients: -DVCPUS=1 -DPAGES=1 -DRING=2 -DSOFT=1 -DCLIENTS=2
 * Check vcpus:   -DVCPUS=2 -DPAGES=1 -DRING=2 -DSOFT=1 -DCLIENTS=1
 * Check burst:   -DVCPUS=1 -DPAGES=2 -DRING=1 -DSOFT=1 -DCLIENTS=1 -DBURST
 *
 * Mutant KICK_NOT_HEEDED (one): a kick is acknowledged from within the guest
 * Mutant KICK_NOT_AWAITED (one): the flush does not wait until the vCPUs have left the guest
 * Mutant RESET_WITHOUT_HARVEST (entries): the reset frees entries that were not harvested, and does not count them
 * Mutant FLAGGED_BEFORE_STAGED (one): an entry is RESET before its bit is in staging
 * Mutant FETCHED_BEFORE_STAGED (one): the fetch index, too, is ahead of staging
 * Mutant CLEARED_FIRST (one): staging is cleared before the slot bitmap has its bits
 * Mutant PUBLISHED_BEFORE_RESET (one): a client sees a page that is not protected again yet
 * Mutant COUNT_NOT_COMPARED (burst): a count that does not match is ignored
 * Mutant MARKED_AFTER_REBUILD (burst): the ring is replaced before all is marked
 * Mutant OVERFLOWED_RING_IS_RESET (burst): the totals of a ring that has lost entries are made to match
 * Mutant TAKE_OVER_WITHOUT_REAP (one): a successor publishes what its predecessor had not reset
 * Mutant AGAIN_NOT_HEEDED (one): what a lost answer had taken is not given again
 * Mutant FOLDED_INTO_ONE_CLIENT (clients): the other one never hears of it
 */

#define ALL         ((1 << PAGES) - 1)
#define BIT(p)      (1 << (p))
#define TOTALS      (3 * RING)          /* totals go round here, far enough for a difference to be what it is */
#define MINUS(a, b) ((a + TOTALS - b) % TOTALS)

#define NOBODY 255
#define FREE  0                         /* an entry's flags: DIRTY_GFN_F_* */
#define DIRTY 1
#define RESET 2

/* --- shared memory: what a coordinator that dies leaves behind ---------------------------------------------- */

typedef Shared {                        /* a vCPU's ring and control block */
    byte flags[RING], page[RING];
    byte fetch_total;                   /* the coordinator's */
    byte reset_total;                   /* the worker's */
    bool asked, done;                   /* the reset thread has not read the last reset_request; it equals reset_done */
    bool kick;                          /* kick_request is not kick_ack */
    bool pause                          /* request & PAUSE */
}
Shared vcpu[VCPUS];
byte staging, slot;                     /* log<slot>: a staging bitmap, the slot bitmap */
byte pending[CLIENTS], synced[CLIENTS]; /* client.<client> */

/* --- the worker, and KVM in it -------------------------------------------------------------------------------- */

typedef Kvm {
    byte logged;                        /* pages that can be written without a fault: each has its entry */
    byte pml;                           /* those whose entry is in the processor still (page modification log) */
    byte dirty_index, reset_index
}
Kvm kvm[VCPUS];

/* --- what the property is about --------------------------------------------------------------------------------- */

byte stale[CLIENTS];                    /* pages written since client c copied them */
byte must[CLIENTS];                     /* what was stale when the flush of its sync began */
bool asks[CLIENTS];                     /* it waits for the answer to a sync */
bool again[CLIENTS];                    /* and asks again, because a coordinator died (the verb's `again`) */

#ifdef BURST                            /* KVM emulates: the soft-full check does not run within a batch */
#define ROOM(v) true
#else                                   /* what the processor may log before it leaves the guest fits into the reserve */
#define ROOM(v) !kvm[v].pml
#endif

#define FAULT(v, p) atomic { !(kvm[v].logged & BIT(p)) && ROOM(v) -> \
                             kvm[v].logged = kvm[v].logged | BIT(p); kvm[v].pml = kvm[v].pml | BIT(p) }
#if CLIENTS == 1
#define STORE(v, p) atomic { (kvm[v].logged & BIT(p)) && !(stale[0] & BIT(p)) -> stale[0] = stale[0] | BIT(p) }
#else
#define STORE(v, p) atomic { (kvm[v].logged & BIT(p)) && !(stale[0] & stale[1] & BIT(p)) -> \
                             stale[0] = stale[0] | BIT(p); stale[1] = stale[1] | BIT(p) }
#endif

#ifdef MUTANT_RESET_WITHOUT_HARVEST
#define RESETTABLE(flags) (flags != FREE)
#else
#define RESETTABLE(flags) (flags == RESET)
#endif

/* The vCPU thread, and KVM_RUN in it. A store is two steps, as in KVM: the fault logs the page and makes it writable,
 * then the instruction is tried again. A page that was protected again in between faults once more. */
proctype vcpu_thread(byte v)
{
    byte p;
outside:
    do
    :: atomic { vcpu[v].kick -> vcpu[v].kick = false }              /* _attend: acknowledged, then request is read */
    :: atomic { !vcpu[v].kick && !vcpu[v].pause &&                  /* ring-full is that this entry is refused */
                MINUS(kvm[v].dirty_index, kvm[v].reset_index) < SOFT -> goto inside }
    od;
inside:
    do
    :: FAULT(v, 0)
    :: STORE(v, 0)
#if PAGES > 1
    :: FAULT(v, 1)
    :: STORE(v, 1)
#endif
#if PAGES > 2
    :: FAULT(v, 2)
    :: STORE(v, 2)
#endif
#ifdef MUTANT_KICK_NOT_HEEDED                                       /* acknowledged from within the guest */
    :: atomic { vcpu[v].kick -> vcpu[v].kick = false }
#endif
    :: atomic { kvm[v].pml || vcpu[v].kick ->                       /* an exit: a kick, a full buffer, anything else */
                do                                                  /* kvm_dirty_ring_push: what was in the buffer */
                :: p < PAGES && (kvm[v].pml & BIT(p)) ->
                   vcpu[v].flags[kvm[v].dirty_index % RING] = DIRTY;
                   vcpu[v].page[kvm[v].dirty_index % RING] = p;
                   kvm[v].dirty_index = (kvm[v].dirty_index + 1) % TOTALS;
                   kvm[v].pml = kvm[v].pml & ~BIT(p)
                :: p < PAGES && !(kvm[v].pml & BIT(p)) -> p++
                :: p == PAGES -> break
                od;
                p = 0; goto outside }
    od
}

/* The reset thread (workers/resets.py): it runs whatever the vCPU does. */
proctype reset_thread(byte v)
{
    byte count, protect;
    do
    :: atomic { vcpu[v].asked -> vcpu[v].asked = false };           /* ResetRequests.wait */
       do                                                           /* KVM_RESET_DIRTY_RINGS: frees entries first */
       :: d_step { RESETTABLE(vcpu[v].flags[kvm[v].reset_index % RING]) ->
                   count = count + (vcpu[v].flags[kvm[v].reset_index % RING] == RESET -> 1 : 0);
                   vcpu[v].flags[kvm[v].reset_index % RING] = FREE;
                   protect = protect | BIT(vcpu[v].page[kvm[v].reset_index % RING]);
                   vcpu[v].page[kvm[v].reset_index % RING] = 0;
                   kvm[v].reset_index = (kvm[v].reset_index + 1) % TOTALS }
       :: !RESETTABLE(vcpu[v].flags[kvm[v].reset_index % RING]) -> break
#ifdef FAILS
       :: break                                                     /* it fails, or falls short */
#endif
       od;
       atomic { kvm[v].logged = kvm[v].logged & ~protect; protect = 0 };    /* and protects their pages then */
       atomic {
           if
           :: vcpu[v].reset_total = (vcpu[v].reset_total + count) % TOTALS
#ifdef FAILS
           :: count                                                 /* it failed: what it did is not counted */
#endif
           fi;
           count = 0;
           if :: !vcpu[v].asked -> vcpu[v].done = true :: else fi   /* ResetRequests.answer */
       }
    od
}

/* --- the coordinator -------------------------------------------------------------------------------------------- */

/* It may be killed here. Names that ipc/steps.py has too mean the same there.
 *
 * The bitmaps and `fetch_total` are touched by coordinators alone. What is done to them, up to the next thing that
 * others see, is therefore one `atomic` below: it keeps vCPUs and reset threads from being interleaved with what
 * they cannot see, and nothing else. A kill is possible between any two actions within it. */
#define step(name) if :: true :: goto dead fi

/* A bit goes from one bitmap to another: it is set where it is to be, then cleared where it was. */
#ifdef MUTANT_CLEARED_FIRST
#define MOVE(from, to, name) from = from & ~BIT(p); step(name); to = to | BIT(p); step(name)
#else
#define MOVE(from, to, name) to = to | BIT(p); step(name); from = from & ~BIT(p); step(name)
#endif

/* All four totals go back by a ring at once: only their differences and their places in the ring are looked at. */
#define ROUND(v) \
    d_step { \
        if \
        :: vcpu[v].fetch_total >= RING -> \
           vcpu[v].fetch_total = MINUS(vcpu[v].fetch_total, RING); vcpu[v].reset_total = MINUS(vcpu[v].reset_total, RING); \
           kvm[v].dirty_index = MINUS(kvm[v].dirty_index, RING); kvm[v].reset_index = MINUS(kvm[v].reset_index, RING) \
        :: else \
        fi \
    }

#define OUTSTANDING(v) MINUS(vcpu[v].fetch_total, vcpu[v].reset_total)
#define AT(v)          ((vcpu[v].fetch_total + count) % RING)
#define EACH_VCPU      v : 0 .. VCPUS - 1
#define LOWEST(bits)   (((bits) & 1) -> 0 : (((bits) & 2) -> 1 : 2))
#define EACH_PAGE      p : 0 .. PAGES - 1

inline kick_all()                               /* VcpuPool.kick_all */
{
    atomic { for (EACH_VCPU) { vcpu[v].kick = true } }
#ifndef MUTANT_KICK_NOT_AWAITED
    atomic { for (EACH_VCPU) { !vcpu[v].kick }; v = 0 }
#endif
    v = 0
}

inline harvest()                                /* RingReader.harvest: of vcpu[v] */
{
    atomic { limit = (OUTSTANDING(v) > RING -> (OUTSTANDING(v) > 3 * RING / 2 -> RING : 0) : RING - OUTSTANDING(v)) };
    do
    :: atomic { count < limit && vcpu[v].flags[AT(v)] == RESET -> count++ }     /* of one that died in between */
    :: atomic {
           count < limit && vcpu[v].flags[AT(v)] == DIRTY -> harvested = paused;
#if defined(MUTANT_FLAGGED_BEFORE_STAGED)
           vcpu[v].flags[AT(v)] = RESET; step(flagged);
           staging = staging | BIT(vcpu[v].page[AT(v)]); step(staged);
#elif defined(MUTANT_FETCHED_BEFORE_STAGED)
           vcpu[v].flags[AT(v)] = RESET; vcpu[v].fetch_total = (vcpu[v].fetch_total + 1) % TOTALS; step(fetched);
           count = RING - 1;                    /* the one before, and this one has been counted */
           staging = staging | BIT(vcpu[v].page[AT(v)]); step(staged);
           count = 255; limit--;
#else
           staging = staging | BIT(vcpu[v].page[AT(v)]); step(staged);
           vcpu[v].flags[AT(v)] = RESET; step(flagged);
#endif
           count++
       }
    :: atomic { count == limit || vcpu[v].flags[AT(v)] == FREE -> break }
    od;
    atomic {
        if :: count == limit -> overflowed = overflowed | BIT(v) :: else fi;
        vcpu[v].fetch_total = (vcpu[v].fetch_total + count) % TOTALS; step(harvested);
        count = 0; limit = 0
    }
}

inline ask_reset()                              /* RingReader.ask_reset: of vcpu[v] */
{
    atomic {
        if
#ifdef MUTANT_OVERFLOWED_RING_IS_RESET
        :: OUTSTANDING(v) ->
#else
        :: OUTSTANDING(v) && !(overflowed & BIT(v)) ->
#endif
           vcpu[v].asked = true; vcpu[v].done = false; step(asked)
        :: else
        fi
    }
}

inline rebuild_ring()                           /* VcpuPool.rebuild_ring: asks a worker whose vCPU stands still */
{
    d_step {
        kvm[v].logged = 0; kvm[v].dirty_index = 0; kvm[v].reset_index = 0; vcpu[v].reset_total = 0;
        for (p : 0 .. RING - 1) { vcpu[v].flags[p] = FREE; vcpu[v].page[p] = 0 }
        p = 0
    }
    step(rebuilt);
    vcpu[v].fetch_total = 0; overflowed = overflowed & ~BIT(v); step(lost_count_rebuilt)
}

inline lost_count()                             /* Reaper._lost_count: invariant 3 */
{
    atomic { vcpu[v].pause = true; vcpu[v].kick = true };
    atomic {
        !vcpu[v].kick -> step(lost_count_seen);
#ifdef MUTANT_MARKED_AFTER_REBUILD
        rebuild_ring();
        slot = ALL; step(lost_count_marked);
#else
        slot = ALL; step(lost_count_marked);
        rebuild_ring();
#endif
        vcpu[v].pause = paused
    }
}

inline publish()                                /* DirtyLog.publish */
{
    atomic {
        for (EACH_VCPU) { assert(!OUTSTANDING(v)) }     /* invariant 2: what was harvested is protected again */
        v = 0;
        do
        :: staging -> p = LOWEST(staging); MOVE(staging, slot, published)
        :: else -> p = 0; break
        od
    }
}

inline reap()                                   /* Reaper.reap */
{
    do
    :: atomic { v < VCPUS -> skip }; harvest(); ask_reset(); v++
    :: atomic { v == VCPUS -> v = 0; break }
    od;
#ifdef MUTANT_PUBLISHED_BEFORE_RESET
    publish();
#endif
    atomic { for (EACH_VCPU) { vcpu[v].done }; v = 0 }      /* VcpuPool.await_resets */
    do
    :: v < VCPUS && (OUTSTANDING(v) || (overflowed & BIT(v))) ->
#ifdef MUTANT_COUNT_NOT_COMPARED
       vcpu[v].fetch_total = vcpu[v].reset_total; overflowed = overflowed & ~BIT(v)
#else
       lost_count()
#endif
    :: atomic { v < VCPUS && !(OUTSTANDING(v) || (overflowed & BIT(v))) -> v++ }
    :: atomic { v == VCPUS -> v = 0; break }
    od;
    publish();
    ROUND(0)
#if VCPUS == 2
    ; ROUND(1)
#endif
}

inline take()                                   /* DirtyLog.take */
{
    atomic {
#ifndef MUTANT_AGAIN_NOT_HEEDED
        if :: again[c] -> pending[c] = pending[c] | synced[c]; step(sync_again) :: else fi;
#endif
#if CLIENTS == 1
        for (EACH_PAGE) {                       /* ipc.compiled.loops._take: there is no other client */
            synced[0] = (synced[0] & ~BIT(p)) | ((slot | pending[0]) & BIT(p)); step(taken);
            pending[0] = pending[0] & ~BIT(p); step(taken);
            slot = slot & ~BIT(p); step(sync_slot)
        }
#else
        for (EACH_PAGE) {                       /* DirtyLog._fold */
#ifndef MUTANT_FOLDED_INTO_ONE_CLIENT
            pending[1 - c] = pending[1 - c] | (slot & BIT(p)); step(fold_client);
#endif
            pending[c] = pending[c] | (slot & BIT(p)); step(fold_client)
        }
        for (EACH_PAGE) { slot = slot & ~BIT(p); step(cleared) }
        for (EACH_PAGE) { synced[c] = synced[c] & ~BIT(p); step(cleared) }      /* DirtyLog._take_pending */
        for (EACH_PAGE) { if :: pending[c] & BIT(p) -> MOVE(pending[c], synced[c], taken) :: else fi }
#endif
        p = 0
    }
}

inline answer()                                 /* and the client copies these pages */
{
    d_step {
        assert(!(must[c] & ~synced[c]));
        stale[c] = stale[c] & ~synced[c];
        synced[c] = 0;                          /* it stays, in truth; that a client is told twice does no harm */
        must[c] = 0; asks[c] = false; again[c] = false; c = NOBODY
    }
}

active proctype coordinator()
{
    byte v, p, count, limit, bits;
    byte c = NOBODY;                            /* whose sync it is */
    byte overflowed;                            /* RingReader.overflowed, of each vCPU */
    bool harvested, paused;

    atomic {
        for (EACH_VCPU) { vcpu[v].done = true; run vcpu_thread(v); run reset_thread(v) }
        v = 0
    }
serve:                                          /* Coordinator.run */
    if
    :: atomic { !asks[0] -> asks[0] = true; goto serve }            /* a client wants a sync */
    :: atomic { asks[0] -> c = 0; must[0] = stale[0] }; kick_all()  /* Reaper.flush */
#if CLIENTS == 2
    :: atomic { !asks[1] -> asks[1] = true; goto serve }
    :: atomic { asks[1] -> c = 1; must[1] = stale[1] }; kick_all()
#endif
    :: true                                     /* the reaper's time has come: Reaper.wake */
    fi;
reaping:
    reap();
    if
    :: atomic { paused && harvested -> harvested = false; goto reaping }     /* Reaper.drain_rings: until a pass finds nothing */
    :: paused && !harvested ->
       atomic { for (EACH_VCPU) { vcpu[v].pause = false }; v = 0; paused = false }  /* VcpuPool.resume_all */
    :: !paused && c != NOBODY -> take(); answer()                   /* Clients.sync */
    :: !paused && c == NOBODY
    fi;
    harvested = false;
    goto serve;
dead:
    skip;
    d_step {                                    /* what it had in its own memory is gone; who waits asks again */
        v = 0; p = 0; c = NOBODY; count = 0; limit = 0; bits = 0; overflowed = 0; harvested = false;
        again[0] = asks[0]; must[0] = 0;
#if CLIENTS == 2
        again[1] = asks[1]; must[1] = 0;
#endif
        paused = true
    }
    /* takeover.take_over, by its successor, which may die as well */
    atomic { for (EACH_VCPU) { vcpu[v].pause = true } }             /* VcpuPool.pause_all */
    kick_all();
#ifdef MUTANT_TAKE_OVER_WITHOUT_REAP
    harvested = false;
    publish();
    atomic { for (EACH_VCPU) { vcpu[v].pause = false }; v = 0; paused = false };
    goto serve
#else
    goto reaping
#endif
}
