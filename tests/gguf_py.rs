//! Another reader agrees: gguf-py, from PyPI, opens an index and finds its keys and tensors. Needs python3, and the network
//! once (a virtual environment under target/ is kept).

use std::path::{Path, PathBuf};
use std::process::Command;

use ggml_squeeze::index::sample::{add_coarse, sample_parts};
use ggml_squeeze::index::{to_bytes, IndexParts, FORMAT_VERSION};

const GGUF: &str = "gguf==0.19.0";

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?} does not start: {e}"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{command:?}\n{}{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

/// A python with gguf-py, made once.
fn python() -> PathBuf {
    let venv = Path::new(env!("CARGO_TARGET_TMPDIR")).join("gguf-py");
    let python = venv.join("bin/python");
    let stamp = venv.join("installed");
    if std::fs::read_to_string(&stamp).ok().as_deref() != Some(GGUF) {
        run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&venv));
        run(Command::new(&python).args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", GGUF]));
        std::fs::write(stamp, GGUF).unwrap();
    }
    python
}

fn words<T: Copy, const N: usize>(values: &[T], bytes: fn(T) -> [u8; N]) -> Vec<u8> {
    values.iter().flat_map(|x| bytes(*x)).collect()
}

/// What gguf-py is to find: name and raw bytes.
fn expected(parts: &IndexParts) -> Vec<(String, Vec<u8>)> {
    let meta = &parts.meta;
    let layer = &parts.layers[1];
    let half = |values: &[half::f16]| words(values, half::f16::to_le_bytes);
    let members: Vec<u16> = layer.members.iter().map(|m| *m as u16).collect();
    [
        ("key.general.type", b"squeeze-index".to_vec()),
        ("key.squeeze.version", FORMAT_VERSION.to_le_bytes().to_vec()),
        ("key.squeeze.model.name", meta.model.name.clone().into_bytes()),
        ("key.squeeze.rope.freq_base", meta.rope.freq_base.to_le_bytes().to_vec()),
        ("key.squeeze.prefix.tokens", words(&meta.tokens, i32::to_le_bytes)),
        ("key.squeeze.build.seed", meta.build.seed.to_le_bytes().to_vec()),
        ("key.squeeze.dense.reason", meta.dense_layers[0].1.clone().into_bytes()),
        ("key.squeeze.layer.n_cluster", words(&[5u32, 5], u32::to_le_bytes)),
        ("tensor.blk.1.centroids", half(&layer.centroids)),
        ("tensor.blk.1.mean_values", half(&layer.mean_values)),
        ("tensor.blk.1.variances", layer.variances.clone()),
        ("tensor.blk.1.radii", words(&layer.radii, f32::to_le_bytes)),
        ("tensor.blk.1.offsets", words(&layer.offsets, u32::to_le_bytes)),
        ("tensor.blk.1.members", words(&members, u16::to_le_bytes)),
        ("tensor.blk.1.coarse_offsets", words(&layer.coarse_offsets, u32::to_le_bytes)),
        ("tensor.sketch.k", half(&parts.sketch.k)),
        ("tensor.sketch.v_peaks", half(&parts.sketch.v_peaks)),
        ("tensor.probe.1.k", half(&parts.probes[0].k)),
    ]
    .map(|(name, bytes)| (name.to_string(), bytes))
    .to_vec()
}

fn shapes() -> String {
    let layer = |n: u32| {
        format!(
            "blk.{n}.centroids F16 4 5 2\nblk.{n}.mean_values F16 3 5 2\nblk.{n}.variances I8 4 5 2\n\
             blk.{n}.variance_scales F32 5 2\nblk.{n}.radii F32 5 2\nblk.{n}.offsets I32 6 2\nblk.{n}.members I16 18 2\n\
             blk.{n}.coarse_offsets I32 3 2\n"
        )
    };
    let rest = "sketch.k_dims I32 8\nsketch.v_dims I32 6\nsketch.k F16 8 24\nsketch.v F16 6 24\n\
                sketch.k_peaks F16 1 24\nsketch.v_peaks F16 1 24\n\
                probe.1.tokens I32 4\nprobe.1.k F16 8 4\n";
    [layer(0), layer(1), rest.to_string()].concat()
}

#[test]
fn gguf_py_reads_what_was_written() {
    let mut parts = sample_parts(7, 24, 2, 2, 4, 3, 5);
    add_coarse(&mut parts, 8, 2);
    let folder = tempfile::tempdir().unwrap();
    let index = folder.path().join("a.sqz.gguf");
    std::fs::write(&index, to_bytes(&parts).unwrap()).unwrap();
    let wanted = folder.path().join("expected");
    std::fs::create_dir(&wanted).unwrap();
    let arrays = expected(&parts);
    for (name, bytes) in &arrays {
        std::fs::write(wanted.join(name), bytes).unwrap();
    }
    std::fs::write(wanted.join("shapes.txt"), shapes()).unwrap();

    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/gguf_py.py");
    let said = run(Command::new(python()).arg(script).arg(&index).arg(&wanted));
    assert_eq!(said.trim(), format!("{} arrays and 24 shapes agree", arrays.len()));
}
