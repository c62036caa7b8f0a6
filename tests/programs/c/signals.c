// Signals: handlers and what they see, restarting, alternate stacks, masks, real faults, children.
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

static volatile sig_atomic_t got, depth;
static siginfo_t seen;
static sigjmp_buf back;
static char *stack;

static void note(int number, siginfo_t *info, void *context)
{
    volatile double x = 3.25;       // the interrupted computation keeps its own registers
    x *= x;
    got = number;
    seen = *info;
}

static void catch(int number, void (*handler)(int, siginfo_t *, void *), int flags)
{
    struct sigaction action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO | flags};
    if (sigaction(number, &action, 0))
        perror("sigaction");
}

static void jump(int number, siginfo_t *info, void *context)
{
    seen = *info;
    siglongjmp(back, number);
}

static void on_stack(int number, siginfo_t *info, void *context)
{
    char here;
    printf("on the other stack: %d\n", &here > stack && &here < stack + 65536);
}

static void skip(int number, siginfo_t *info, void *context)
{
    ((ucontext_t *)context)->uc_mcontext.gregs[REG_RIP] += 2;     // ud2
    printf("illegal instruction %d\n", info->si_code);
}

static void nested(int number, siginfo_t *info, void *context)
{
    if (++depth < 3)
        raise(number);
}

static volatile int stop;
static void *spin(void *argument)
{
    while (!stop)
        ;
    return 0;
}

static void end(int number, siginfo_t *info, void *context) { stop = 1; }

int main(void)
{
    int status, result;
    double x = 1.5;

    catch(SIGUSR1, note, 0);
    raise(SIGUSR1);
    printf("%d code %d mine %d, %g\n", got, seen.si_code, seen.si_pid == getpid(), x * 2);

    catch(SIGALRM, note, 0);
    alarm(1);
    errno = 0;
    result = pause();
    printf("pause %d %s %d\n", result, strerror(errno), got);

    struct timespec time = {3, 0}, left = {0, 0};
    alarm(1);
    result = nanosleep(&time, &left);
    printf("sleep %d %s, left %d\n", result, strerror(errno), left.tv_sec >= 1);

    int pipes[2];
    char byte = 0;
    if (pipe(pipes))
        return 1;
    catch(SIGALRM, note, 0);
    alarm(1);
    result = read(pipes[0], &byte, 1);
    printf("read %d %s\n", result, strerror(errno));
    catch(SIGALRM, note, SA_RESTART);
    alarm(1);
    pid_t child = fork();
    if (!child) {
        usleep(1500000);
        write(pipes[1], "x", 1);
        _exit(0);
    }
    result = read(pipes[0], &byte, 1);
    printf("read again %d %c %d\n", result, byte, got);
    waitpid(child, &status, 0);

    sigset_t set, old;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR2);
    catch(SIGUSR2, note, 0);
    sigprocmask(SIG_BLOCK, &set, &old);
    raise(SIGUSR2);
    got = 0;
    sigpending(&set);
    printf("pending %d, not delivered %d\n", sigismember(&set, SIGUSR2), !got);
    sigemptyset(&set);
    errno = 0;
    result = sigsuspend(&set);
    printf("sigsuspend %d %s %d\n", result, strerror(errno), got);
    sigprocmask(SIG_SETMASK, &old, 0);

    stack = malloc(65536);
    stack_t old_stack, other = {.ss_sp = stack, .ss_size = 65536};
    sigaltstack(&other, 0);
    catch(SIGUSR1, on_stack, SA_ONSTACK);
    raise(SIGUSR1);

    catch(SIGUSR1, nested, SA_NODEFER);
    raise(SIGUSR1);
    printf("nested %d\n", depth);

    catch(SIGSEGV, jump, 0);
    char *page = mmap(0, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (!sigsetjmp(back, 1))
        *(volatile char *)page = 1;
    printf("segv code %d, the address %d\n", seen.si_code, seen.si_addr == page);
    munmap(page, 4096);
    if (!sigsetjmp(back, 1))
        *(volatile char *)page = 1;
    printf("segv code %d, the address %d\n", seen.si_code, seen.si_addr == page);
    catch(SIGFPE, jump, 0);
    volatile int zero = 0;
    if (!sigsetjmp(back, 1))
        result = 1 / zero;
    printf("fpe code %d\n", seen.si_code);
    catch(SIGILL, skip, 0);
    __asm__ volatile("ud2");

    struct sigaction is;
    catch(SIGUSR1, note, SA_RESETHAND | SA_RESTART | 0x400);
    raise(SIGUSR1);
    sigaction(SIGUSR1, 0, &is);
    printf("as before %d, flags %x\n", is.sa_handler == SIG_DFL, is.sa_flags);

    // No room for a frame.
    other.ss_sp = mmap(0, 65536, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    sigaltstack(&other, &old_stack);
    catch(SIGUSR1, note, SA_ONSTACK);
    catch(SIGSEGV, note, 0);
    x *= 3;
    raise(SIGUSR1);
    printf("instead of it %d code %d, %g\n", got, seen.si_code, x);
    fflush(stdout);
    child = fork();
    if (!child) {
        catch(SIGSEGV, note, SA_ONSTACK);
        raise(SIGUSR1);
        _exit(0);
    }
    waitpid(child, &status, 0);
    printf("killed %d by %d\n", WIFSIGNALED(status), WTERMSIG(status));
    sigaltstack(&old_stack, 0);

    pthread_t thread;
    catch(SIGUSR1, end, 0);
    pthread_create(&thread, 0, spin, 0);
    usleep(50000);
    pthread_kill(thread, SIGUSR1);      // out of the guest, in a loop without any system call
    pthread_join(thread, 0);
    printf("stopped %d\n", stop);

    struct itimerval interval = {{0, 20000}, {0, 20000}}, none = {{0, 0}, {0, 0}};
    static volatile sig_atomic_t ticks;
    catch(SIGALRM, note, 0);
    setitimer(ITIMER_REAL, &interval, 0);
    for (ticks = 0; ticks < 5; ticks++)
        pause();
    setitimer(ITIMER_REAL, &none, 0);
    printf("ticks %d\n", ticks);

    catch(SIGCHLD, note, SA_RESTART);
    child = fork();
    if (!child)
        _exit(7);
    waitpid(child, &status, 0);
    printf("child %d: signal %d code %d status %d\n", WEXITSTATUS(status), got, seen.si_code, seen.si_status);
    child = fork();
    if (!child) {
        signal(SIGTERM, SIG_DFL);
        for (;;)
            pause();
    }
    kill(child, SIGTERM);
    waitpid(child, &status, 0);
    printf("killed %d by %d\n", WIFSIGNALED(status), WTERMSIG(status));
    child = fork();
    if (!child) {
        raise(SIGSTOP);
        _exit(3);
    }
    waitpid(child, &status, WUNTRACED);
    printf("stopped %d by %d\n", WIFSTOPPED(status), WSTOPSIG(status));
    kill(child, SIGCONT);
    waitpid(child, &status, 0);
    printf("and ended with %d\n", WEXITSTATUS(status));
    fflush(stdout);
    signal(SIGSEGV, SIG_DFL);
    *(volatile int *)16 = 0;
    return 0;
}
