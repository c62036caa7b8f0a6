// Timers of timer_create: what they send and to whom, how long is left, what is refused.
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static long make(int clock, struct sigevent *event, int *timer) { return syscall(SYS_timer_create, clock, event, timer); }

static long set(int timer, int flags, long value, long interval, struct itimerspec *old)
{
    struct itimerspec new = {{interval / 1000, interval % 1000 * 1000000}, {value / 1000, value % 1000 * 1000000}};
    return syscall(SYS_timer_settime, timer, flags, &new, old);
}

static void show(const char *what, long result) { printf("%s: %ld %s\n", what, result, result < 0 ? strerror(errno) : ""); }

static void await(sigset_t *set, const char *what)
{
    siginfo_t info;
    int got = sigwaitinfo(set, &info);
    printf("%s: signal %d code %d timer %d value %d\n", what, got, info.si_code, info.si_timerid, info.si_value.sival_int);
}

static volatile int handled;
static void *work(void *argument)
{
    *(pid_t *)argument = gettid();
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR2);
    await(&set, "in the thread");
    return 0;
}

static void handler(int number, siginfo_t *info, void *context) { handled += info->si_code == SI_TIMER; }

int main(void)
{
    sigset_t all, one;
    sigemptyset(&all);
    sigaddset(&all, SIGALRM), sigaddset(&all, SIGUSR2), sigaddset(&all, SIGRTMIN);
    sigprocmask(SIG_BLOCK, &all, 0);
    int timers[4];
    struct itimerspec old;
    struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN, .sigev_value.sival_int = 7};
    show("usual", make(CLOCK_MONOTONIC, 0, &timers[0]));
    show("with a value", make(CLOCK_REALTIME, &event, &timers[1]));
    printf("%d %d\n", timers[0], timers[1]);
    show("set", set(timers[0], 0, 20, 0, &old));
    await(&all, "usual");
    show("set", set(timers[1], 0, 30, 0, 0));
    await(&all, "with a value");
    syscall(SYS_timer_gettime, timers[1], &old);
    printf("then %ld %ld\n", old.it_value.tv_sec, old.it_value.tv_nsec);
    set(timers[0], 0, 100000, 3000, 0);
    show("set again", set(timers[0], 0, 50000, 2500, &old));
    printf("before: %d, every %ld.%ld\n", old.it_value.tv_sec >= 99 && old.it_value.tv_sec < 101, old.it_interval.tv_sec, old.it_interval.tv_nsec);
    syscall(SYS_timer_gettime, timers[0], &old);
    printf("left: %d, every %ld.%ld\n", old.it_value.tv_sec >= 48 && old.it_value.tv_sec <= 50, old.it_interval.tv_sec, old.it_interval.tv_nsec);
    show("off", set(timers[0], 0, 0, 2500, 0));
    syscall(SYS_timer_gettime, timers[0], &old);
    printf("off: %ld %ld %ld\n", old.it_value.tv_sec, old.it_value.tv_nsec, old.it_interval.tv_sec);
    show("in the past", set(timers[1], TIMER_ABSTIME, 1000, 0, 0));
    await(&all, "in the past");
    show("since long ago, every 5 ms", set(timers[1], TIMER_ABSTIME, 1000, 5, 0));
    siginfo_t many;
    printf("signal %d, often over %d\n", sigwaitinfo(&all, &many) == SIGRTMIN, many.si_overrun > 1000);
    set(timers[1], 0, 0, 0, 0);
    while (sigtimedwait(&all, 0, &(struct timespec){0}) > 0)
        ;
    show("every 5 ms", set(timers[1], 0, 5, 5, 0));
    for (int i = 0; i < 3; i++)
        await(&all, "again");
    struct timespec pause = {0, 60000000};
    nanosleep(&pause, 0);
    await(&all, "late");
    printf("overrun %d\n", syscall(SYS_timer_getoverrun, timers[1]) >= 5);
    show("delete", syscall(SYS_timer_delete, timers[1]));
    show("delete", syscall(SYS_timer_delete, timers[1]));
    show("set", set(timers[1], 0, 1, 0, 0));
    show("overrun", syscall(SYS_timer_getoverrun, 77));
    event.sigev_signo = 65, show("signal 65", make(CLOCK_MONOTONIC, &event, &timers[2]));
    event.sigev_signo = 0, show("signal 0", make(CLOCK_MONOTONIC, &event, &timers[2]));
    event.sigev_notify = 9, event.sigev_signo = SIGUSR1, show("notify 9", make(CLOCK_MONOTONIC, &event, &timers[2]));
    event.sigev_notify = SIGEV_THREAD_ID, event._sigev_un._tid = 1 << 20, show("no such thread", make(CLOCK_MONOTONIC, &event, &timers[2]));
    event.sigev_notify = SIGEV_NONE, show("silent", make(CLOCK_MONOTONIC, &event, &timers[2]));
    show("clock 77", make(77, 0, &timers[3]));
    show("nowhere", make(CLOCK_MONOTONIC, 0, (int *)8));
    set(timers[2], 0, 10, 0, 0), nanosleep(&pause, 0), syscall(SYS_timer_gettime, timers[2], &old);
    printf("silent: %ld %ld\n", old.it_value.tv_sec, old.it_value.tv_nsec);
    struct itimerspec wrong = {{0, 0}, {0, 1000000000}};
    show("wrong time", syscall(SYS_timer_settime, timers[0], 0, &wrong, 0));
    show("no time", syscall(SYS_timer_settime, timers[0], 0, 0, 0));
    pthread_t thread;
    volatile pid_t tid = 0;
    pthread_create(&thread, 0, work, (void *)&tid);
    while (!tid)
        usleep(1000);
    event = (struct sigevent){.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGUSR2, .sigev_value.sival_int = 3, ._sigev_un._tid = tid};
    show("of a thread", make(CLOCK_BOOTTIME, &event, &timers[3]));
    set(timers[3], 0, 10, 0, 0);
    pthread_join(thread, 0);
    struct sigaction action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO};
    sigaction(SIGALRM, &action, 0);
    // One more of the timer that was deleted may be pending by now.
    sigemptyset(&one), sigaddset(&one, SIGALRM);
    sigprocmask(SIG_UNBLOCK, &one, 0);
    set(timers[0], 0, 2, 2, 0);
    while (handled < 5)
        usleep(100000);
    printf("handled\n");
    return 0;
}
