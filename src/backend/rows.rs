//! Rows of one layer's cache, whatever their element type: raw bytes, and single numbers or runs of them as f32.

use half::f16;

use crate::attention::Element;

/// K or V rows of one layer and one stream of a cache.
#[derive(Clone, Copy)]
pub struct Rows {
    pub data: *const u8,
    /// Bytes from one cell to the next.
    pub stride: usize,
    /// Elements per row, a multiple of the type's block.
    pub len: usize,
    pub element: Element,
    /// A copy of what a sketch compares alone, in its order and as f32: `len` elements in the basis of the index, and of quantised
    /// rows the variances of their rounding errors and so many peaks.
    pub compact: Option<usize>,
}

/// Both halves of one layer and one stream.
#[derive(Clone, Copy)]
pub struct CacheRows {
    pub k: Rows,
    pub v: Rows,
    pub n_cell: usize,
}

impl CacheRows {
    /// # Panics
    /// Where there is no such cell.
    pub fn k_row(&self, cell: usize) -> Row<'_> {
        assert!(cell < self.n_cell);
        self.k.row(cell)
    }

    /// # Panics
    /// Where there is no such cell.
    pub fn v_row(&self, cell: usize) -> Row<'_> {
        assert!(cell < self.n_cell);
        self.v.row(cell)
    }
}

impl Rows {
    fn row(&self, cell: usize) -> Row<'_> {
        let size = match self.compact {
            None => self.element.row_bytes(self.len),
            Some(_) if !is_quantised(self.element) => 4 * self.len,
            Some(n_peak) => 4 * (2 * self.len + n_peak),
        };
        // SAFETY: whoever made the value vouches for rows of `size` bytes, as many as `CacheRows` says (checked by its
        // methods, the only callers), alive while it is used.
        let bytes = unsafe { std::slice::from_raw_parts(self.data.add(cell * self.stride), size) };
        Row { bytes, element: self.element, compact: self.compact.map(|_| self.len) }
    }
}

/// One row.
#[derive(Clone, Copy)]
pub struct Row<'a> {
    pub bytes: &'a [u8],
    pub element: Element,
    /// Elements of a compact copy.
    pub compact: Option<usize>,
}

/// What a compact copy has of a row.
#[derive(Clone, Copy)]
pub enum Part {
    Element,
    /// Variance of an element's rounding error.
    Noise,
    Peak,
}

impl Row<'_> {
    /// Number `i` of a compact copy.
    pub fn copied(&self, part: Part, i: usize) -> f32 {
        let n = self.compact.unwrap_or_default();
        let at = match part {
            Part::Element => i,
            Part::Noise => n + i,
            Part::Peak => 2 * n + i,
        };
        f32::from_le_bytes([0, 1, 2, 3].map(|b| self.bytes[4 * at + b]))
    }

    /// Bytes of the block that holds element `i`, and its place in the block.
    fn block(&self, i: usize) -> (&[u8], usize) {
        let (n, size) = (self.element.block(), self.element.block_bytes());
        (&self.bytes[i / n * size..][..size], i % n)
    }

    /// Element `i`.
    pub fn get(&self, i: usize) -> f32 {
        let (block, at) = self.block(i);
        match self.element {
            Element::F32 => f32::from_le_bytes([block[0], block[1], block[2], block[3]]),
            Element::F16 => f16_at(block),
            Element::BF16 => half::bf16::from_le_bytes([block[0], block[1]]).to_f32(),
            Element::Q8_0 => f16_at(block) * f32::from(block[2 + at] as i8),
            Element::Q4_0 => {
                let pair = block[2 + at % 16];
                let bits = if at < 16 { pair & 15 } else { pair >> 4 };
                f16_at(block) * (f32::from(bits) - 8.0)
            }
        }
    }

    /// Variance of the rounding error of element `i`: that of a whole step of its block's scale. 0 for plain numbers.
    pub fn noise(&self, i: usize) -> f32 {
        match self.element {
            Element::F32 | Element::F16 | Element::BF16 => 0.0,
            Element::Q8_0 | Element::Q4_0 => f16_at(self.block(i).0).powi(2) / 12.0,
        }
    }

    /// Largest magnitude in the block of element `i` before it was rounded, which its scale gives: -8 steps of Q4_0, 127 of
    /// Q8_0. `None` for plain numbers.
    pub fn peak(&self, i: usize) -> Option<f32> {
        let steps = match self.element {
            Element::F32 | Element::F16 | Element::BF16 => return None,
            Element::Q8_0 => 127.0,
            Element::Q4_0 => 8.0,
        };
        Some(f16_at(self.block(i).0).abs() * steps)
    }

    /// Elements from `first` on.
    pub fn decode(&self, first: usize, out: &mut [f32]) {
        out.iter_mut().enumerate().for_each(|(i, x)| *x = self.get(first + i));
    }
}

