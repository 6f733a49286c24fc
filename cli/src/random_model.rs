//! `sqz random-model`: a GGUF of a given shape with random weights, to measure speed where no such model can be had. A llama in
//! Q4_0, that any llama.cpp loads, with a vocabulary of bytes and of words of four letters: a text of such words has as many
//! tokens, most of which occur once. What it says means nothing.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{ensure, Context as _, Result};
use ggml_squeeze::random::split_mix;
use half::f16;

const ALIGNMENT: u64 = 32;
/// Standard deviation of the elements of queries, hence of attention's scores.
const QUERY_SIZE: f32 = 3.0;
/// `<unk>`, `<s>`, `</s>` and the 256 bytes.
const LEAST_VOCAB: u32 = 259;

/// Options of `sqz random-model`.
#[derive(Clone, Debug, clap::Args)]
pub struct RandomModelArgs {
    /// Model to write (GGUF)
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Layers, heads, widths and vocabulary of this model
    #[arg(long, value_enum, default_value = "tiny")]
    shape: Shape,
    /// Layers [default: the shape's]
    #[arg(long, value_name = "N")]
    layers: Option<u32>,
    /// Query heads
    #[arg(long, value_name = "N")]
    heads: Option<u32>,
    /// KV heads
    #[arg(long, value_name = "N")]
    kv_heads: Option<u32>,
    /// Elements per head
    #[arg(long, value_name = "N")]
    head_dim: Option<u32>,
    /// Width of the feed-forward part
    #[arg(long, value_name = "N")]
    ff: Option<u32>,
    /// Tokens in the vocabulary
    #[arg(long, value_name = "N")]
    vocab: Option<u32>,
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
}

/// Shapes by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Shape {
    /// 32 layers, 32/8 heads of 128, feed-forward 14336, vocabulary 128256
    #[value(name = "llama-3-8b")]
    Llama3,
    /// 32 layers, 32/32 heads of 128, feed-forward 11008, vocabulary 32000
    #[value(name = "mha-7b")]
    Mha7,
    /// 4 layers, 8/2 heads of 64, feed-forward 1024, vocabulary 512
    Tiny,
}

/// Sizes of a llama. The embedding has `n_head * head_dim` elements.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sizes {
    pub n_layer: u32,
    pub n_head: u32,
    pub n_head_kv: u32,
    pub head_dim: u32,
    pub n_ff: u32,
    pub n_vocab: u32,
}

impl Shape {
    pub fn sizes(self) -> Sizes {
        let of = |n_layer, n_head, n_head_kv, head_dim, n_ff, n_vocab| Sizes {
            n_layer,
            n_head,
            n_head_kv,
            head_dim,
            n_ff,
            n_vocab,
        };
        match self {
            Shape::Llama3 => of(32, 32, 8, 128, 14336, 128256),
            Shape::Mha7 => of(32, 32, 32, 128, 11008, 32000),
            Shape::Tiny => of(4, 8, 2, 64, 1024, 512),
        }
    }
}

/// The command.
///
/// # Errors
/// Sizes that no llama has, or a file that cannot be written.
pub fn run(args: &RandomModelArgs) -> Result<()> {
    let of = args.shape.sizes();
    let sizes = Sizes {
        n_layer: args.layers.unwrap_or(of.n_layer),
        n_head: args.heads.unwrap_or(of.n_head),
        n_head_kv: args.kv_heads.unwrap_or(of.n_head_kv),
        head_dim: args.head_dim.unwrap_or(of.head_dim),
        n_ff: args.ff.unwrap_or(of.n_ff),
        n_vocab: args.vocab.unwrap_or(of.n_vocab),
    };
    let bytes = write(&args.output, &sizes, args.seed)?;
    eprintln!("{}: {:.2} GB of random weights, for speed figures alone", args.output.display(), bytes as f64 / 1e9);
    Ok(())
}

