//! `sqz inspect`: what an index holds, as tables or as JSON. Opening the file checks all of it, so this is also the way to
//! verify one.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::ops::Range;
use std::path::PathBuf;

use anyhow::{ensure, Context as _};
use ggml_squeeze::index::{Calibration, HeadShares, Index, IndexMeta, LayerView, MassTarget, FORMAT_VERSION};
use serde::Serialize;

use crate::llama;
use crate::plot;
use crate::verify::{self, Check};

#[derive(clap::Args, Clone, Debug)]
pub struct InspectArgs {
    /// Index to look at (.sqz.gguf); all of it is verified
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Print the same data as JSON
    #[arg(long)]
    pub json: bool,
    /// Also draw the index: what each layer and KV head keeps, cluster sizes, thresholds
    #[arg(long, value_name = "FILE.svg|.png")]
    pub plot: Option<PathBuf>,
    /// Say too whether the index fits a model; a status of 1 if not
    #[arg(long, requires = "model")]
    pub verify: bool,
    /// Model to compare with (GGUF)
    #[arg(short, long, value_name = "FILE", requires = "verify")]
    pub model: Option<PathBuf>,
}

/// Prints the index to stdout.
pub fn run(args: InspectArgs) -> anyhow::Result<()> {
    let index = Index::open(&args.file).with_context(|| format!("cannot inspect {}", args.file.display()))?;
    let fit = match &args.model {
        Some(model) => Some(verify::checks(index.meta(), &llama::Model::load(model)?)?),
        None => None,
    };
    if let Some(path) = &args.plot {
        plot::plot(&index, path)?;
    }
    let text = match args.json {
        true => render_json(&index, fit.as_deref())?,
        false => render(&index) + &fit.as_deref().map(verify::render).unwrap_or_default(),
    };
    match io::stdout().write_all(text.as_bytes()) {
        // `sqz inspect ... | head` is no failure.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => (),
        result => result.context("cannot write to stdout")?,
    }
    let wrong: Vec<&str> = fit.iter().flatten().filter(|c| !c.fits).map(|c| c.what).collect();
    ensure!(wrong.is_empty(), "{} does not fit the model: other {}", args.file.display(), wrong.join(", "));
    Ok(())
}

#[derive(Serialize)]
struct Report {
    file: Option<PathBuf>,
    format_version: u32,
    bytes: u64,
    model: Model,
    rope: Rope,
    prefix: Prefix,
    build: Build,
    sketch: Sketch,
    probes: Vec<Probe>,
    calibration: Vec<Row>,
    masses: Vec<Mass>,
    layers: Vec<Layer>,
    total: Total,
    dense_layers: Vec<Dense>,
    #[serde(skip_serializing_if = "Option::is_none")]
    fit: Option<Vec<Check>>,
}

#[derive(Serialize)]
struct Model {
    architecture: String,
    name: String,
    fingerprint: String,
    n_layer: u32,
}

#[derive(Serialize)]
struct Rope {
    r#type: i32,
    freq_base: f32,
    freq_scale: f32,
}

#[derive(Serialize)]
struct Prefix {
    tokens: usize,
    sinks: u32,
    clustered: usize,
    window: u32,
}

#[derive(Serialize)]
struct Build {
    builder: String,
    seed: u64,
    iterations: u32,
    cluster_share: f32,
    chat: String,
    cache_types: [String; 2],
}

#[derive(Serialize)]
struct Sketch {
    layer: u32,
    k_elements: usize,
    v_elements: usize,
    tolerance: f32,
}

#[derive(Serialize)]
struct Probe {
    layer: u32,
    tokens: Vec<u32>,
}

#[derive(Serialize)]
struct Row {
    budget: f32,
    threshold: f32,
    kept: f32,
    mass: f32,
}

/// A row of mass mode's table.
#[derive(Serialize)]
struct Mass {
    mass: f32,
    target: f32,
    kept: f32,
}

#[derive(Serialize)]
struct Layer {
    layer: u32,
    n_head_kv: u32,
    n_group: u32,
    head_dim_k: u32,
    head_dim_v: u32,
    scale: f32,
    clusters: u32,
    coarse: u32,
    /// Members per cluster, over all KV heads.
    size_mean: f64,
    size_p99: u32,
    size_max: u32,
    kept: Vec<Kept>,
    bytes: u64,
}

