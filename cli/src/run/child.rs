//! The program as our child: signals to it, its end from it. Everything runs on one thread, so that no signal can go to a
//! number that another process has got meanwhile.

use std::io;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Child, Command, ExitStatus};
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use rustix::process::{getpid, getppid, kill_process, set_parent_process_death_signal, Pid, Signal};
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1};
use signal_hook::iterator::exfiltrator::WithOrigin;
use signal_hook::iterator::SignalsInfo;

use super::status;

/// A child with our signals already caught.
pub struct Running {
    child: Child,
    signals: SignalsInfo<WithOrigin>,
}

fn forwarded(signal: i32) -> Option<Signal> {
    match signal {
        SIGINT => Some(Signal::INT),
        SIGTERM => Some(Signal::TERM),
        SIGHUP => Some(Signal::HUP),
        SIGQUIT => Some(Signal::QUIT),
        _ => None,
    }
}

/// Starts it. It is told to end (SIGTERM) should this process die without a chance to say so.
///
/// # Errors
/// The program cannot be started.
pub fn start(mut command: Command) -> Result<Running> {
    // before the start: a child that ends at once must not be missed
    let signals = SignalsInfo::<WithOrigin>::new([SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1, SIGCHLD])
        .context("cannot catch signals")?;
    let parent = getpid();
    let in_child = move || -> io::Result<()> {
        set_parent_process_death_signal(Some(Signal::TERM))?;
        // the parent may be gone already
        if getppid() != Some(parent) {
            return Err(io::Error::other("sqz run has ended"));
        }
        Ok(())
    };
    // SAFETY: two system calls and nothing else: neither allocates or takes a lock.
    unsafe { command.pre_exec(in_child) };
    let name = Path::new(command.get_program()).display().to_string();
    let child = command
        .spawn()
        .with_context(|| format!("cannot start {name}: give the path of a llama.cpp program behind --"))?;
    Ok(Running { child, signals })
}

impl Running {
    /// Waits for its end; meanwhile passes signals on, and prints the plugin's status on SIGUSR1 and every `interval`.
    ///
    /// # Errors
    /// The system does not tell of the child.
    pub fn wait(mut self, status_file: &Path, interval: Option<Duration>) -> Result<ExitStatus> {
        let (end, ended) = mpsc::channel::<()>();
        let pid = Pid::from_child(&self.child);
        std::thread::scope(|scope| {
            if let Some(interval) = interval {
                scope.spawn(move || {
                    while let Err(mpsc::RecvTimeoutError::Timeout) = ended.recv_timeout(interval) {
                        eprintln!("{}", status::line(status_file));
                    }
                });
            }
            let _end = end;
            for info in self.signals.forever() {
                match forwarded(info.signal) {
                    None if info.signal == SIGUSR1 => eprintln!("{}", status::line(status_file)),
                    None => {}
                    // the terminal has sent it to the child too: twice would be a second Ctrl-C
                    Some(_) if info.process.is_none() => {}
                    // it may have ended: then there is nobody to tell
                    Some(signal) => drop(kill_process(pid, signal)),
                }
                if let Some(status) = self.child.try_wait().context("cannot wait for the program")? {
                    return Ok(status);
                }
            }
            self.child.wait().context("cannot wait for the program")
        })
    }
}

/// What this process ends with: the child's code, or 128 and the signal that ended it.
pub fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|s| 128 + s)).unwrap_or(1);
    u8::try_from(code).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_and_signals_become_exit_codes() {
        for (raw, code) in [(0, 0), (3 << 8, 3), (255 << 8, 255), (15, 143), (9, 137)] {
            assert_eq!(exit_code(ExitStatus::from_raw(raw)), code);
        }
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = start(Command::new("/no/such/llama-server")).err().unwrap();
        assert!(format!("{error:#}").contains("/no/such/llama-server"), "{error:#}");
    }
}