/// Writes the model; the same sizes and seed give the same bytes. Returns their number.
///
/// # Errors
/// As [`run`].
pub fn write(path: &Path, sizes: &Sizes, seed: u64) -> Result<u64> {
    let Sizes { n_layer, n_head, n_head_kv, head_dim, n_ff, n_vocab } = *sizes;
    ensure!(n_layer > 0 && n_head > 0 && n_head_kv > 0, "a model has layers and heads: give 1 or more of each");
    ensure!(n_head % n_head_kv == 0, "{n_head} heads cannot share {n_head_kv} KV heads: give a divisor");
    ensure!(
        head_dim > 0 && head_dim % 32 == 0 && n_ff > 0 && n_ff % 32 == 0,
        "heads of {head_dim} and a feed-forward part of {n_ff} are not whole Q4_0 blocks: give multiples of 32"
    );
    ensure!(n_vocab >= LEAST_VOCAB, "a vocabulary of {n_vocab} lacks the bytes: give {LEAST_VOCAB} or more");
    store(path, sizes, seed).with_context(|| format!("cannot write {}", path.display()))
}

fn store(path: &Path, sizes: &Sizes, seed: u64) -> std::io::Result<u64> {
    let tensors = tensors(sizes);
    let mut head = Head::default();
    metadata(&mut head, sizes);
    let mut offset = 0u64;
    for t in &tensors {
        head.string(&t.name);
        let dims: &[u32] = if t.rows == 1 { &[t.width] } else { &[t.width, t.rows] };
        head.bytes.extend((dims.len() as u32).to_le_bytes());
        dims.iter().for_each(|&n| head.bytes.extend(u64::from(n).to_le_bytes()));
        head.bytes.extend(if t.deviation == 0.0 { 0u32 } else { 2 }.to_le_bytes());
        head.bytes.extend(offset.to_le_bytes());
        offset += t.bytes().next_multiple_of(ALIGNMENT);
    }
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    file.write_all(b"GGUF")?;
    file.write_all(&3u32.to_le_bytes())?;
    file.write_all(&(tensors.len() as u64).to_le_bytes())?;
    file.write_all(&head.n_key.to_le_bytes())?;
    file.write_all(&head.bytes)?;
    let start = (24 + head.bytes.len() as u64).next_multiple_of(ALIGNMENT);
    file.write_all(&vec![0; (start - 24) as usize - head.bytes.len()])?;
    let mut state = seed;
    for t in &tensors {
        let mut buffer = Vec::new();
        for _ in 0..t.rows {
            buffer.clear();
            t.row(&mut state, &mut buffer);
            file.write_all(&buffer)?;
        }
        file.write_all(&vec![0; (t.bytes().next_multiple_of(ALIGNMENT) - t.bytes()) as usize])?;
    }
    file.flush()?;
    Ok(start + offset)
}

/// One tensor of `rows` rows.
struct Tensor {
    name: String,
    width: u32,
    rows: u32,
    /// Standard deviation of its elements, in Q4_0; 0: F32 ones.
    deviation: f32,
}

impl Tensor {
    fn bytes(&self) -> u64 {
        let row = if self.deviation == 0.0 { 4 * self.width } else { self.width / 32 * 18 };
        u64::from(row) * u64::from(self.rows)
    }

    fn row(&self, state: &mut u64, out: &mut Vec<u8>) {
        if self.deviation == 0.0 {
            (0..self.width).for_each(|_| out.extend(1f32.to_le_bytes()));
            return;
        }
        // 4-bit steps of -7 to 7 from uniform bits, 0 twice as often as the others: their variance is 2 * 140 / 16.
        let scale = f16::from_f32(self.deviation / 17.5f32.sqrt()).to_le_bytes();
        for _ in 0..self.width / 32 {
            out.extend(scale);
            out.extend(symmetric(split_mix(state)).to_le_bytes());
            out.extend(symmetric(split_mix(state)).to_le_bytes());
        }
    }
}

/// Nibbles of 0 (a step of -8, which has no opposite) become 8, a step of 0: else all weights would lean to one side, and
/// every layer would add to it.
fn symmetric(bits: u64) -> u64 {
    const LOW: u64 = 0x1111_1111_1111_1111;
    let some = bits | bits >> 1 | bits >> 2 | bits >> 3;
    bits | (!some & LOW) << 3
}

