//! systemd's own parsers, from the library that its programs share.
//!
//! The library is for systemd only, and its functions change between versions. These declarations
//! are those of [`LIBRARY`].

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::iter;
use std::ptr::{null, null_mut};
use std::sync::LazyLock;

use socket_proxyd::fuzzing::UnitReader;

/// Reads units as systemd does.
pub const UNITS: UnitReader =
    UnitReader { settings, exec_words, expanded, sockaddr: Some(socket_address), is_unit_name };

const LIBRARY: &CStr = c"/usr/lib/x86_64-linux-gnu/systemd/libsystemd-shared-252.so";

/// Returns the microseconds of a time span, or `None` if systemd refuses it.
pub fn time_span(text: &str) -> Option<u64> {
    let text = CString::new(text).ok()?;
    let mut micros = 0;
    // SAFETY: the text ends in NUL, and `micros` is a `usec_t`.
    let result = unsafe { (SYSTEMD.parse_sec)(text.as_ptr(), &mut micros) };
    (result >= 0).then_some(micros)
}

/// Returns a time span as systemd prints it.
pub fn printed_time_span(micros: u64) -> String {
    let mut text = [0_u8; 256];
    // SAFETY: the function writes at most so many bytes, with a NUL behind the text.
    unsafe { (SYSTEMD.format_timespan)(text.as_mut_ptr().cast(), text.len(), micros, 1) };
    CStr::from_bytes_until_nul(&text).unwrap().to_str().unwrap().into()
}

/// Returns a number that systemd's `safe_atou` reads.
pub fn number(text: &str) -> Option<u32> {
    let text = CString::new(text).ok()?;
    let mut number = 0;
    // SAFETY: the text ends in NUL, and `number` is an `unsigned`. A base of 0 is chosen by the
    // text.
    let result = unsafe { (SYSTEMD.safe_atou_full)(text.as_ptr(), 0, &mut number) };
    (result >= 0).then_some(number)
}

/// Whether a unit that is not a template can have this name.
fn is_unit_name(name: &str) -> bool {
    const UNIT_NAME_PLAIN_OR_INSTANCE: c_int = 1 | 4;
    let name = CString::new(name).unwrap();
    // SAFETY: the name ends in NUL.
    unsafe { (SYSTEMD.unit_name_is_valid)(name.as_ptr(), UNIT_NAME_PLAIN_OR_INSTANCE) }
}

/// Returns the bytes of the `sockaddr` that `ListenStream=` and `ListenDatagram=` mean by a value.
fn socket_address(value: &[u8]) -> Option<Vec<u8>> {
    let value = CString::new(value).ok()?;
    // A `SocketAddress`: the sockaddr, its size, the type and the protocol.
    #[repr(C, align(8))]
    struct SocketAddress {
        sockaddr: [u8; 128],
        size: u32,
        kind: c_int,
        protocol: c_int,
        reserve: [u8; 64],
    }
    let mut address =
        SocketAddress { sockaddr: [0; 128], size: 0, kind: 0, protocol: 0, reserve: [0; 64] };
    // SAFETY: the value ends in NUL, and there is room for a `SocketAddress`.
    let result =
        unsafe { (SYSTEMD.socket_address_parse)((&raw mut address).cast(), value.as_ptr()) };
    (result >= 0).then(|| address.sockaddr[..address.size as usize].into())
}

/// Returns the settings of a unit in their order, each a name and a value.
fn settings(unit: &str) -> Vec<(String, Vec<u8>)> {
    let mut settings: Vec<(String, Vec<u8>)> = Vec::new();
    // SAFETY: the stream reads the bytes of `unit`. systemd calls back with `settings`, within the
    // call.
    let result = unsafe {
        let file = libc::fmemopen(unit.as_ptr().cast_mut().cast(), unit.len(), c"r".as_ptr());
        assert!(!file.is_null());
        let data = (&raw mut settings).cast();
        let result = (SYSTEMD.config_parse)(
            null(),
            c"a unit".as_ptr(),
            file,
            null(),
            any_setting,
            null(),
            0,
            data,
            null_mut(),
        );
        libc::fclose(file);
        result
    };
    assert!(result >= 0, "systemd refuses the unit: {result}\n{unit}");
    settings
}