fn f16_at(block: &[u8]) -> f32 {
    f16::from_le_bytes([block[0], block[1]]).to_f32()
}

/// Is a cache of this type kept in the basis that llama.cpp quantises in?
pub fn is_quantised(element: Element) -> bool {
    element.block() > 1
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A row as ggml stores it (`quantize_row_*_ref`).
    pub fn encode(row: &[f32], element: Element) -> Vec<u8> {
        let largest = |block: &[f32]| block.iter().fold(0f32, |m, x| if x.abs() > m.abs() { *x } else { m });
        let inverse = |d: f32| if d == 0.0 { 0.0 } else { 1.0 / d };
        let blocks = row.chunks_exact(element.block());
        let of_block = |block: &[f32]| -> Vec<u8> {
            match element {
                Element::F32 => block[0].to_le_bytes().to_vec(),
                Element::F16 => f16::from_f32(block[0]).to_le_bytes().to_vec(),
                Element::BF16 => half::bf16::from_f32(block[0]).to_le_bytes().to_vec(),
                Element::Q8_0 => {
                    let d = largest(block).abs() / 127.0;
                    let steps = block.iter().map(|x| (x * inverse(d)).round() as i8 as u8);
                    f16::from_f32(d).to_le_bytes().into_iter().chain(steps).collect()
                }
                Element::Q4_0 => {
                    let d = largest(block) / -8.0;
                    let step = |x: f32| ((x * inverse(d) + 8.5) as u8).min(15);
                    let pairs = (0..16).map(|i| step(block[i]) | step(block[i + 16]) << 4);
                    f16::from_f32(d).to_le_bytes().into_iter().chain(pairs).collect()
                }
            }
        };
        blocks.flat_map(of_block).collect()
    }

    #[test]
    fn every_type_is_read_as_it_was_written() {
        let row: Vec<f32> = (0..96).map(|i| ((i * 37 % 96) as f32 - 40.0) * if i < 32 { 0.1 } else { 3.0 }).collect();
        for element in Element::ALL {
            let bytes = encode(&row, element);
            assert_eq!(bytes.len(), element.row_bytes(row.len()));
            let read = Row { bytes: &bytes, element, compact: None };
            let mut all = vec![0.0; 60];
            read.decode(30, &mut all);
            for (i, x) in row.iter().enumerate() {
                let step = read.noise(i).mul_add(12.0, 0.0).sqrt();
                // The largest negative steps of Q4_0 have no positive fellow.
                let reach = step * 1.01 + x.abs() / 128.0;
                assert!((read.get(i) - x).abs() <= reach, "{element:?} {i}: {} for {x}", read.get(i));
                assert!(!(30..90).contains(&i) || all[i - 30] == read.get(i));
                let run = &row[i / 32 * 32..][..32];
                let largest = run.iter().fold(0f32, |m, x| m.max(x.abs()));
                assert_eq!(read.peak(i).is_some(), is_quantised(element));
                assert!(read.peak(i).is_none_or(|p| (p - largest).abs() <= largest / 1000.0));
            }
        }
    }

    #[test]
    fn a_block_of_zeros_is_zero() {
        for element in Element::ALL {
            let bytes = encode(&[0.0; 32], element);
            let read = Row { bytes: &bytes, element, compact: None };
            assert!((0..32).all(|i| read.get(i) == 0.0 && read.noise(i) == 0.0));
        }
    }
}
