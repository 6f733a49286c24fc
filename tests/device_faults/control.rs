//! Drivers of which calls fail on demand: built, put before the machine's own in a process of their own, and told what to do there.

// each program uses a part
#![allow(dead_code)]

use std::ffi::{c_char, c_int, c_void, CStr, CString};
use std::process::Command;

const VARIABLE: &str = "SQZ_MADE_UP_DRIVER";

/// A driver that is made up (driver.c), and the machine's own but for the calls that fail (forward.c).
pub const MADE_UP: &str = include_str!("driver.c");
pub const FORWARD: &str = include_str!("forward.c");

/// Runs a test of the calling program by itself, with the driver of this source; what it says.
///
/// # Panics
/// It fails.
pub fn run_with(source: &str, test: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    let (driver, file) = (folder.path().join("libcuda.so"), folder.path().join("driver.c"));
    std::fs::write(&file, source).unwrap();
    std::fs::write(folder.path().join("control.h"), include_str!("control.h")).unwrap();
    let mut cc = Command::new(std::env::var_os("CC").unwrap_or("cc".into()));
    cc.args(["-shared", "-fPIC", "-O1", "-Wall", "-Werror"]).arg(&file).arg("-o").arg(&driver);
    assert!(cc.status().unwrap().success());
    let before = std::env::var("LD_LIBRARY_PATH").unwrap_or_default();
    let path = format!("{}:{before}", folder.path().display());
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture", "--ignored", "--test-threads=1"]);
    let run = command.env("LD_LIBRARY_PATH", path).env(VARIABLE, &driver).output().unwrap();
    let out = String::from_utf8_lossy(&run.stdout).into_owned();
    print!("{out}");
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    out
}

/// The driver's own functions.
pub struct Driver {
    fail: extern "C" fn(c_int, c_int, c_int),
    calls: extern "C" fn() -> c_int,
    failed: extern "C" fn() -> *const c_char,
    library: *mut c_void,
}

impl Driver {
    /// The one that this process was started with; none: it was started by hand.
    pub fn of_process() -> Option<Driver> {
        let path = CString::new(std::env::var(VARIABLE).ok()?).unwrap();
        // SAFETY: the library that the test has built; it stays loaded. Functions of these types, in control.h.
        unsafe {
            let library = libc::dlopen(path.as_ptr(), libc::RTLD_NOW);
            assert!(!library.is_null());
            Some(Driver {
                fail: find(library, c"made_up_fail"),
                calls: find(library, c"made_up_calls"),
                failed: find(library, c"made_up_failed"),
                library,
            })
        }
    }

    /// Call number `at` from now on fails with this code, and with `on` all behind it do too. Zeros: none.
    pub fn fail(&self, at: c_int, code: c_int, on: bool) {
        (self.fail)(at, code, c_int::from(on));
    }

    /// Calls since then.
    pub fn calls(&self) -> c_int {
        (self.calls)()
    }

    /// The function whose call failed last.
    pub fn failed(&self) -> &'static str {
        // SAFETY: a name in the library.
        unsafe { CStr::from_ptr((self.failed)()) }.to_str().unwrap()
    }

    /// What was made and not given back, of the driver that is made up.
    pub fn live(&self) -> c_int {
        // SAFETY: the function in driver.c.
        let live: extern "C" fn() -> c_int = unsafe { find(self.library, c"made_up_live") };
        live()
    }
}

/// # Safety
/// `library` is loaded, and what it has by this name is a function of type `F`.
unsafe fn find<F: Copy>(library: *mut c_void, name: &CStr) -> F {
    // SAFETY: the contract.
    unsafe {
        let found = libc::dlsym(library, name.as_ptr());
        assert!(!found.is_null(), "{name:?}");
        std::mem::transmute_copy(&found)
    }
}
