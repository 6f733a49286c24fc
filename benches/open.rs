//! What it costs to open an index: seconds, and memory of the process. `cargo bench --bench open [-- MiB]`

use std::path::Path;
use std::time::Instant;

use ggml_squeeze::index::sample::{add_coarse, sample_parts, touch};
use ggml_squeeze::index::{write, Index};

/// KiB of a line of /proc/self/status; 0 where there is none.
fn status(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
    line.trim_start_matches(':').trim().trim_end_matches(" kB").parse().unwrap_or(0)
}

/// Writes an index of a 32K prefix with 8 KV heads of 128, of about so many MiB.
fn make(path: &Path, mib: usize) -> u64 {
    let mut parts = sample_parts(1, 32768, mib.div_ceil(9), 8, 128, 128, 1638);
    add_coarse(&mut parts, 2, 327);
    write(path, &parts).expect("the folder has room")
}

fn main() {
    let mib = std::env::args().skip(1).find_map(|arg| arg.parse().ok()).unwrap_or(90);
    let folder = tempfile::tempdir().expect("a folder for temporary files");
    let path = folder.path().join("open.sqz.gguf");
    let bytes = make(&path, mib);
    println!("index of {:.1} MiB in the page cache", bytes as f64 / 1048576.0);
    for run in 0..5 {
        let (rss, anonymous) = (status("VmRSS"), status("RssAnon"));
        let begin = Instant::now();
        let index = Index::open(&path).expect("it was just written");
        let opened = begin.elapsed();
        let begin = Instant::now();
        std::hint::black_box(touch(&index));
        let read = begin.elapsed();
        println!(
            "run {run}: opened in {:.1} ms, read once in {:.1} ms; resident {:+} KiB, of it private {:+} KiB",
            1e3 * opened.as_secs_f64(),
            1e3 * read.as_secs_f64(),
            status("VmRSS").saturating_sub(rss),
            status("RssAnon").saturating_sub(anonymous),
        );
    }
}