/// Returns a value with its specifiers replaced, each by a text that says so.
fn expanded(value: &[u8]) -> Vec<u8> {
    let value = CString::new(value).unwrap();
    // SAFETY: all of these end in NUL or in an empty entry.
    unsafe { taken(printed(value.as_ptr())) }
}

/// Returns the path of the program and the arguments that a command of `ExecStart=` is executed
/// with. Variables have a value.
///
/// The order is that of `config_parse_exec()` and `exec_child()`, which the library does not have.
fn exec_words(value: &[u8]) -> Vec<Vec<u8>> {
    const UNQUOTE_AND_UNESCAPE: c_int = 1 << 5 | 1 << 1;
    let value = CString::new(value).unwrap();
    let mut rest = value.as_ptr();
    let mut words: Vec<*mut c_char> = Vec::new();
    // SAFETY: `rest` points into `value`, which ends in NUL. systemd allocates each word.
    unsafe {
        loop {
            let bytes = CStr::from_ptr(rest).to_bytes();
            let is_blank = |at: usize| bytes.get(at).is_none_or(|it| b" \t\n\r".contains(it));
            assert!(!(bytes.starts_with(b";") && is_blank(1)), "another command begins");
            assert!(!(bytes.starts_with(b"\\;") && is_blank(2)), "a semicolon without quotes");
            let mut word = null_mut();
            let result =
                (SYSTEMD.extract_first_word)(&mut rest, &mut word, null(), UNQUOTE_AND_UNESCAPE);
            assert!(result >= 0, "systemd refuses the words {value:?}: {result}");
            if result == 0 {
                break;
            }
            words.push(printed(word));
            libc::free(word.cast());
            if rest.is_null() {
                break;
            }
        }
        assert!(!words.is_empty(), "a command has a program");
        words.push(null_mut());
        let variables = [c"HOME=<variable>".as_ptr(), c"A=<variable>".as_ptr(), null()];
        let replaced = (SYSTEMD.replace_env_argv)(words[1..].as_ptr(), variables.as_ptr());
        assert!(!replaced.is_null(), "systemd refuses the variables of {value:?}");
        words[1..].iter().for_each(|word| libc::free((*word).cast()));
        let count = (0..).find(|at| (*replaced.add(*at)).is_null()).unwrap();
        let arguments = (0..count).map(|at| taken(*replaced.add(at)));
        // systemd executes the path as it is, without its variables.
        let words = iter::once(taken(words[0])).chain(arguments).collect();
        libc::free(replaced.cast());
        words
    }
}

/// Returns the text with its specifiers replaced, to be freed.
unsafe fn printed(text: *const c_char) -> *mut c_char {
    let letters = (b'a'..=b'z').chain(b'A'..=b'Z');
    let entry = |letter| Specifier { letter, lookup: Some(specifier), data: null() };
    let end = Specifier { letter: 0, lookup: None, data: null() };
    let table: Vec<_> = letters.map(entry).chain([end]).collect();
    let mut printed = null_mut();
    // SAFETY: the table ends in an empty entry. The caller promises the NUL of the text.
    let result = unsafe {
        (SYSTEMD.specifier_printf)(text, 1 << 20, table.as_ptr(), null(), null(), &mut printed)
    };
    assert!(result >= 0, "systemd refuses the specifiers: {result}");
    printed
}

/// Copies a text that systemd has allocated, and frees it.
unsafe fn taken(text: *mut c_char) -> Vec<u8> {
    // SAFETY: the caller promises that the text ends in NUL, and that it owns the text.
    unsafe {
        let bytes = CStr::from_ptr(text).to_bytes().to_vec();
        libc::free(text.cast());
        bytes
    }
}

/// Stands for each specifier.
unsafe extern "C" fn specifier(
    _: c_char,
    _: *const c_void,
    _: *const c_char,
    _: *const c_void,
    text: *mut *mut c_char,
) -> c_int {
    // SAFETY: systemd passes a place for a text that it frees.
    unsafe { *text = libc::strdup(c"<specifier>".as_ptr()) };
    0
}

/// Has systemd call [`note`] for each setting.
unsafe extern "C" fn any_setting(
    _: *const c_void,
    _: *const c_char,
    _: *const c_char,
    call: *mut Option<ConfigParser>,
    kind: *mut c_int,
    data: *mut *mut c_void,
    user: *mut c_void,
) -> c_int {
    // SAFETY: systemd passes places for these three.
    unsafe {
        *call = Some(note);
        *kind = 0;
        *data = user;
    }
    1
}

