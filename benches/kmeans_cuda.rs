//! Clustering of a whole model on an NVIDIA GPU, layer by layer, of made-up keys in a cache in its memory, and the recall beside
//! that of the CPU's clusters:
//! `cargo bench --bench kmeans_cuda -- [LAYERSxKV_HEADS@PREFIX ...] [recall=PREFIXxHEAD_DIM ...]`. A table, then one JSON object per line.
//!
//! Seconds: on the GPU (with the host's part between its two levels), results to the host, window scores on the CPU (32 query heads). The
//! floor: multiply-adds at the rate of a large matrix product and bytes at that of a large copy, both measured on an H100, one after the
//! other: keys are read once per comparison and once per mean.

use std::sync::Arc;
use std::time::Instant;

use ggml_squeeze::attention::cuda::{Buffer, Device};
use ggml_squeeze::attention::Array;
use ggml_squeeze::build::cuda::{Clusterer, DeviceLayer};
use ggml_squeeze::build::{index_layer, sample, window_scores, LayerCapture, Settings};

const DIM: usize = 128;
const N_HEAD: usize = 32;
/// Multiply-adds and bytes of a second on an H100.
const RATE: f64 = 798e12 / 2.0;
const BANDWIDTH: f64 = 3.0e12;

/// K and V on the GPU, a cell after the other.
fn upload(device: &Arc<Device>, capture: &LayerCapture) -> [(Buffer, Array); 2] {
    let n_prefix = capture.k.len() / capture.row_k();
    [(&capture.k, capture.head_dim_k), (&capture.v, capture.head_dim_v)].map(|(data, d)| {
        let (d, heads) = (d as usize, capture.n_head_kv as usize);
        let buffer = Buffer::of(device, "a bench", data).expect("memory");
        let nb = [2, 2 * d * heads, 2 * d, 2 * d * heads * n_prefix];
        let array = Array { data: buffer.address() as *mut u8, ne: [d, n_prefix, heads, 1], nb };
        (buffer, array)
    })
}

fn cells(capture: &LayerCapture) -> Vec<u32> {
    (0..(capture.k.len() / capture.row_k()) as u32).collect()
}

/// Milliseconds, rounded for print.
fn round(seconds: f64) -> f64 {
    (seconds * 1e4).round() / 1e4
}

fn whole_model(device: &Arc<Device>, n_layer: u32, heads: usize, n_prefix: usize) -> String {
    let settings = Settings::default();
    let capture = sample::prefix(n_prefix, settings.n_window as usize, heads, N_HEAD / heads, DIM, 1);
    let [k, v] = upload(device, &capture);
    let mut clusterer = Clusterer::new(device, &cells(&capture), &settings).expect("settings");
    let pool = rayon::ThreadPoolBuilder::new().num_threads(settings.n_threads).build().expect("threads");
    // The same keys in every layer, clustered from another start. The first time, memory is got and kernels are loaded.
    let mut layer = |number: u32| {
        let of = DeviceLayer {
            layer: number,
            n_group: capture.n_group,
            scale: capture.scale,
            k: k.1,
            v: v.1,
            q: &capture.q,
        };
        // SAFETY: the cache lives, and its copies are done.
        unsafe { clusterer.cluster(&of, &|_| ()) }.expect("a well-formed cache")
    };
    layer(n_layer);
    let (mut all, mut copying, mut scoring, mut products, mut out) = (0.0, 0.0, 0.0, 0u64, 0);
    for number in 0..n_layer {
        let start = Instant::now();
        let made = layer(number);
        all += start.elapsed().as_secs_f64();
        copying += made.copying.as_secs_f64();
        products += made.products;
        let p = &made.parts;
        out += 2 * (p.centroids.len() + p.mean_values.len()) + p.variances.len();
        out +=
            4 * (p.variance_scales.len() + p.radii.len() + p.offsets.len() + p.members.len() + p.coarse_offsets.len());
        let start = Instant::now();
        let scores = pool.install(|| window_scores(&p.view(), &capture.k, settings.n_sink as usize, &capture.q));
        scoring += start.elapsed().as_secs_f64();
        assert_eq!(scores.n_clustered as usize, p.members.len() / heads);
    }
    let hierarchy = n_prefix > 16500;
    // Unit keys are read to compare and to take the mean; raw ones to be made unit, and twice for the summary; values twice.
    let rounds = settings.iterations as usize + if hierarchy { 4 } else { 0 };
    let bytes = n_layer as f64 * (heads * n_prefix * 2 * DIM) as f64 * (2 * rounds - 1 + 2 + 4) as f64;
    let (compute, memory) = (products as f64 / RATE, bytes / BANDWIDTH);
    let gpu = all - copying;
    println!(
        "| {n_layer} x {heads} | {n_prefix} | {gpu:.3} | {copying:.3} | {all:.3} | {scoring:.2} | {:.1} | {:.2} | {:.0} % | {:.0} | {:.2} |",
        2e-12 * products as f64,
        1e-12 * bytes,
        100.0 * (compute + memory) / gpu,
        clusterer_mib(&clusterer),
        1e-9 * out as f64,
    );
    format!(
        "{{\"layers\":{n_layer},\"kv_heads\":{heads},\"head_dim\":{DIM},\"prefix\":{n_prefix},\"gpu_s\":{},\"copy_s\":{},\"clustering_s\":{},\
         \"scores_s\":{},\"tflop\":{},\"tbyte\":{},\"floor_s\":{},\"device_mib\":{},\"result_gb\":{}}}",
        round(gpu),
        round(copying),
        round(all),
        round(scoring),
        round(2e-12 * products as f64),
        round(1e-12 * bytes),
        round(compute + memory),
        clusterer_mib(&clusterer).round(),
        round(1e-9 * out as f64),
    )
}

