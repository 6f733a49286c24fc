//! Opens an index. Everything is checked once, here; afterwards views are slices of the memory that the file was read into.

use std::ops::Range;
use std::path::{Path, PathBuf};

use bytemuck::{cast_slice, Pod};
use half::f16;

use super::bytes::Bytes;
use super::error::{ensure, reserved};
use super::gguf::{self, Cursor, Type};
use super::layout::{layer_tensors, narrow, Header, LAYER_TENSORS, PROBE_TENSORS, SKETCH_TENSORS};
use super::seal::Frame;
use super::types::*;
use super::{keys, validate, IndexError};

/// An index that has passed every check: nothing it gives out can be out of range.
pub struct Index {
    path: Option<PathBuf>,
    bytes: Bytes,
    header: Header,
    /// Where each tensor's data lie in `bytes`, in file order.
    tensors: Vec<Range<usize>>,
    /// Number of the first tensor of each layer.
    first: Vec<usize>,
    /// Centroids of each layer's coarse clusters.
    coarse: Vec<Vec<f16>>,
}

impl Index {
    /// Reads a file and checks all of it, checksums included. Afterwards the file is not looked at again: it may be cut, replaced
    /// or removed.
    ///
    /// # Errors
    /// See [`IndexError`]; only `Io` names the path.
    pub fn open(path: &Path) -> Result<Index, IndexError> {
        Index::open_any(path)?.real()
    }

    /// The same, but a synthetic index too: whoever takes it must say so in every figure.
    ///
    /// # Errors
    /// As [`Index::open`], without `Synthetic`.
    pub fn open_any(path: &Path) -> Result<Index, IndexError> {
        Index::parse(Bytes::read(path)?, Some(path.to_path_buf()))
    }

    fn real(self) -> Result<Index, IndexError> {
        if self.meta().synthetic {
            return Err(IndexError::Synthetic);
        }
        Ok(self)
    }

    /// The same from memory; the bytes are copied to aligned storage.
    ///
    /// # Errors
    /// As [`Index::open`], without `Io`.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Index, IndexError> {
        Index::from_slice(&bytes)
    }

    /// The same of borrowed memory.
    ///
    /// # Errors
    /// As [`Index::from_bytes`].
    pub fn from_slice(bytes: &[u8]) -> Result<Index, IndexError> {
        Index::parse(Bytes::copy(bytes)?, None)?.real()
    }

    fn parse(bytes: Bytes, path: Option<PathBuf>) -> Result<Index, IndexError> {
        let data = bytes.as_slice();
        let frame = Frame::read(data)?;
        frame.check_header(data)?;
        let header = keys::get(data, frame.counts.n_kv)?;
        validate::header(&header)?;
        let tensors = place_tensors(data, &frame, &header)?;
        let starts = header.shapes.iter().scan(0, |next, shape| {
            let first = *next;
            *next += layer_tensors(shape);
            Some(first)
        });
        let first = starts.collect();
        let mut index = Index { path, bytes, header, tensors, first, coarse: Vec::new() };
        index.check_data()?;
        index.coarse =
            (0..index.shapes().len()).map(|i| index.stored(i).try_coarse_means()).collect::<Result<_, _>>()?;
        Ok(index)
    }

    fn check_data(&self) -> Result<(), IndexError> {
        for i in 0..self.header.shapes.len() {
            validate::layer(self.meta(), &self.stored(i))?;
        }
        validate::sketch(self.shapes(), &self.sketch())?;
        self.probes().iter().try_for_each(|probe| validate::probe(self.meta(), probe))
    }

    /// All of it, as in the file.
    pub fn bytes(&self) -> &[u8] {
        self.bytes.as_slice()
    }

    /// The file it came from; None: from memory.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    pub fn meta(&self) -> &IndexMeta {
        &self.header.meta
    }

    /// Indexed layers, ascending.
    pub fn shapes(&self) -> &[LayerShape] {
        &self.header.shapes
    }

    fn position(&self, layer: u32) -> Option<usize> {
        self.header.shapes.binary_search_by_key(&layer, |shape| shape.layer).ok()
    }

    /// The layer with this number in the model; None: it is not indexed.
    pub fn layer(&self, layer: u32) -> Option<LayerView<'_>> {
        self.position(layer).map(|i| self.layer_at(i))
    }

    fn tensor<T: Pod>(&self, i: usize) -> &[T] {
        cast_slice(&self.bytes.as_slice()[self.tensors[i].clone()])
    }

    fn layer_at(&self, i: usize) -> LayerView<'_> {
        LayerView { coarse_centroids: &self.coarse[i], ..self.stored(i) }
    }

    /// What the file holds of a layer: all but the coarse centroids.
    fn stored(&self, i: usize) -> LayerView<'_> {
        let (shape, t) = (self.header.shapes[i], self.first[i]);
        LayerView {
            shape,
            centroids: self.tensor(t),
            mean_values: self.tensor(t + 1),
            variances: self.tensor(t + 2),
            variance_scales: self.tensor(t + 3),
            radii: self.tensor(t + 4),
            offsets: self.tensor(t + 5),
            members: if narrow(self.meta()) {
                Members::U16(self.tensor(t + 6))
            } else {
                Members::U32(self.tensor(t + 6))
            },
            coarse_centroids: &[],
            coarse_offsets: if shape.n_coarse > 0 { self.tensor(t + LAYER_TENSORS) } else { &[] },
        }
    }

    fn after_layers(&self) -> usize {
        self.tensors.len() - SKETCH_TENSORS - PROBE_TENSORS * self.header.probes.len()
    }

    pub fn sketch(&self) -> SketchView<'_> {
        let t = self.after_layers();
        SketchView {
            layer: self.header.sketch.layer,
            tolerance: self.header.sketch.tolerance,
            k_dims: self.tensor(t),
            v_dims: self.tensor(t + 1),
            k: self.tensor(t + 2),
            v: self.tensor(t + 3),
            k_block: self.header.sketch.k_block,
            v_block: self.header.sketch.v_block,
            k_peaks: self.tensor(t + 4),
            v_peaks: self.tensor(t + 5),
        }
    }

    /// Ascending by layer; may be empty.
    pub fn probes(&self) -> Vec<ProbeView<'_>> {
        let t = self.after_layers() + SKETCH_TENSORS;
        let probe = |(i, shape): (usize, &super::layout::ProbeShape)| ProbeView {
            layer: shape.layer,
            tokens: self.tensor(t + PROBE_TENSORS * i),
            k: self.tensor(t + PROBE_TENSORS * i + 1),
        };
        self.header.probes.iter().enumerate().map(probe).collect()
    }

    /// Size of the whole file.
    pub fn file_bytes(&self) -> u64 {
        self.bytes.as_slice().len() as u64
    }

    /// Bytes of K and V of the prefix in the indexed layers, in an F16 cache.
    pub fn cache_bytes(&self) -> u64 {
        self.shapes().iter().map(|shape| shape.cache_bytes(self.meta().n_prefix())).sum()
    }

    /// Bytes of one layer's tensors; 0 for a layer that is not indexed.
    pub fn layer_bytes(&self, layer: u32) -> u64 {
        let Some(i) = self.position(layer) else { return 0 };
        let n = layer_tensors(&self.header.shapes[i]);
        self.tensors[self.first[i]..self.first[i] + n].iter().map(|range| range.len() as u64).sum()
    }
}