/// What one layer keeps at a nominal budget, mean over its KV heads and the window's queries.
#[derive(Serialize)]
struct Kept {
    budget: f32,
    /// Share of the keys at the budget's threshold.
    share: f32,
    /// Share of the attention mass at the threshold, and in budget mode.
    mass: f32,
    budget_mass: f32,
    /// The same of each KV head.
    heads: Vec<Head>,
}

#[derive(Serialize)]
struct Head {
    share: f32,
    mass: f32,
    budget_mass: f32,
}

#[derive(Serialize)]
struct Total {
    layers: usize,
    /// Clusters of all layers and KV heads.
    clusters: u64,
    layer_bytes: u64,
    /// Sketch, probes, metadata.
    other_bytes: u64,
    /// K and V of the prefix in these layers, in an F16 cache.
    cache_bytes: u64,
    /// The whole file as a share of that.
    cache_share: f64,
}

#[derive(Serialize)]
struct Dense {
    layer: u32,
    reason: String,
}

fn report(index: &Index) -> Report {
    let meta = index.meta();
    let sketch = index.sketch();
    let views = index.shapes().iter().filter_map(|shape| index.layer(shape.layer));
    let mut first = 0;
    let mut of = |view: LayerView| {
        let heads = first..first + view.shape.n_head_kv as usize;
        first = heads.end;
        layer(index, heads, &view)
    };
    let layers: Vec<Layer> = views.map(&mut of).collect();
    let layer_bytes = layers.iter().map(|l| l.bytes).sum();
    Report {
        file: index.path().map(|path| path.to_path_buf()),
        format_version: FORMAT_VERSION,
        bytes: index.file_bytes(),
        model: Model {
            architecture: meta.model.architecture.clone(),
            name: meta.model.name.clone(),
            fingerprint: meta.model.fingerprint.iter().map(|b| format!("{b:02x}")).collect(),
            n_layer: meta.n_layer,
        },
        rope: Rope { r#type: meta.rope.kind, freq_base: meta.rope.freq_base, freq_scale: meta.rope.freq_scale },
        prefix: Prefix {
            tokens: meta.n_prefix(),
            sinks: meta.n_sink,
            clustered: meta.n_clustered(),
            window: meta.n_window,
        },
        build: Build {
            builder: meta.build.builder.clone(),
            seed: meta.build.seed,
            iterations: meta.build.iterations,
            cluster_share: meta.build.cluster_share,
            chat: meta.build.chat.clone(),
            cache_types: meta.build.cache_types.clone(),
        },
        sketch: Sketch {
            layer: sketch.layer,
            k_elements: sketch.k_dims.len(),
            v_elements: sketch.v_dims.len(),
            tolerance: sketch.tolerance,
        },
        probes: index.probes().iter().map(|p| Probe { layer: p.layer, tokens: p.tokens.to_vec() }).collect(),
        calibration: meta
            .calibration
            .iter()
            .map(|c| Row { budget: c.budget, threshold: c.threshold, kept: c.kept, mass: c.mass })
            .collect(),
        masses: meta
            .mass_targets
            .iter()
            .map(|row| Mass { mass: row.mass, target: row.target, kept: row.kept })
            .collect(),
        total: Total {
            layers: layers.len(),
            clusters: layers.iter().map(|l| u64::from(l.clusters) * u64::from(l.n_head_kv)).sum(),
            layer_bytes,
            other_bytes: index.file_bytes() - layer_bytes,
            cache_bytes: index.cache_bytes(),
            cache_share: index.file_bytes() as f64 / index.cache_bytes() as f64,
        },
        layers,
        dense_layers: meta.dense_layers.iter().map(|(l, r)| Dense { layer: *l, reason: r.clone() }).collect(),
        fit: None,
    }
}

/// `among`: the place of its KV heads among all.
fn layer(index: &Index, among: Range<usize>, view: &LayerView) -> Layer {
    let shape = view.shape;
    let heads = 0..shape.n_head_kv as usize;
    let mut sizes: Vec<u32> =
        heads.flat_map(|head| view.head_offsets(head).windows(2).map(|run| run[1] - run[0])).collect();
    sizes.sort_unstable();
    let rank = (sizes.len() * 99).div_ceil(100);
    Layer {
        layer: shape.layer,
        n_head_kv: shape.n_head_kv,
        n_group: shape.n_group,
        head_dim_k: shape.head_dim_k,
        head_dim_v: shape.head_dim_v,
        scale: shape.scale,
        clusters: shape.n_cluster,
        coarse: shape.n_coarse,
        size_mean: view.n_clustered() as f64 / f64::from(shape.n_cluster),
        size_p99: sizes[rank - 1],
        size_max: sizes[sizes.len() - 1],
        kept: shown(&index.meta().calibration).iter().map(|row| kept(row.budget, &row.heads[among.clone()])).collect(),
        bytes: index.layer_bytes(shape.layer),
    }
}

fn kept(budget: f32, heads: &[HeadShares]) -> Kept {
    let mean = |of: fn(&HeadShares) -> f32| heads.iter().map(of).sum::<f32>() / heads.len() as f32;
    let head = |h: &HeadShares| Head { share: h.kept, mass: h.mass, budget_mass: h.budget_mass };
    Kept {
        budget,
        share: mean(|h| h.kept),
        mass: mean(|h| h.mass),
        budget_mass: mean(|h| h.budget_mass),
        heads: heads.iter().map(head).collect(),
    }
}

/// The few calibration rows that the layer table has room for: those nearest to the usual budgets.
fn shown(rows: &[Calibration]) -> Vec<&Calibration> {
    let nearest =
        |budget: f32| rows.iter().min_by(|a, b| (a.budget - budget).abs().total_cmp(&(b.budget - budget).abs()));
    let mut shown: Vec<&Calibration> = [0.1, 0.2, 0.5].into_iter().filter_map(nearest).collect();
    shown.dedup_by_key(|row| row.budget);
    shown
}

/// The index as JSON, with a final newline.
pub fn render_json(index: &Index, fit: Option<&[Check]>) -> anyhow::Result<String> {
    Ok(serde_json::to_string_pretty(&Report { fit: fit.map(<[Check]>::to_vec), ..report(index) })? + "\n")
}

/// The index as text for people.
pub fn render(index: &Index) -> String {
    let report = report(index);
    let mut out = String::new();
    let mut line = |name: &str, text: String| writeln!(out, "{name:<12}{text}").expect("a String takes all");
    let file = report.file.as_ref().map_or("(memory)".into(), |path| clean(&path.to_string_lossy()));
    line("index", format!("{file}, {}, format version {}", size(report.bytes), report.format_version));
    let Model { architecture, name, fingerprint, n_layer } = &report.model;
    line("model", format!("{} ({}), {n_layer} layers", clean(name), clean(architecture)));
    line("fingerprint", fingerprint.clone());
    let rope = &report.rope;
    line("rope", format!("type {}, base {}, scale {}", rope.r#type, rope.freq_base, rope.freq_scale));
    let Prefix { tokens, sinks, clustered, window } = report.prefix;
    line("prefix", format!("{tokens} tokens: {sinks} sinks, {clustered} clustered, {window} window"));
    let Build { builder, seed, iterations, cluster_share, chat, cache_types: [k_type, v_type] } = &report.build;
    line(
        "build",
        format!(
            "{}, seed {seed}, {iterations} iterations, clusters {} of the keys, chat {}, cache {}/{}",
            clean(builder),
            percent(*cluster_share),
            clean(chat),
            clean(k_type),
            clean(v_type)
        ),
    );
    let Sketch { layer, k_elements, v_elements, tolerance } = report.sketch;
    line(
        "sketch",
        format!(
            "layer {layer}, {k_elements} elements of K and {v_elements} of V per token, within {}",
            percent(tolerance)
        ),
    );
    let probes: Vec<String> =
        report.probes.iter().map(|p| format!("{} rows of layer {}", p.tokens.len(), p.layer)).collect();
    line("probes", if probes.is_empty() { "none".into() } else { probes.join(", ") });

    out += &calibration(index.meta());
    out += "\nlayers (cluster sizes in keys; kept and mass: shares of the keys and of the attention at a budget's threshold)\n";
    out += &layer_table(&report);
    let Total { layers, clusters, layer_bytes, other_bytes, cache_bytes, cache_share } = report.total;
    out += &format!(
        "total: {layers} layers, {clusters} clusters, {} in layers, {} in sketch, probes and metadata\n",
        size(layer_bytes),
        size(other_bytes)
    );
    out += &format!(
        "size: {}, {:.1} % of K and V of the prefix in these layers ({} in F16)\n",
        size(report.bytes),
        100.0 * cache_share,
        size(cache_bytes)
    );

    out += "\ndense layers\n";
    if report.dense_layers.is_empty() {
        out += "none\n";
    } else {
        let rows = report.dense_layers.iter().map(|dense| vec![dense.layer.to_string(), clean(&dense.reason)]);
        out += &table(&["layer", "reason"].map(String::from), rows.collect());
    }
    out
}

/// The tables of threshold and mass mode, as far as there are any.
fn calibration(meta: &IndexMeta) -> String {
    let mut out = "\ncalibration by the window's queries (kept: share of the keys; mass: of the attention on them; behind the threshold of threshold mode)\n".to_string();
    let row = |row: &Calibration| {
        let of = |of: fn(&HeadShares) -> f32| row.heads.iter().map(of);
        let mean = of(|h| h.budget_mass).sum::<f32>() / row.heads.len() as f32;
        let least = of(|h| h.budget_mass).fold(f32::INFINITY, f32::min);
        let (low, high) = (of(|h| h.kept).fold(f32::INFINITY, f32::min), of(|h| h.kept).fold(0.0, f32::max));
        let threshold =
            [format!("{:.3e}", row.threshold), percent(row.kept), format!("{} to {}", percent(low), percent(high))];
        [vec![percent(row.budget), percent(mean), percent(least)], threshold.to_vec(), vec![percent(row.mass)]].concat()
    };
    let head = ["budget", "mass at it", "least head", "threshold", "kept", "by head", "mass"].map(String::from);
    out += &table(&head, meta.calibration.iter().map(row).collect());
    if !meta.mass_targets.is_empty() {
        let row = |row: &MassTarget| vec![percent(row.mass), format!("{:.4}", row.target), percent(row.kept)];
        out += "\nmass mode (estimate: where selection stops for a mass)\n";
        out += &table(&["mass", "estimate", "kept"].map(String::from), meta.mass_targets.iter().map(row).collect());
    }
    out
}

fn layer_table(report: &Report) -> String {
    let mut head: Vec<String> =
        ["layer", "kv heads", "group", "dim k", "dim v", "clusters", "coarse", "mean", "p99", "max"]
            .map(String::from)
            .to_vec();
    let kept = report.layers.first().map_or(&[][..], |l| &l.kept);
    head.extend(kept.iter().flat_map(|k| ["kept", "mass"].map(|what| format!("{what} @ {}", percent(k.budget)))));
    head.push("bytes".into());
    let row = |l: &Layer| {
        let numbers = [l.layer, l.n_head_kv, l.n_group, l.head_dim_k, l.head_dim_v, l.clusters, l.coarse];
        let mut row: Vec<String> = numbers.iter().map(u32::to_string).collect();
        row.extend([format!("{:.1}", l.size_mean), l.size_p99.to_string(), l.size_max.to_string()]);
        row.extend(l.kept.iter().flat_map(|k| [percent(k.share), percent(k.mass)]));
        row.push(size(l.bytes));
        row
    };
    table(&head, report.layers.iter().map(row).collect())
}

/// A table as llama-bench prints them: right-aligned, also valid Markdown.
pub fn table(head: &[String], rows: Vec<Vec<String>>) -> String {
    let width = |i: usize| rows.iter().chain([&head.to_vec()]).map(|row| row[i].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let line = |row: &[String]| {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:>width$}")).collect();
        format!("| {} |\n", cells.join(" | "))
    };
    let rule: Vec<String> = widths.iter().map(|width| format!("{}:", "-".repeat(width + 1))).collect();
    let mut out = line(head) + &format!("|{}|\n", rule.join("|"));
    rows.iter().for_each(|row| out += &line(row));
    out
}

fn percent(share: f32) -> String {
    format!("{:.1} %", 100.0 * f64::from(share))
}

/// Bytes for people.
pub fn size(bytes: u64) -> String {
    match bytes {
        0..10_000 => format!("{bytes} B"),
        10_000..1_000_000 => format!("{:.1} KB", bytes as f64 / 1e3),
        _ => format!("{:.1} MB", bytes as f64 / 1e6),
    }
}

/// Text from a file may hold escape sequences that a terminal would obey: those written out.
pub fn clean(text: &str) -> String {
    text.chars().flat_map(|c| if c.is_control() { c.escape_default().collect::<Vec<_>>() } else { vec![c] }).collect()
}

#[cfg(test)]
#[path = "inspect_tests.rs"]
mod tests;