fn clusterer_mib(clusterer: &Clusterer) -> f64 {
    clusterer.bytes() as f64 / (1 << 20) as f64
}

fn recall(device: &Arc<Device>, n_prefix: usize, dim: usize) -> String {
    let settings = Settings::default();
    let heads = 4;
    let capture = sample::prefix(n_prefix, settings.n_window as usize, heads, 4, dim, 1);
    let [k, v] = upload(device, &capture);
    let mut clusterer = Clusterer::new(device, &cells(&capture), &settings).expect("settings");
    let layer = DeviceLayer { layer: 0, n_group: 4, scale: capture.scale, k: k.1, v: v.1, q: &capture.q };
    // SAFETY: the cache lives, and its copies are done.
    let gpu = unsafe { clusterer.index_layer(&layer, &capture.k, &|_| ()) }.expect("a well-formed cache");
    let cpu = index_layer(&capture, &settings, &|_| ()).expect("a well-formed capture");
    let of =
        |budget: f32| [&cpu, &gpu].map(|b| 100.0 * sample::recall(&b.parts.view(), &b.scores, &capture, budget)[0]);
    let [[cpu_10, gpu_10], [cpu_20, gpu_20]] = [of(0.1), of(0.2)];
    let products = [cpu.products, gpu.products].map(|p| 1e-9 * p as f64 / heads as f64);
    println!(
        "| {n_prefix} | {dim} | {cpu_10:.2} | {gpu_10:.2} | {cpu_20:.2} | {gpu_20:.2} | {:.1} | {:.1} |",
        products[0], products[1]
    );
    format!(
        "{{\"prefix\":{n_prefix},\"head_dim\":{dim},\"recall_0.1\":[{},{}],\"recall_0.2\":[{},{}]}}",
        round(cpu_10),
        round(gpu_10),
        round(cpu_20),
        round(gpu_20),
    )
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let models: Vec<(u32, usize, usize)> = args
        .iter()
        .filter_map(|a| {
            let (shape, prefix) = a.split_once('@')?;
            let (layers, heads) = shape.split_once('x')?;
            Some((layers.parse().ok()?, heads.parse().ok()?, prefix.parse().ok()?))
        })
        .collect();
    let models = if args.is_empty() {
        [8, 32].into_iter().flat_map(|heads| [32768, 131072].map(|p| (32, heads, p))).collect()
    } else {
        models
    };
    let recalls: Vec<(usize, usize)> = args
        .iter()
        .filter_map(|a| a.strip_prefix("recall=")?.split_once('x'))
        .filter_map(|(p, d)| Some((p.parse().ok()?, d.parse().ok()?)))
        .collect();
    let device = match Device::new(0) {
        Ok(device) => device,
        Err(error) => return println!("skipped: {error}"),
    };
    println!("{}, {} threads", device.name(), Settings::default().n_threads);
    let mut lines = Vec::new();
    if !models.is_empty() {
        println!("| layers x KV heads | prefix | GPU s | copy s | clustering s | scores s | TFLOP | TB | floor | device MiB | result GB |");
        println!("|---|---|---|---|---|---|---|---|---|---|---|");
        lines.extend(models.iter().map(|(n_layer, heads, prefix)| whole_model(&device, *n_layer, *heads, *prefix)));
    }
    if !recalls.is_empty() {
        println!("| prefix | head size | CPU at 0.1 | GPU | CPU at 0.2 | GPU | CPU G multiply-adds per head | GPU |");
        println!("|---|---|---|---|---|---|---|---|");
        lines.extend(recalls.iter().map(|(prefix, dim)| recall(&device, *prefix, *dim)));
    }
    lines.iter().for_each(|line| println!("{line}"));
}
