/*
 * Who carries out the reset of a ring: the worker's reset thread, which sleeps, or its vCPU, which looks at the request
 * while its ring is full and comes and goes as it likes. docs/models/README.md says which function each step is.
 *
 * Nobody may sleep through a request. A request that nobody will ever see leaves the coordinator waiting, with nothing
 * else that can happen: spin calls that an invalid end state. Waits have no end here, so no look-around hides it.
 *
 * Stores may stay in the store buffer of their processor until a fence, as on x86; here, of the two stores that are
 * followed by a load of what the other side stores. Requests are unlimited, and so are kills of the coordinator.
 *
 * Check one: -DFULLS=3 -DKICKS=2
 *
 * Mutant NO_FENCE_AT_ASKING (one): the coordinator looks who looks before its request can be seen
 * Mutant NO_FENCE_AT_LEAVING (one): the vCPU looks for the last time before it can be seen that it stops looking
 * Mutant NOT_LOOKED_AGAIN (one): the vCPU stops looking, and does not look for the last time
 * Mutant LOWERED_LAST (one): the vCPU looks for the last time, and then says that it stops
 * Mutant WOKEN_BEFORE_ASKED (one): the coordinator wakes whoever sleeps, and then asks
 * Mutant VCPU_ALONE_IS_WOKEN (one): the reset thread is never woken
 */

/* --- the control block -------------------------------------------------------------------------------------------- */

bool request;                           /* reset_request is not reset_done */
bool awaits;                            /* awaits_reset */

/* --- store buffers: what another processor cannot see yet ---------------------------------------------------------- */

bool asking;                            /* request = true, of the coordinator's */
bool leaving;                           /* awaits = false, of the vCPU's */

#define FENCE(buffer) !buffer

/* --- who sleeps in the kernel, on the word of the request ---------------------------------------------------------- */

bool thread_sleeps, vcpu_sleeps;

byte kicks;

/* FUTEX_WAIT: the kernel compares and sleeps in one step. */
#define SLEEP(who) atomic { !request -> who = true }; !who

/* Resets.carry_out: under a lock, so by one of the two. */
#define CARRY_OUT atomic { request -> request = false }

active proctype processors()
{
end_processors:
    do
    :: atomic { asking -> request = true; asking = false }
    :: atomic { leaving -> awaits = false; leaving = false }
    od
}

active proctype coordinator()
{
    bool looks;
    do
    :: /* ask_reset */
#ifdef MUTANT_WOKEN_BEFORE_ASKED
       atomic { if :: awaits -> vcpu_sleeps = false :: else -> thread_sleeps = false fi };
       asking = true; FENCE(asking)
#else
       asking = true;
#ifndef MUTANT_NO_FENCE_AT_ASKING
       FENCE(asking);
#endif
       looks = awaits;
       if
       :: true                          /* asked */
       :: goto dead
       fi;
       FENCE(asking);                   /* a system call */
       if
       :: looks -> vcpu_sleeps = false
#ifdef MUTANT_VCPU_ALONE_IS_WOKEN
       :: else
#else
       :: else -> thread_sleeps = false
#endif
       fi;
       looks = false
#endif
       ;
       !request && !asking;             /* await_reset */
dead:  looks = false                    /* its successor asks anew */
    od
}

active proctype reset_thread()
{
    do
    :: CARRY_OUT
    :: SLEEP(thread_sleeps)
    od
}

active proctype vcpu()
{
    byte fulls;
end_guest:
    do
    :: fulls < FULLS ->                 /* wait_for_reset; else it stays in the guest for good */
       fulls++;
       awaits = true; FENCE(leaving);   /* begin_looking */
       do
       :: CARRY_OUT; break
       :: SLEEP(vcpu_sleeps)            /* look */
       :: kicks < KICKS -> kicks++; break
       od;
       /* end_looking */
#ifdef MUTANT_LOWERED_LAST
       if :: request -> thread_sleeps = false :: else fi;
       leaving = true; FENCE(leaving)
#else
       leaving = true;
#ifndef MUTANT_NO_FENCE_AT_LEAVING
       FENCE(leaving);
#endif
#ifndef MUTANT_NOT_LOOKED_AGAIN
       if :: request -> FENCE(leaving); thread_sleeps = false :: else fi
#endif
#endif
    od
}