/// Every matrix maps numbers of unit variance, as RMS norms give them, to such numbers again: activations stay finite however
/// many layers there are. Queries are larger, so that some keys stand out as in real models: attention to all alike would give means of
/// values near zero, whose rounding the check of a capture takes for an error.
fn tensors(sizes: &Sizes) -> Vec<Tensor> {
    let (embd, kv) = (sizes.n_head * sizes.head_dim, sizes.n_head_kv * sizes.head_dim);
    let matrix = |name: String, width: u32, rows: u32| {
        let size = if name.ends_with("attn_q") { QUERY_SIZE } else { 1.0 };
        let deviation = if name == "token_embd" { 1.0 } else { size / (width as f32).sqrt() };
        Tensor { name: name + ".weight", width, rows, deviation }
    };
    let norm = |name: String| Tensor { name: name + ".weight", width: embd, rows: 1, deviation: 0.0 };
    let mut all = vec![matrix("token_embd".into(), embd, sizes.n_vocab)];
    for i in 0..sizes.n_layer {
        let name = |what: &str| format!("blk.{i}.{what}");
        all.push(norm(name("attn_norm")));
        all.push(matrix(name("attn_q"), embd, embd));
        all.push(matrix(name("attn_k"), embd, kv));
        all.push(matrix(name("attn_v"), embd, kv));
        all.push(matrix(name("attn_output"), embd, embd));
        all.push(norm(name("ffn_norm")));
        all.push(matrix(name("ffn_gate"), embd, sizes.n_ff));
        all.push(matrix(name("ffn_up"), embd, sizes.n_ff));
        all.push(matrix(name("ffn_down"), sizes.n_ff, embd));
    }
    all.push(norm("output_norm".into()));
    all.push(matrix("output".into(), embd, sizes.n_vocab));
    all
}

/// Keys of a GGUF header, then what follows them.
#[derive(Default)]
struct Head {
    bytes: Vec<u8>,
    n_key: u64,
}

impl Head {
    fn string(&mut self, text: &str) {
        self.bytes.extend((text.len() as u64).to_le_bytes());
        self.bytes.extend(text.as_bytes());
    }

    fn key(&mut self, key: &str, kind: u32) {
        self.n_key += 1;
        self.string(key);
        self.bytes.extend(kind.to_le_bytes());
    }

    fn str(&mut self, key: &str, value: &str) {
        self.key(key, 8);
        self.string(value);
    }

    fn u32(&mut self, key: &str, value: u32) {
        self.key(key, 4);
        self.bytes.extend(value.to_le_bytes());
    }

    fn f32(&mut self, key: &str, value: f32) {
        self.key(key, 6);
        self.bytes.extend(value.to_le_bytes());
    }

    fn array(&mut self, key: &str, kind: u32, n: u32) {
        self.key(key, 9);
        self.bytes.extend(kind.to_le_bytes());
        self.bytes.extend(u64::from(n).to_le_bytes());
    }
}

/// Piece `i` of the `n` that follow the bytes: pairs of letters, the same behind a space, and words of two pairs behind a space. All
/// scores are equal, so llama.cpp merges from left to right: a word's first pair, the space with it, the second pair, the word.
fn piece(i: u32, n: u32) -> String {
    const LETTERS: u32 = 26;
    // As few pairs as leave no piece without a word.
    let n_pair = (1..LETTERS * LETTERS).find(|p| p * (p + 2) >= n).unwrap_or(LETTERS * LETTERS);
    let pair = |k: u32| -> String { [k / LETTERS, k % LETTERS].iter().map(|c| char::from(b'a' + *c as u8)).collect() };
    let word = i.saturating_sub(2 * n_pair);
    match i / n_pair {
        0 => pair(i),
        1 => format!("\u{2581}{}", pair(i - n_pair)),
        _ if word < n_pair * n_pair => format!("\u{2581}{}{}", pair(word / n_pair), pair(word % n_pair)),
        _ => format!("[{i}]"),
    }
}