impl std::fmt::Debug for Index {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Index")
            .field("path", &self.path)
            .field("n_prefix", &self.meta().n_prefix())
            .field("layers", &self.shapes().len())
            .finish_non_exhaustive()
    }
}

/// Holds the file to the one layout that its header allows: these tensors in this order, back to back but for padding, up to
/// the last byte. Unknown, missing, doubled and overlapping tensors and gaps all differ from it.
fn place_tensors(bytes: &[u8], frame: &Frame, header: &Header) -> Result<Vec<Range<usize>>, IndexError> {
    let expected = header.n_tensors();
    ensure!(
        frame.counts.n_tensor == expected as u64,
        "it has {} tensors, its header asks for {expected}",
        frame.counts.n_tensor
    );
    let mut tensors = reserved(expected)?;
    let mut infos = Cursor::new(bytes, frame.infos);
    let mut data = Cursor::new(bytes, frame.data);
    for (i, spec) in header.specs().enumerate() {
        let info = gguf::info(&mut infos)?;
        let (name, offset) = (spec.name.as_str(), (data.pos - frame.data) as u64);
        ensure!(info.name == name, "tensor {i} is {:?}, not {name:?}", info.name);
        let found = &info.ne[..info.n_dims as usize];
        ensure!(
            found == spec.ne() && Type::from_id(info.kind) == Some(spec.kind),
            "the tensor {name} has the shape {found:?} and type {}, its header asks for {:?} and {}",
            info.kind,
            spec.ne(),
            spec.kind as u32
        );
        ensure!(info.offset == offset, "the tensor {name} starts at {} of the data, not {offset}", info.offset);
        let size = gguf::tensor_bytes(found, spec.kind);
        ensure!(size.is_some(), "the tensor {name} has the shape {found:?}");
        let start = data.pos;
        let values = data.take(size.unwrap_or(u64::MAX), name)?;
        tensors.push(start..data.pos);
        frame.check_tensor(bytes, i, name, values)?;
        // The data start at a multiple of the alignment, so file positions and offsets round alike.
        let padding = data.pos.next_multiple_of(gguf::ALIGNMENT) - data.pos;
        let zeros = data.take(padding as u64, "padding")?;
        ensure!(zeros.iter().all(|byte| *byte == 0), "the padding after the tensor {name} is not zero");
    }
    ensure!(bytes[infos.pos..frame.data].iter().all(|byte| *byte == 0), "the padding of the header is not zero");
    ensure!(data.pos == bytes.len(), "{} bytes follow the last tensor", bytes.len() - data.pos);
    Ok(tensors)
}
