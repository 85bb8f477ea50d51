// ptrace(2) for User Mode Linux before 7.0 on a processor with AMX, loaded by LD_PRELOAD. Such a kernel keeps 2,696
// bytes of a process's vector registers. PTRACE_SETREGSET takes all of them or fails with EFAULT: with AMX 11,008.

#define _GNU_SOURCE
#include <elf.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

// Not on the stack: the kernel's stacks have 16 KiB. It has one processor, so one call at a time.
static char all[1 << 15];

long ptrace(enum __ptrace_request request, ...) {
    va_list arguments;
    va_start(arguments, request);
    int process = va_arg(arguments, int);
    void *address = va_arg(arguments, void *);
    void *data = va_arg(arguments, void *);
    va_end(arguments);

    // The system call stores the word that ptrace(3) returns.
    if (request == PTRACE_PEEKTEXT || request == PTRACE_PEEKDATA || request == PTRACE_PEEKUSER) {
        long word = -1;
        return syscall(SYS_ptrace, request, process, address, &word) < 0 ? -1 : word;
    }
    if (request == PTRACE_SETREGSET && address == (void *)NT_X86_XSTATE) {
        struct iovec whole = {all, sizeof all}, *kept = data;
        if (syscall(SYS_ptrace, PTRACE_GETREGSET, process, address, &whole) < 0)
            return -1;
        if (kept->iov_len <= whole.iov_len)
            memcpy(all, kept->iov_base, kept->iov_len);
        return syscall(SYS_ptrace, request, process, address, &whole);
    }
    return syscall(SYS_ptrace, request, process, address, data);
}
