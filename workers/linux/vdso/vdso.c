/* Clocks that a program reads without a system call: the vDSO, as Linux's programs expect it (vdso(7)).

   The page in front of it has what is needed to make nanoseconds of the processor's time stamp counter. It is changed
   while programs run: its sequence is odd meanwhile, and another one afterwards. What cannot be had so is asked of
   the system. page.py has the other side. */

typedef unsigned int u32;
typedef unsigned long u64;

struct timespec { long seconds, nanoseconds; };
struct timeval { long seconds, microseconds; };
struct timezone { int minutes, dst; };

extern const volatile struct {
	u32 sequence;
	u32 mode;               /* 0: nothing else here holds */
	u64 tsc;                /* at which it was */
	u64 monotonic;          /* so late, */
	u64 realtime;           /* and that, in nanoseconds */
	u64 rate;               /* nanoseconds of one step of the counter, in units of 2^-32 */
} parameters __attribute__((visibility("hidden")));     /* vdso.ld */

enum { REALTIME = 0, MONOTONIC = 1, MONOTONIC_RAW = 4, REALTIME_COARSE = 5, MONOTONIC_COARSE = 6, BOOTTIME = 7 };
enum { SYS_GETTIMEOFDAY = 96, SYS_TIME = 201, SYS_CLOCK_GETTIME = 228, SYS_CLOCK_GETRES = 229, SYS_GETCPU = 309 };
enum { SECOND = 1000000000, TRIES = 1000 };

/* Of the clocks above, as bits: those that count from 1970, and the others. */
#define OF_DAY (1 << REALTIME | 1 << REALTIME_COARSE)
#define OF_MACHINE (1 << MONOTONIC | 1 << MONOTONIC_RAW | 1 << MONOTONIC_COARSE | 1 << BOOTTIME)

static inline long call(long number, long a, const void *b, const void *c)
{
	long result;
	__asm__ volatile("syscall" : "=a"(result) : "0"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
	return result;
}

/* After all loads before it, before all behind it. */
static inline u64 counter(void)
{
	u32 low, high;
	__asm__ volatile("lfence; rdtsc; lfence" : "=a"(low), "=d"(high) : : "memory");
	return (u64)high << 32 | low;
}

static inline int is_one_of(u32 clock, u32 clocks)
{
	return clock < 32 && clocks >> clock & 1;
}

/* 0 where the system must be asked. */
static inline int now(u32 clock, u64 *found)
{
	for (int tries = 0; tries < TRIES; tries++) {
		u32 sequence = parameters.sequence;
		if (sequence & 1) {
			__builtin_ia32_pause();
			continue;
		}
		if (!parameters.mode)
			return 0;
		u64 base = is_one_of(clock, OF_DAY) ? parameters.realtime : parameters.monotonic;
		u64 since = parameters.tsc, rate = parameters.rate, tsc = counter();
		u64 steps = tsc > since ? tsc - since : 0;      /* another processor's can be a little behind */
		if (parameters.sequence == sequence) {
			*found = base + (u64)((unsigned __int128)steps * rate >> 32);
			return 1;
		}
	}
	return 0;
}

int __vdso_clock_gettime(int clock, struct timespec *to)
{
	u64 found;
	if (!is_one_of(clock, OF_DAY | OF_MACHINE) || !now(clock, &found))
		return call(SYS_CLOCK_GETTIME, clock, to, 0);
	to->seconds = found / SECOND;
	to->nanoseconds = found % SECOND;
	return 0;
}

int __vdso_gettimeofday(struct timeval *to, struct timezone *zone)
{
	u64 found;
	if (!now(REALTIME, &found))
		return call(SYS_GETTIMEOFDAY, (long)to, zone, 0);
	if (to) {
		to->seconds = found / SECOND;
		to->microseconds = found % SECOND / 1000;
	}
	if (zone)
		zone->minutes = zone->dst = 0;
	return 0;
}

long __vdso_time(long *to)
{
	u64 found;
	if (!now(REALTIME, &found))
		return call(SYS_TIME, (long)to, 0, 0);
	found /= SECOND;
	if (to)
		*to = found;
	return found;
}

int __vdso_clock_getres(int clock, struct timespec *to)
{
	if (!is_one_of(clock, OF_DAY | OF_MACHINE))
		return call(SYS_CLOCK_GETRES, clock, to, 0);
	if (to) {
		to->seconds = 0;
		to->nanoseconds = 1;
	}
	return 0;
}

long __vdso_getcpu(u32 *cpu, u32 *node, void *cache)
{
	return call(SYS_GETCPU, (long)cpu, node, cache);
}

int clock_gettime(int, struct timespec *) __attribute__((weak, alias("__vdso_clock_gettime")));
int gettimeofday(struct timeval *, struct timezone *) __attribute__((weak, alias("__vdso_gettimeofday")));
long time(long *) __attribute__((weak, alias("__vdso_time")));
int clock_getres(int, struct timespec *) __attribute__((weak, alias("__vdso_clock_getres")));
long getcpu(u32 *, u32 *, void *) __attribute__((weak, alias("__vdso_getcpu")));
