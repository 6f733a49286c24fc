//! Serialises an index, and puts it under its name in one step: a reader sees the old file, the new one or none.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use bytemuck::cast_slice;

use super::error::{ensure, reserved};
use super::gguf::{self, Writer};
use super::layout::{Header, ProbeShape, SketchShape};
use super::types::*;
use super::{keys, seal, validate, IndexError};

/// The file's bytes; the same parts always give the same bytes.
///
/// # Errors
/// `Invalid` where the parts break a rule of `IndexParts` (lengths, order, range, a number that is not finite).
pub fn to_bytes(parts: &IndexParts) -> Result<Vec<u8>, IndexError> {
    let header = header_of(parts)?;
    validate::header(&header)?;
    check_lengths(parts, &header)?;
    check_data(parts, &header)?;

    let mut writer = Writer::new();
    keys::put(&mut writer, &header);
    let mut end = 0u64;
    for spec in header.specs() {
        writer.tensor(&spec.name, spec.ne(), spec.kind, end);
        let next =
            gguf::tensor_bytes(spec.ne(), spec.kind).and_then(|size| end.checked_add(size)).and_then(gguf::align);
        ensure!(next.is_some(), "the tensor {} is too large", spec.name);
        end = next.unwrap_or(end);
    }
    let head = writer.finish();
    let mut bytes = reserved(head.len().saturating_add(usize::try_from(end).unwrap_or(usize::MAX)))?;
    bytes.extend_from_slice(&head);
    let narrow = super::layout::narrow(&parts.meta);
    for data in arrays(parts) {
        match data {
            Array::F16(x) => bytes.extend_from_slice(cast_slice(x)),
            Array::F32(x) => bytes.extend_from_slice(cast_slice(x)),
            Array::U32(x) => bytes.extend_from_slice(cast_slice(x)),
            Array::U8(x) => bytes.extend_from_slice(x),
            // Each is below P, which `narrow` has found to fit.
            Array::Members(x) if narrow => x.iter().for_each(|m| bytes.extend((*m as u16).to_le_bytes())),
            Array::Members(x) => bytes.extend_from_slice(cast_slice(x)),
        }
        gguf::pad(&mut bytes);
    }
    seal::seal(&mut bytes)?;
    Ok(bytes)
}

