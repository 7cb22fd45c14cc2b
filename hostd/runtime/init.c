/* The first process of a job's pid namespace: `init -- PROGRAM ARGUMENT...`, as tini does it.
 *
 * Runs PROGRAM (found by PATH) in a process group of its own, in the foreground of the terminal if there is one, with
 * the signals as they were; passes every signal on to it, reaps all that is left to the first process, and ends as
 * PROGRAM ends: its status, or 128 and the signal. What cannot be executed is said on stderr, and ends with 126 or 127.
 *
 * Why not tini: a C library looks the processor over at every start (cpuid), and each look is an exit of the virtual
 * machine; that, and copying tini's page tables for the child, were a tenth of a job's start. Here is no library and
 * no memory but the stack, and the child is a vfork. `init.py` has what gcc makes of this, and says how.
 */
#if defined __x86_64__
enum { WRITE = 1, SIGACTION = 13, SIGPROCMASK = 14, IOCTL = 16, GETPID = 39, CLONE = 56, EXECVE = 59, WAIT4 = 61, KILL = 62,
       SETPGID = 109, SIGTIMEDWAIT = 128, EXIT_GROUP = 231 };
static inline long call(long number, long a, long b, long c, long d) {
    register long fourth __asm__("r10") = d;
    __asm__ volatile("syscall" : "+a"(number) : "D"(a), "S"(b), "d"(c), "r"(fourth) : "rcx", "r11", "memory");
    return number;
}
__asm__(".globl _start\n_start: xor %ebp, %ebp\n mov %rsp, %rdi\n and $-16, %rsp\n call begin\n");
#else
#error "jobs have tini on this machine"
#endif

enum { SETMASK = 2, NOHANG = 1, TIOCSPGRP = 0x5410, VM_AND_VFORK = 0x4100, BUFFER_BYTES = 4096 };
enum { ILL = 4, TRAP = 5, ABRT = 6, BUS = 7, FPE = 8, SEGV = 11, CHLD = 17, TTIN = 21, TTOU = 22, SYS = 31 };
enum { NOENT = -2, NOEXEC = -8, ACCES = -13, NOTDIR = -20 };
#define BIT(signal) (1ul << ((signal) - 1))

static void say(const char *text) {
    unsigned long length = 0;
    while (text[length]) length++;
    call(WRITE, 2, (long)text, length, 0);
}

/* Execute the program as execvp(3) would: what is no executable format is a script of the shell's. */
static long try(const char *path, char **args, char **env) {
    long error = call(EXECVE, (long)path, (long)args, (long)env, 0);
    if (error != NOEXEC) return error;
    char *name = args[0];
    args[0] = (char *)path;
    args[-1] = "/bin/sh"; /* over the "--", or what is before it: nobody reads it any more */
    error = call(EXECVE, (long)args[-1], (long)(args - 1), (long)env, 0);
    args[0] = name;
    return error;
}

static long execute(char **args, char **env) {
    char path[BUFFER_BYTES];
    const char *folders = "";
    for (char *at = args[0]; *at; at++)
        if (*at == '/') return try(args[0], args, env);
    for (char **at = env; *at; at++) {
        const char *text = *at;
        if (text[0] == 'P' && text[1] == 'A' && text[2] == 'T' && text[3] == 'H' && text[4] == '=') {
            folders = text + 5;
            break;
        }
    }
    for (long found = NOENT;; folders++) {
        unsigned long length = 0;
        for (; *folders && *folders != ':'; folders++)
            if (length < BUFFER_BYTES) path[length++] = *folders;
        if (length && length < BUFFER_BYTES) path[length++] = '/';
        for (char *at = args[0]; length < BUFFER_BYTES && (path[length++] = *at); at++) {}
        if (path[length - 1] == 0) { /* else it did not fit */
            long error = try(path, args, env);
            if (error == ACCES) found = ACCES;
            else if (error != NOENT && error != NOTDIR) return error;
        }
        if (!*folders) return found;
    }
}

static long run(char **args, char **env) {
    long error = execute(args, env);
    say("exec: \"");
    say(args[0]);
    say(error == NOENT ? "\": no such file or directory, or its interpreter\n"
        : error == ACCES ? "\": permission denied\n" : "\": it cannot be executed\n");
    return error == NOENT ? 127 : 126;
}

__attribute__((noreturn, used)) void begin(long *stack) {
    char **args = (char **)(stack + 1), **env = args + stack[0] + 1;
    /* All but those that the processor raises in this very process. */
    unsigned long caught = ~(BIT(ILL) | BIT(TRAP) | BIT(ABRT) | BIT(BUS) | BIT(FPE) | BIT(SEGV) | BIT(SYS)), before;
    long none[4] = {0, 0, 0, 0};
    int status = 0, is_over = 0, code = 0;
    if (stack[0] < 3) call(EXIT_GROUP, 0, 0, 0, 0);
    call(SIGACTION, CHLD, (long)none, 0, 8); /* ignored, its end would tell nobody anything */
    call(SIGPROCMASK, SETMASK, (long)&caught, (long)&before, 8);
    long child = call(CLONE, VM_AND_VFORK | CHLD, 0, 0, 0);
    if (child == 0) { /* on the same stack, below all that is in use here, while we are held */
        int group = call(GETPID, 0, 0, 0, 0);
        call(SETPGID, 0, 0, 0, 0);
        call(IOCTL, 0, TIOCSPGRP, (long)&group, 0);
        call(SIGPROCMASK, SETMASK, (long)&before, 0, 8);
        call(EXIT_GROUP, run(args + 2, env), 0, 0, 0);
    }
    if (child < 0) {
        say("clone: refused\n");
        call(EXIT_GROUP, 126, 0, 0, 0);
    }
    while (!is_over) {
        long signal = call(SIGTIMEDWAIT, (long)&caught, 0, 0, 8);
        if (signal > 0 && signal != CHLD && signal != TTIN && signal != TTOU) call(KILL, child, signal, 0, 0);
        for (long ended; (ended = call(WAIT4, -1, (long)&status, NOHANG, 0)) > 0;) {
            if (ended != child) continue;
            is_over = 1;
            code = status & 0x7F ? 128 + (status & 0x7F) : status >> 8 & 0xFF;
        }
    }
    for (;;) call(EXIT_GROUP, code, 0, 0, 0);
}
