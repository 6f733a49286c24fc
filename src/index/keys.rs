//! The header's keys, in one fixed order: the same list written and read. A reader that asks for the next key by name and
//! type has refused missing, doubled, unknown and misplaced keys without further code.

use sha2::{Digest, Sha256};

use super::error::{ensure, reserved};
use super::gguf::{self, Cursor, Writer, ARRAY, F32, I32, STRING, U32, U64};
use super::layout::{Header, ProbeShape, SketchShape};
use super::seal::{CHECKSUMS_KEY, GENERAL_TYPE, SEAL_KEY, SYNTHETIC_TYPE, VERSION_KEY};
use super::types::*;
use super::IndexError;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn unhex(text: &str) -> Option<[u8; 32]> {
    let digit = |c: u8| "0123456789abcdef".bytes().position(|d| d == c).map(|v| v as u8);
    if text.len() != 64 {
        return None;
    }
    let mut bytes = [0; 32];
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

/// SHA-256 over the token ids as little-endian 32-bit numbers, in hexadecimal.
fn tokens_sha256(tokens: &[i32]) -> String {
    hex(&Sha256::digest(bytemuck::cast_slice::<i32, u8>(tokens)))
}

/// Writes every key, with zeros for checksums (`seal` sets them).
pub(super) fn put(out: &mut Writer, header: &Header) {
    let Header { meta, shapes, sketch, probes } = header;
    out.str("general.type", if meta.synthetic { SYNTHETIC_TYPE } else { GENERAL_TYPE });
    out.str("general.architecture", "squeeze");
    out.scalar("general.alignment", U32, (gguf::ALIGNMENT as u32).to_le_bytes());
    out.scalar(VERSION_KEY, U32, FORMAT_VERSION.to_le_bytes());

    out.str("squeeze.model.architecture", &meta.model.architecture);
    out.str("squeeze.model.name", &meta.model.name);
    out.str("squeeze.model.fingerprint", &hex(&meta.model.fingerprint));
    out.scalar("squeeze.model.n_layer", U32, meta.n_layer.to_le_bytes());
    out.scalar("squeeze.rope.type", I32, meta.rope.kind.to_le_bytes());
    out.scalar("squeeze.rope.freq_base", F32, meta.rope.freq_base.to_le_bytes());
    out.scalar("squeeze.rope.freq_scale", F32, meta.rope.freq_scale.to_le_bytes());

    out.array("squeeze.prefix.tokens", I32, &meta.tokens);
    out.str("squeeze.prefix.sha256", &tokens_sha256(&meta.tokens));
    out.scalar("squeeze.prefix.n_sink", U32, meta.n_sink.to_le_bytes());
    out.scalar("squeeze.prefix.n_window", U32, meta.n_window.to_le_bytes());

    out.scalar("squeeze.build.seed", U64, meta.build.seed.to_le_bytes());
    out.scalar("squeeze.build.iterations", U32, meta.build.iterations.to_le_bytes());
    out.scalar("squeeze.build.cluster_share", F32, meta.build.cluster_share.to_le_bytes());
    out.str("squeeze.build.chat", &meta.build.chat);
    for (key, name) in CACHE_KEYS.iter().zip(&meta.build.cache_types) {
        out.str(key, name);
    }
    out.str("squeeze.build.builder", &meta.build.builder);

    let rows = &meta.calibration;
    let column = |get: fn(&Calibration) -> f32| rows.iter().map(get).collect::<Vec<_>>();
    out.array("squeeze.calibration.budget", F32, &column(|c| c.budget));
    out.array("squeeze.calibration.threshold", F32, &column(|c| c.threshold));
    out.array("squeeze.calibration.kept", F32, &column(|c| c.kept));
    out.array("squeeze.calibration.mass", F32, &column(|c| c.mass));
    for (key, get) in HEAD_KEYS {
        let column: Vec<f32> = rows.iter().flat_map(|c| &c.heads).map(|head| *get(&mut head.clone())).collect();
        out.array(key, F32, &column);
    }
    for (key, get) in MASS_KEYS {
        out.array(key, F32, &meta.mass_targets.iter().map(|row| *get(&mut row.clone())).collect::<Vec<_>>());
    }

    out.array("squeeze.dense.layer", U32, &meta.dense_layers.iter().map(|(layer, _)| *layer).collect::<Vec<_>>());
    out.str_array("squeeze.dense.reason", meta.dense_layers.iter().map(|(_, reason)| reason.as_str()));

    for (key, get) in SHAPE_KEYS {
        out.array(key, U32, &shapes.iter().map(|shape| *get(&mut shape.clone())).collect::<Vec<_>>());
    }
    out.array(SCALE_KEY, F32, &shapes.iter().map(|shape| shape.scale).collect::<Vec<_>>());

    for (key, get) in SKETCH_KEYS {
        out.scalar(key, U32, get(&mut sketch.clone()).to_le_bytes());
    }
    out.scalar(TOLERANCE_KEY, F32, sketch.tolerance.to_le_bytes());
    for (key, get) in PROBE_KEYS {
        out.array(key, U32, &probes.iter().map(|probe| *get(&mut probe.clone())).collect::<Vec<_>>());
    }

    out.array(CHECKSUMS_KEY, U64, &vec![0u64; header.n_tensors()]);
    out.scalar(SEAL_KEY, U64, [0; 8]);
}

/// A column of a table: its key, and an accessor that serves writing and reading.
type Column<T, V = u32> = (&'static str, fn(&mut T) -> &mut V);

const HEAD_KEYS: [Column<HeadShares, f32>; 3] = [
    ("squeeze.calibration.head_kept", |head| &mut head.kept),
    ("squeeze.calibration.head_mass", |head| &mut head.mass),
    ("squeeze.calibration.head_budget_mass", |head| &mut head.budget_mass),
];
const MASS_KEYS: [Column<MassTarget, f32>; 3] = [
    ("squeeze.mass.share", |row| &mut row.mass),
    ("squeeze.mass.target", |row| &mut row.target),
    ("squeeze.mass.kept", |row| &mut row.kept),
];

const SHAPE_KEYS: [Column<LayerShape>; 7] = [
    ("squeeze.layer.number", |shape| &mut shape.layer),
    ("squeeze.layer.n_head_kv", |shape| &mut shape.n_head_kv),
    ("squeeze.layer.n_group", |shape| &mut shape.n_group),
    ("squeeze.layer.head_dim_k", |shape| &mut shape.head_dim_k),
    ("squeeze.layer.head_dim_v", |shape| &mut shape.head_dim_v),
    ("squeeze.layer.n_cluster", |shape| &mut shape.n_cluster),
    ("squeeze.layer.n_coarse", |shape| &mut shape.n_coarse),
];
const CACHE_KEYS: [&str; 2] = ["squeeze.build.cache_type_k", "squeeze.build.cache_type_v"];
const TOLERANCE_KEY: &str = "squeeze.sketch.tolerance";
const SCALE_KEY: &str = "squeeze.layer.scale";

const SKETCH_KEYS: [Column<SketchShape>; 7] = [
    ("squeeze.sketch.layer", |sketch| &mut sketch.layer),
    ("squeeze.sketch.n_k", |sketch| &mut sketch.n_k),
    ("squeeze.sketch.n_v", |sketch| &mut sketch.n_v),
    ("squeeze.sketch.k_block", |sketch| &mut sketch.k_block),
    ("squeeze.sketch.v_block", |sketch| &mut sketch.v_block),
    ("squeeze.sketch.n_k_peak", |sketch| &mut sketch.n_k_peak),
    ("squeeze.sketch.n_v_peak", |sketch| &mut sketch.n_v_peak),
];
const PROBE_KEYS: [Column<ProbeShape>; 3] = [
    ("squeeze.probe.layer", |probe| &mut probe.layer),
    ("squeeze.probe.n_token", |probe| &mut probe.n_token),
    ("squeeze.probe.row", |probe| &mut probe.row),
];

const EMPTY_SHAPE: LayerShape = LayerShape {
    layer: 0,
    n_head_kv: 0,
    n_group: 0,
    head_dim_k: 0,
    head_dim_v: 0,
    n_cluster: 0,
    n_coarse: 0,
    scale: 0.0,
};
const EMPTY_SKETCH: SketchShape =
    SketchShape { layer: 0, tolerance: 0.0, n_k: 0, n_v: 0, k_block: 0, v_block: 0, n_k_peak: 0, n_v_peak: 0 };
const EMPTY_PROBE: ProbeShape = ProbeShape { layer: 0, n_token: 0, row: 0 };

/// Most rows of any table (layers, probes, calibration), so that small structs cannot be made many by a hostile file.
pub(super) const MAX_ROWS: usize = 1024;

/// Reads every key. The values are as stored: `validate::header` comes next.
pub(super) fn get(bytes: &[u8], n_kv: u64) -> Result<Header, IndexError> {
    let mut keys = Keys { cursor: Cursor::new(bytes, gguf::KEYS_START), left: n_kv };
    let synthetic = keys.str("general.type")? == SYNTHETIC_TYPE;
    let architecture = keys.str("general.architecture")?;
    ensure!(architecture == "squeeze", "general.architecture is {architecture:?}, not \"squeeze\"");
    for (key, expected) in [("general.alignment", gguf::ALIGNMENT as u32), (VERSION_KEY, FORMAT_VERSION)] {
        let found = keys.u32(key)?;
        ensure!(found == expected, "{key} is {found}, not {expected}");
    }

    let architecture = keys.str("squeeze.model.architecture")?.to_string();
    let name = keys.str("squeeze.model.name")?.to_string();
    let fingerprint = unhex(keys.str("squeeze.model.fingerprint")?);
    ensure!(fingerprint.is_some(), "squeeze.model.fingerprint is not 64 hexadecimal digits");
    let model = ModelId { architecture, name, fingerprint: fingerprint.unwrap_or_default() };
    let n_layer = keys.u32("squeeze.model.n_layer")?;
    let rope = Rope {
        kind: keys.u32_of("squeeze.rope.type", I32)? as i32,
        freq_base: keys.f32("squeeze.rope.freq_base")?,
        freq_scale: keys.f32("squeeze.rope.freq_scale")?,
    };

    let tokens: Vec<i32> = keys.words("squeeze.prefix.tokens", I32, usize::MAX)?;
    let sha256 = keys.str("squeeze.prefix.sha256")?;
    ensure!(sha256 == tokens_sha256(&tokens), "squeeze.prefix.sha256 is not that of squeeze.prefix.tokens");
    let n_sink = keys.u32("squeeze.prefix.n_sink")?;
    let n_window = keys.u32("squeeze.prefix.n_window")?;

    let build = BuildSettings {
        seed: keys.u64("squeeze.build.seed")?,
        iterations: keys.u32("squeeze.build.iterations")?,
        cluster_share: keys.f32("squeeze.build.cluster_share")?,
        chat: keys.str("squeeze.build.chat")?.to_string(),
        cache_types: [keys.str(CACHE_KEYS[0])?.to_string(), keys.str(CACHE_KEYS[1])?.to_string()],
        builder: keys.str("squeeze.build.builder")?.to_string(),
    };
    let columns = Columns::get(&mut keys)?;
    let mass_targets = keys.table(&MASS_KEYS, F32, MassTarget { mass: 0.0, target: 0.0, kept: 0.0 }, MAX_ROWS)?;
    let dense_layers = keys.dense_layers()?;
    let shapes = keys.shapes()?;
    let calibration = columns.rows(shapes.iter().map(|shape| shape.n_head_kv as usize).sum())?;
    let meta = IndexMeta {
        model,
        rope,
        n_layer,
        tokens,
        n_sink,
        n_window,
        build,
        calibration,
        mass_targets,
        dense_layers,
        synthetic,
    };

    let mut sketch = EMPTY_SKETCH;
    for (key, get) in SKETCH_KEYS {
        *get(&mut sketch) = keys.u32(key)?;
    }
    sketch.tolerance = keys.f32(TOLERANCE_KEY)?;
    let probes = keys.table(&PROBE_KEYS, U32, EMPTY_PROBE, MAX_ROWS)?;
    keys.next(CHECKSUMS_KEY, ARRAY)?;
    keys.next(SEAL_KEY, U64)?;
    ensure!(keys.left == 0, "there are {} unknown keys after {SEAL_KEY:?}", keys.left);
    Ok(Header { meta, shapes, sketch, probes })
}

/// Columns of the calibration table, before the number of heads is known.
struct Columns {
    budget: Vec<f32>,
    threshold: Vec<f32>,
    kept: Vec<f32>,
    mass: Vec<f32>,
    heads: Vec<HeadShares>,
}

impl Columns {
    fn get(keys: &mut Keys) -> Result<Columns, IndexError> {
        Ok(Columns {
            budget: keys.words("squeeze.calibration.budget", F32, MAX_ROWS)?,
            threshold: keys.words("squeeze.calibration.threshold", F32, MAX_ROWS)?,
            kept: keys.words("squeeze.calibration.kept", F32, MAX_ROWS)?,
            mass: keys.words("squeeze.calibration.mass", F32, MAX_ROWS)?,
            heads: keys.table(&HEAD_KEYS, F32, HeadShares::default(), MAX_ROWS * MAX_ROWS)?,
        })
    }

    fn rows(self, n_head: usize) -> Result<Vec<Calibration>, IndexError> {
        let n = self.budget.len();
        ensure!(
            [&self.threshold, &self.kept, &self.mass].iter().all(|c| c.len() == n) && self.heads.len() == n * n_head,
            "the columns of squeeze.calibration.* differ in length"
        );
        let row = |i: usize| Calibration {
            budget: self.budget[i],
            threshold: self.threshold[i],
            kept: self.kept[i],
            mass: self.mass[i],
            heads: self.heads[i * n_head..(i + 1) * n_head].to_vec(),
        };
        Ok((0..n).map(row).collect())
    }
}

/// The keys not yet read.
struct Keys<'a> {
    cursor: Cursor<'a>,
    left: u64,
}

impl<'a> Keys<'a> {
    /// The next key, which must be this one; gives a cursor at its value.
    fn next(&mut self, key: &str, kind: u32) -> Result<Cursor<'a>, IndexError> {
        ensure!(self.left > 0, "the key {key:?} is missing");
        self.left -= 1;
        let before = self.cursor.clone();
        let entry = gguf::entry(&mut self.cursor)?;
        ensure!(
            entry.key == key && entry.kind == kind,
            "where the key {key:?} of type {kind} belongs, byte {} holds {:?} of type {}",
            before.pos,
            entry.key,
            entry.kind
        );
        let mut value = before;
        value.pos = entry.value.start;
        Ok(value)
    }

    fn str(&mut self, key: &str) -> Result<&'a str, IndexError> {
        self.next(key, STRING)?.str(key)
    }

    fn u32_of(&mut self, key: &str, kind: u32) -> Result<u32, IndexError> {
        self.next(key, kind)?.u32(key)
    }

    fn u32(&mut self, key: &str) -> Result<u32, IndexError> {
        self.u32_of(key, U32)
    }

    fn f32(&mut self, key: &str) -> Result<f32, IndexError> {
        Ok(f32::from_bits(self.u32_of(key, F32)?))
    }

    fn u64(&mut self, key: &str) -> Result<u64, IndexError> {
        self.next(key, U64)?.u64(key)
    }

    /// Opens an array: its cursor and length.
    fn array(&mut self, key: &str, item: u32, max: usize) -> Result<(Cursor<'a>, u64), IndexError> {
        let mut value = self.next(key, ARRAY)?;
        let found = value.u32(key)?;
        ensure!(found == item, "the array {key:?} has elements of type {found}, not {item}");
        let n = value.u64(key)?;
        ensure!(n <= max as u64, "the array {key:?} has {n} elements, more than {max}");
        Ok((value, n))
    }

    /// An array of 32-bit numbers. The bytes are there before the memory is asked for.
    fn words<T: bytemuck::Pod>(&mut self, key: &str, item: u32, max: usize) -> Result<Vec<T>, IndexError> {
        let (mut value, n) = self.array(key, item, max)?;
        let found = value.take(n.saturating_mul(4), key)?.chunks_exact(4);
        let mut words = reserved(found.len())?;
        words.extend(found.map(bytemuck::pod_read_unaligned::<T>));
        Ok(words)
    }

    /// A table stored by columns.
    fn table<T: Clone, V: bytemuck::Pod>(
        &mut self,
        columns: &[Column<T, V>],
        item: u32,
        empty: T,
        max: usize,
    ) -> Result<Vec<T>, IndexError> {
        let mut rows: Option<Vec<T>> = None;
        for (key, get) in columns {
            let values: Vec<V> = self.words(key, item, max)?;
            if rows.is_none() {
                let mut made = reserved(values.len())?;
                made.resize(values.len(), empty.clone());
                rows = Some(made);
            }
            let rows = rows.get_or_insert_default();
            ensure!(values.len() == rows.len(), "the array {key:?} has {} rows, not {}", values.len(), rows.len());
            rows.iter_mut().zip(values).for_each(|(row, value)| *get(row) = value);
        }
        Ok(rows.unwrap_or_default())
    }

    fn shapes(&mut self) -> Result<Vec<LayerShape>, IndexError> {
        let mut shapes = self.table(&SHAPE_KEYS, U32, EMPTY_SHAPE, MAX_ROWS)?;
        let scales: Vec<f32> = self.words(SCALE_KEY, F32, MAX_ROWS)?;
        ensure!(scales.len() == shapes.len(), "the array {SCALE_KEY:?} has {} rows", scales.len());
        shapes.iter_mut().zip(scales).for_each(|(shape, scale)| shape.scale = scale);
        Ok(shapes)
    }

    fn dense_layers(&mut self) -> Result<Vec<(u32, String)>, IndexError> {
        let layers: Vec<u32> = self.words("squeeze.dense.layer", U32, MAX_ROWS)?;
        let key = "squeeze.dense.reason";
        let (mut value, n) = self.array(key, STRING, MAX_ROWS)?;
        ensure!(n == layers.len() as u64, "there are {n} reasons for {} dense layers", layers.len());
        layers.into_iter().map(|layer| Ok((layer, value.str(key)?.to_string()))).collect()
    }
}