enum Array<'a> {
    F16(&'a [half::f16]),
    F32(&'a [f32]),
    U32(&'a [u32]),
    U8(&'a [u8]),
    Members(&'a [u32]),
}

impl Array<'_> {
    fn len(&self) -> usize {
        match self {
            Array::F16(x) => x.len(),
            Array::F32(x) => x.len(),
            Array::U32(x) | Array::Members(x) => x.len(),
            Array::U8(x) => x.len(),
        }
    }
}

/// The data of every tensor, in the order of `Header::specs`.
fn arrays(parts: &IndexParts) -> impl Iterator<Item = Array<'_>> {
    let layers = parts.layers.iter().flat_map(|layer| {
        let always = [
            Array::F16(&layer.centroids),
            Array::F16(&layer.mean_values),
            Array::U8(&layer.variances),
            Array::F32(&layer.variance_scales),
            Array::F32(&layer.radii),
            Array::U32(&layer.offsets),
            Array::Members(&layer.members),
        ];
        always.into_iter().chain((layer.shape.n_coarse > 0).then_some(Array::U32(&layer.coarse_offsets)))
    });
    let sketch = &parts.sketch;
    let sketch = [
        Array::U32(&sketch.k_dims),
        Array::U32(&sketch.v_dims),
        Array::F16(&sketch.k),
        Array::F16(&sketch.v),
        Array::F16(&sketch.k_peaks),
        Array::F16(&sketch.v_peaks),
    ];
    let probes = parts.probes.iter().flat_map(|probe| [Array::U32(&probe.tokens), Array::F16(&probe.k)]);
    layers.chain(sketch).chain(probes)
}

fn header_of(parts: &IndexParts) -> Result<Header, IndexError> {
    let count = |n: usize| u32::try_from(n).map_err(|_| IndexError::Invalid { what: format!("{n} elements in a row") });
    let n_prefix = parts.meta.n_prefix();
    let sketch = &parts.sketch;
    let sketch = SketchShape {
        layer: sketch.layer,
        tolerance: sketch.tolerance,
        n_k: count(sketch.k_dims.len())?,
        n_v: count(sketch.v_dims.len())?,
        k_block: sketch.k_block,
        v_block: sketch.v_block,
        n_k_peak: count(sketch.k_peaks.len().checked_div(n_prefix).unwrap_or(0))?,
        n_v_peak: count(sketch.v_peaks.len().checked_div(n_prefix).unwrap_or(0))?,
    };
    let probe = |probe: &ProbeParts| {
        let n_token = probe.tokens.len();
        Ok(ProbeShape {
            layer: probe.layer,
            n_token: count(n_token)?,
            row: count(probe.k.len().checked_div(n_token).unwrap_or(0))?,
        })
    };
    Ok(Header {
        meta: parts.meta.clone(),
        shapes: parts.layers.iter().map(|layer| layer.shape).collect(),
        sketch,
        probes: parts.probes.iter().map(probe).collect::<Result<_, IndexError>>()?,
    })
}

fn check_lengths(parts: &IndexParts, header: &Header) -> Result<(), IndexError> {
    for (spec, data) in header.specs().zip(arrays(parts)) {
        let (found, expected) = (data.len() as u64, spec.len());
        ensure!(
            Some(found) == expected,
            "the tensor {} has {found} elements, its shape {:?} asks for {expected:?}",
            spec.name,
            spec.ne()
        );
    }
    for layer in parts.layers.iter().filter(|layer| layer.shape.n_coarse == 0) {
        ensure!(
            layer.coarse_centroids.is_empty() && layer.coarse_offsets.is_empty(),
            "layer {} has coarse data without coarse clusters",
            layer.shape.layer
        );
    }
    Ok(())
}

fn check_data(parts: &IndexParts, header: &Header) -> Result<(), IndexError> {
    for layer in &parts.layers {
        validate::layer(&parts.meta, &layer.view())?;
        validate::coarse(&layer.view())?;
    }
    validate::sketch(&header.shapes, &parts.sketch.view())?;
    parts.probes.iter().try_for_each(|probe| {
        let view = ProbeView { layer: probe.layer, tokens: &probe.tokens, k: &probe.k };
        validate::probe(&parts.meta, &view)
    })
}

/// Writes an index: to a temporary file in the same folder, synced, then renamed. Gives the size in bytes.
///
/// # Errors
/// `Invalid` as [`to_bytes`]; `Io` where the folder or the name cannot be written. The temporary file is then gone, and a file
/// that had the name before is untouched. A device or a pipe of that name is written to as it is.
pub fn write(path: &Path, parts: &IndexParts) -> Result<u64, IndexError> {
    let bytes = to_bytes(parts)?;
    replace(path, &bytes).map_err(|source| IndexError::Io { path: path.to_path_buf(), source })?;
    Ok(bytes.len() as u64)
}

impl super::Index {
    /// Writes the index to a file, as [`write()`] does; returns its size in bytes.
    ///
    /// # Errors
    /// `Io`.
    pub fn save(&self, path: &Path) -> Result<u64, IndexError> {
        replace(path, self.bytes()).map_err(|source| IndexError::Io { path: path.to_path_buf(), source })?;
        Ok(self.bytes().len() as u64)
    }
}

/// A file that is removed unless it was renamed.
struct Temporary {
    path: PathBuf,
    renamed: bool,
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.renamed {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    match path.file_name().filter(|_| !path.is_dir()) {
        // A device or a pipe (/dev/null, /dev/stdout) is written to: renaming would put a file in its place.
        Some(_) if is_special(path) => OpenOptions::new().write(true).open(path)?.write_all(bytes),
        Some(name) => store(path, name, bytes),
        None => Err(io::Error::new(io::ErrorKind::InvalidInput, "this is a folder, not a file name")),
    }
}

/// Whether something that is neither a file nor a folder has the name.
pub(crate) fn is_special(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|found| !found.is_file() && !found.is_dir())
}

/// Without the early look at `path`; `name` is its last part.
pub(super) fn store(path: &Path, name: &OsStr, bytes: &[u8]) -> io::Result<()> {
    static COUNTER: AtomicU32 = AtomicU32::new(0);
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // Cut, so that the longest allowed name still leaves room for the ending.
    let stem: String = name.to_string_lossy().chars().take(40).collect();
    let unique = COUNTER.fetch_add(1, Ordering::Relaxed);
    let path_tmp = folder.join(format!(".{stem}.{}.{unique}.tmp", std::process::id()));

    let mut file = OpenOptions::new().write(true).create_new(true).open(&path_tmp)?;
    let mut temporary = Temporary { path: path_tmp, renamed: false };
    file.write_all(bytes)?;
    file.sync_all()?;
    drop(file);
    fs::rename(&temporary.path, path)?;
    temporary.renamed = true;
    // Makes the new name itself last; some file systems cannot sync a folder, and the data are safe without it.
    if let Ok(folder) = File::open(folder) {
        let _ = folder.sync_all();
    }
    Ok(())
}
