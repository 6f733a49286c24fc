//! Clustering of one layer in one level and top down: multiply-adds of the assignments, seconds and memory of `index_layer` (the
//! peak above what the capture takes; Linux) and recall, on made-up keys:
//! `cargo bench --bench kmeans -- [PREFIXxHEAD_DIM ...] [--heads N] [--threads N]`.

use std::time::Instant;

use ggml_squeeze::build::{index_layer, sample, Settings};

/// A line of /proc/self/status, in MiB.
fn memory(name: &str) -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':')).unwrap_or_default();
    line.trim().trim_end_matches(" kB").parse::<f64>().map_or(f64::NAN, |kib| kib / 1024.0)
}

/// Takes the peak of resident memory back to what is resident now; returns that, in MiB.
fn reset_peak() -> f64 {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
    memory("VmRSS")
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let option = |name: &str| args.iter().position(|a| a == name).and_then(|i| args.get(i + 1)?.parse::<usize>().ok());
    let n_head_kv = option("--heads").unwrap_or(1);
    let mut settings = Settings::default();
    settings.n_threads = option("--threads").unwrap_or(settings.n_threads);
    let mut shapes: Vec<(usize, usize)> = args
        .iter()
        .filter_map(|a| a.split_once('x'))
        .filter_map(|(p, d)| Some((p.parse().ok()?, d.parse().ok()?)))
        .collect();
    if shapes.is_empty() {
        shapes = [8192, 32768, 131072].iter().flat_map(|&p| [64, 128].map(|d| (p, d))).collect();
    }
    println!("{n_head_kv} KV head(s), {} threads", settings.n_threads);
    println!("| prefix | head size | clusters | coarse | G multiply-adds | seconds | MiB | recall at 0.1 | at 0.2 |");
    println!("|---|---|---|---|---|---|---|---|---|");
    for (n_prefix, dim) in shapes {
        let capture = sample::prefix(n_prefix, settings.n_window as usize, n_head_kv, 4, dim, 1);
        let n_coarse = ((n_prefix as f64).sqrt() as u32).min(n_prefix as u32 / 40);
        for n_coarse in [0, n_coarse] {
            let settings = Settings { n_coarse: Some(n_coarse), ..settings.clone() };
            let before = reset_peak();
            let start = Instant::now();
            let made = index_layer(&capture, &settings, &|_| ()).expect("the capture is well formed");
            let (seconds, peak) = (start.elapsed().as_secs_f64(), memory("VmHWM") - before);
            let (view, scores) = (made.parts.view(), &made.scores);
            let recall = [0.1, 0.2].map(|budget| 100.0 * sample::recall(&view, scores, &capture, budget)[0]);
            println!(
                "| {n_prefix} | {dim} | {} | {n_coarse} | {:.1} | {seconds:.2} | {peak:.0} | {:.2} | {:.2} |",
                view.shape.n_cluster,
                made.products as f64 / 1e9,
                recall[0],
                recall[1],
            );
        }
    }
}
