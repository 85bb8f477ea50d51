//! Syscall User Dispatch (Linux 5.11): the kernel sends SIGSYS for each system call of a thread while
//! a byte in its memory says so. The handler makes the call by [`Faults::call`].

use std::arch::global_asm;
use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::Once;

use crate::syscalls::Faults;

/// Runs a part of the program under these faults.
pub fn run<T>(faults: &mut Faults, part: impl FnOnce() -> T) -> T {
    dispatch_this_thread();
    CURRENT.set(faults);
    let _allow = AllowLater;
    SELECTOR.set(BLOCK);
    part()
}

/// Makes a system call as the kernel does, which returns less than 0 for an error.
///
/// # Safety
/// As for the call.
pub unsafe fn call(number: i64, arguments: [i64; 6]) -> i64 {
    // SAFETY: the caller's promise.
    unsafe { simulation_call(number, arguments.as_ptr()) }
}

/// Ends what [`run`] began, also when the program panics.
struct AllowLater;

impl Drop for AllowLater {
    fn drop(&mut self) {
        SELECTOR.set(ALLOW);
        CURRENT.set(ptr::null_mut());
    }
}

/// Has the kernel dispatch the calls of this thread, except for those of the handler.
fn dispatch_this_thread() {
    if DISPATCHED.with(|dispatched| dispatched.0.replace(true)) {
        return;
    }
    static HANDLER: Once = Once::new();
    HANDLER.call_once(|| {
        let flags = (libc::SA_SIGINFO | libc::SA_NODEFER | SA_RESTORER) as u64;
        let action = [on_call as *const () as u64, flags, simulation_return as *const () as u64, 0];
        let arguments = [libc::SIGSYS.into(), action.as_ptr() as i64, 0, 8, 0, 0];
        // SAFETY: the structure is the kernel's own for rt_sigaction(2).
        let result = unsafe { simulation_call(libc::SYS_rt_sigaction, arguments.as_ptr()) };
        assert_eq!(result, 0, "rt_sigaction");
    });
    let start = simulation_call as *const () as usize;
    let length = simulation_end as *const () as usize - start;
    // SAFETY: the selector lives until the thread ends, and is not read after `DISPATCHED` is dropped.
    let result = SELECTOR.with(|selector| unsafe {
        libc::prctl(PR_SET_SYSCALL_USER_DISPATCH, 1_usize, start, length, selector.as_ptr())
    });
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// Whether the kernel dispatches the calls of this thread.
struct Dispatched(Cell<bool>);

/// A detached thread of musl unmaps its stack and its thread-local memory before its last system
/// call, for which the kernel would read the selector.
impl Drop for Dispatched {
    fn drop(&mut self) {
        // SAFETY: this ends what `dispatch_this_thread` began, and touches no memory.
        let result = unsafe {
            libc::prctl(PR_SET_SYSCALL_USER_DISPATCH, 0_usize, 0_usize, 0_usize, 0_usize)
        };
        debug_assert_eq!(result, 0);
    }
}

extern "C" fn on_call(_signal: c_int, _info: *mut libc::siginfo_t, context: *mut c_void) {
    SELECTOR.set(ALLOW);
    // SAFETY: these are the registers of code in run() that is about to make a system call.
    unsafe {
        let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let at = |register: c_int| registers[register as usize];
        if [libc::SYS_clone, libc::SYS_clone3].contains(&at(libc::REG_RAX)) {
            // A new thread has a stack of its own, so the program makes this call itself. The rest
            // of its turn is not dispatched.
            registers[libc::REG_RIP as usize] -= 2;
            return;
        }
        let arguments = [
            at(libc::REG_RDI),
            at(libc::REG_RSI),
            at(libc::REG_RDX),
            at(libc::REG_R10),
            at(libc::REG_R8),
            at(libc::REG_R9),
        ];
        let result = (*CURRENT.get()).call(at(libc::REG_RAX), arguments);
        registers[libc::REG_RAX as usize] = result;
    }
    SELECTOR.set(BLOCK);
}

// The only two system calls that the kernel does not dispatch: that of the handler, and its return.
global_asm!(
    ".globl simulation_call, simulation_return, simulation_end",
    "simulation_call:",
    "mov rax, rdi",
    "mov r11, rsi",
    "mov rdi, [r11]",
    "mov rsi, [r11 + 8]",
    "mov rdx, [r11 + 16]",
    "mov r10, [r11 + 24]",
    "mov r8, [r11 + 32]",
    "mov r9, [r11 + 40]",
    "syscall",
    "ret",
    "simulation_return:",
    "mov eax, 15",
    "syscall",
    "ud2",
    "simulation_end:",
);

unsafe extern "C" {
    /// Makes a system call with six arguments.
    fn simulation_call(number: i64, arguments: *const i64) -> i64;
    fn simulation_return();
    fn simulation_end();
}

thread_local! {
    static SELECTOR: Cell<u8> = const { Cell::new(ALLOW) };
    static CURRENT: Cell<*mut Faults> = const { Cell::new(ptr::null_mut()) };
    static DISPATCHED: Dispatched = const { Dispatched(Cell::new(false)) };
}

const PR_SET_SYSCALL_USER_DISPATCH: c_int = 59;
const SA_RESTORER: c_int = 0x0400_0000;
const ALLOW: u8 = 0;
const BLOCK: u8 = 1;
