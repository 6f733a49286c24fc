//! Times the offline clustering of one layer: `cargo bench --bench kmeans -- [tokens] [kv heads] [head dim] [threads]`.
//! The defaults are SmolLM2-135M's shape at 6.5K tokens.

use std::time::Instant;

use ggml_squeeze::build::{index_layer, LayerCapture, Settings};
use half::f16;

fn main() {
    let numbers: Vec<usize> = std::env::args().filter_map(|a| a.parse().ok()).collect();
    let number = |i: usize, default: usize| numbers.get(i).copied().unwrap_or(default);
    let (n_prefix, n_head_kv, dim) = (number(0, 6542), number(1, 3), number(2, 64));
    let settings = Settings { n_threads: number(3, Settings::default().n_threads), ..Settings::default() };

    // Keys drift with the position, as real ones do; the random part keeps all iterations busy.
    let mut state = 1u32;
    let mut noise = || {
        state = state.wrapping_mul(1664525).wrapping_add(1013904223);
        (state >> 8) as f32 / (1u32 << 23) as f32 - 1.0
    };
    let mut row = |p: usize| -> Vec<f16> {
        let element = |i: usize| (p as f32 * 0.9f32.powi(i as i32 % 64)).sin() + noise();
        (0..n_head_kv * dim).map(element).map(f16::from_f32).collect()
    };
    let k: Vec<f16> = (0..n_prefix).flat_map(&mut row).collect();
    let v: Vec<f16> = (0..n_prefix).flat_map(&mut row).collect();
    let q: Vec<f32> = (0..settings.n_window as usize * 3).flat_map(&mut row).map(f16::to_f32).collect();
    let capture = LayerCapture {
        layer: 0,
        n_head_kv: n_head_kv as u32,
        n_group: 3,
        head_dim_k: dim as u32,
        head_dim_v: dim as u32,
        scale: 1.0 / (dim as f32).sqrt(),
        k,
        v,
        q,
    };
    for run in 1..=3 {
        let start = Instant::now();
        let (parts, _) = index_layer(&capture, &settings, &|_| ()).expect("the capture is well formed");
        let seconds = start.elapsed().as_secs_f64();
        let n = parts.members.len() as f64;
        let products = n * parts.shape.n_cluster as f64 * dim as f64 * settings.iterations as f64;
        println!(
            "run {run}: {} tokens x {} heads x {}, {} clusters, {} threads: {:.3} s, at most {:.1} GFMA/s",
            n_prefix,
            n_head_kv,
            dim,
            parts.shape.n_cluster,
            settings.n_threads,
            seconds,
            products / seconds / 1e9
        );
    }
}
