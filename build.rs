//! Links GCC's unwinder into the program, where the compiler has it, instead of loading libgcc_s.so.
//!
//! That library's constructor asks the processor what it can (`__cpu_indicator_init`): ten CPUID
//! instructions, each of which a hypervisor has to answer. Without it a proxy in a virtual machine
//! is a tenth quicker from execve(2) to its first client's answer.

use std::env;
use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=RUSTC_LINKER");
    let variable = |name| env::var(name).unwrap_or_default();
    if variable("CARGO_CFG_TARGET_ENV") != "gnu" {
        return;
    }
    let linker = match env::var("RUSTC_LINKER") {
        Ok(linker) => linker,
        Err(_) if variable("HOST") == variable("TARGET") => "cc".into(),
        Err(_) => return,
    };
    // Where there is none, the compiler repeats the name it was asked for.
    let answer = Command::new(linker).arg("-print-file-name=libgcc_eh.a").output();
    let answer = answer.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    let answer = answer.unwrap_or_default();
    if let Some(directory) = Path::new(answer.trim()).parent().filter(|it| it.is_absolute()) {
        println!("cargo:rustc-link-search=native={}", directory.display());
        println!("cargo:rustc-link-lib=static:-bundle=gcc_eh");
        println!("cargo:rustc-env=UNWINDER_IS_LINKED_IN=");
    }
}