/// Adds a setting to the vector that `data` points to.
unsafe extern "C" fn note(
    _unit: *const c_char,
    _file: *const c_char,
    _line: c_uint,
    _section: *const c_char,
    _section_line: c_uint,
    name: *const c_char,
    _kind: c_int,
    value: *const c_char,
    data: *mut c_void,
    _user: *mut c_void,
) -> c_int {
    // SAFETY: both texts end in NUL, and `data` is that of `settings()`.
    unsafe {
        let settings = &mut *data.cast::<Vec<(String, Vec<u8>)>>();
        let name = CStr::from_ptr(name).to_str().unwrap().into();
        settings.push((name, CStr::from_ptr(value).to_bytes().into()));
    }
    0
}

/// Declares the functions, and looks them up.
macro_rules! functions {
    ($($name:ident: fn($($argument:ty),*) -> $result:ty;)*) => {
        struct Systemd {
            $($name: unsafe extern "C" fn($($argument),*) -> $result,)*
        }

        static SYSTEMD: LazyLock<Systemd> = LazyLock::new(|| {
            // SAFETY: the library has no constructors of its own. Each symbol is looked up in the
            // version that has these types.
            unsafe {
                let library = libc::dlopen(LIBRARY.as_ptr(), libc::RTLD_NOW);
                assert!(!library.is_null(), "{LIBRARY:?} is missing: this target needs systemd 252");
                let set_level = libc::dlvsym(library, c"log_set_max_level".as_ptr(), VERSION.as_ptr());
                assert!(!set_level.is_null());
                // Messages of LOG_EMERG only.
                std::mem::transmute::<*mut c_void, unsafe extern "C" fn(c_int)>(set_level)(0);
                Systemd {
                    $($name: {
                        let name = CString::new(stringify!($name)).unwrap();
                        let symbol = libc::dlvsym(library, name.as_ptr(), VERSION.as_ptr());
                        assert!(!symbol.is_null(), "{LIBRARY:?} has no {name:?}");
                        std::mem::transmute::<
                            *mut c_void,
                            unsafe extern "C" fn($($argument),*) -> $result,
                        >(symbol)
                    },)*
                }
            }
        });
    };
}

const VERSION: &CStr = c"SD_SHARED";

functions! {
    parse_sec: fn(*const c_char, *mut u64) -> c_int;
    format_timespan: fn(*mut c_char, usize, u64, u64) -> *mut c_char;
    safe_atou_full: fn(*const c_char, c_uint, *mut c_uint) -> c_int;
    unit_name_is_valid: fn(*const c_char, c_int) -> bool;
    socket_address_parse: fn(*mut c_void, *const c_char) -> c_int;
    extract_first_word: fn(*mut *const c_char, *mut *mut c_char, *const c_char, c_int) -> c_int;
    replace_env_argv: fn(*const *mut c_char, *const *const c_char) -> *mut *mut c_char;
    specifier_printf: fn(
        *const c_char, usize, *const Specifier, *const c_char, *const c_void, *mut *mut c_char
    ) -> c_int;
    config_parse: fn(
        *const c_char, *const c_char, *mut libc::FILE, *const c_char, ConfigLookup,
        *const c_void, c_int, *mut c_void, *mut c_void
    ) -> c_int;
}

#[repr(C)]
struct Specifier {
    letter: u8,
    lookup: Option<SpecifierLookup>,
    data: *const c_void,
}

type SpecifierLookup = unsafe extern "C" fn(
    c_char,
    *const c_void,
    *const c_char,
    *const c_void,
    *mut *mut c_char,
) -> c_int;

type ConfigLookup = unsafe extern "C" fn(
    *const c_void,
    *const c_char,
    *const c_char,
    *mut Option<ConfigParser>,
    *mut c_int,
    *mut *mut c_void,
    *mut c_void,
) -> c_int;

type ConfigParser = unsafe extern "C" fn(
    *const c_char,
    *const c_char,
    c_uint,
    *const c_char,
    c_uint,
    *const c_char,
    c_int,
    *const c_char,
    *mut c_void,
    *mut c_void,
) -> c_int;