fn metadata(head: &mut Head, sizes: &Sizes) {
    let n = sizes.n_vocab;
    head.str("general.architecture", "llama");
    head.str("general.name", "random weights");
    head.u32("general.file_type", 2); // mostly Q4_0
    head.u32("general.quantization_version", 2);
    head.u32("llama.context_length", 131072);
    head.u32("llama.embedding_length", sizes.n_head * sizes.head_dim);
    head.u32("llama.block_count", sizes.n_layer);
    head.u32("llama.feed_forward_length", sizes.n_ff);
    head.u32("llama.attention.head_count", sizes.n_head);
    head.u32("llama.attention.head_count_kv", sizes.n_head_kv);
    head.f32("llama.attention.layer_norm_rms_epsilon", 1e-5);
    head.u32("llama.rope.dimension_count", sizes.head_dim);
    head.f32("llama.rope.freq_base", 500000.0);
    head.u32("llama.vocab_size", n);
    head.str("tokenizer.ggml.model", "llama");
    head.array("tokenizer.ggml.tokens", 8, n);
    for i in 0..n {
        head.string(&match i {
            0 => "<unk>".to_string(),
            1 => "<s>".to_string(),
            2 => "</s>".to_string(),
            3..LEAST_VOCAB => format!("<0x{:02X}>", i - 3),
            _ => piece(i - LEAST_VOCAB, n - LEAST_VOCAB),
        });
    }
    head.array("tokenizer.ggml.scores", 6, n);
    (0..n).for_each(|_| head.bytes.extend(0f32.to_le_bytes()));
    head.array("tokenizer.ggml.token_type", 5, n);
    for i in 0..n {
        // llama.cpp's types: unknown, control, byte, normal
        let kind: i32 = match i {
            0 => 2,
            1 | 2 => 3,
            3..LEAST_VOCAB => 6,
            _ => 1,
        };
        head.bytes.extend(kind.to_le_bytes());
    }
    head.u32("tokenizer.ggml.bos_token_id", 1);
    head.u32("tokenizer.ggml.eos_token_id", 2);
    head.u32("tokenizer.ggml.unknown_token_id", 0);
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn steps_lean_to_no_side() {
        let (mut state, mut sum, mut square, mut n) = (1, 0i64, 0i64, 0);
        for _ in 0..10000 {
            let bits = symmetric(split_mix(&mut state));
            for i in 0..16 {
                let step = (bits >> (4 * i) & 15) as i64 - 8;
                assert!(step > -8);
                (sum, square, n) = (sum + step, square + step * step, n + 1);
            }
        }
        let (mean, variance) = (sum as f64 / n as f64, square as f64 / n as f64);
        assert!(mean.abs() < 0.05 && (variance - 17.5).abs() < 0.3, "mean {mean}, variance {variance}");
    }

    #[test]
    fn no_piece_comes_twice() {
        for n in [1, 2, 3, 4, 253, 31741, 127997, 458329, 458330] {
            let pieces: HashSet<String> = (0..n).map(|i| piece(i, n)).collect();
            assert_eq!(pieces.len(), n as usize);
        }
    }

    #[test]
    fn the_seed_alone_makes_the_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let sizes = Sizes { n_layer: 1, ..Shape::Tiny.sizes() };
        let make = |seed| {
            let path = folder.path().join("model.gguf");
            let n = write(&path, &sizes, seed).unwrap();
            let bytes = std::fs::read(path).unwrap();
            assert_eq!(bytes.len() as u64, n);
            bytes
        };
        let one = make(1);
        assert!(make(1) == one && make(2) != one);
    }

    #[test]
    fn sizes_of_no_model_are_refused_before_anything_is_written() {
        let path = Path::new("/proc/none/x.gguf");
        for (sizes, word) in [
            (Sizes { n_head_kv: 3, ..Shape::Tiny.sizes() }, "divisor"),
            (Sizes { head_dim: 40, ..Shape::Tiny.sizes() }, "32"),
            (Sizes { n_vocab: 100, ..Shape::Tiny.sizes() }, "259"),
            (Shape::Tiny.sizes(), "cannot write"),
        ] {
            let error = format!("{:#}", write(path, &sizes, 1).unwrap_err());
            assert!(error.contains(word), "{error}");
        }
    }
}
