//! Bad input: each has its own clear message, and costs the host nothing.

mod common;

use std::ffi::{CStr, CString};
use std::path::Path;
use std::ptr::null_mut;

use llama_cpp_sys_2 as sys;

use common::{build, build_with, completion, model, model_file, own_lines, plugin, sqz, stderr, text};

/// Runs `sqz build` that must fail, and returns what it says.
fn refused(folder: &Path, text: &str, output: &str, more: &[&str]) -> String {
    let input = folder.join("in.txt");
    std::fs::write(&input, text).unwrap();
    let model = model();
    let mut args = vec!["build", "-m", model.to_str().unwrap(), "-f", input.to_str().unwrap(), "-o", output];
    args.extend(more);
    let run = sqz(&args);
    assert!(!run.status.success(), "{args:?} was taken");
    stderr(&run)
}

#[test]
fn build_says_what_is_wrong_and_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("x.sqz.gguf");
    let out = out.to_str().unwrap();
    let short = refused(folder.path(), "Too short a text.", out, &[]);
    assert!(short.contains("too short") && short.contains("--window"), "{short}");
    let unwritable = refused(folder.path(), &text(900), "/proc/none/x.sqz.gguf", &[]);
    assert!(unwritable.contains("cannot write /proc/none/x.sqz.gguf"), "{unwritable}");
    let no_flash = refused(folder.path(), &text(900), out, &["-fa", "off"]);
    assert!(no_flash.contains("flash attention"), "{no_flash}");
    assert!(!Path::new(out).exists());
    let missing = sqz(&["inspect", "no-such-file.sqz.gguf"]);
    assert!(!missing.status.success() && stderr(&missing).contains("no-such-file.sqz.gguf"), "{}", stderr(&missing));
}

#[test]
fn an_index_is_verified_against_a_model() {
    let folder = tempfile::tempdir().unwrap();
    let index = build(folder.path(), &text(900), &["--rope-freq-base", "12345"]);
    let verify = |index: &Path, model: &Path| {
        sqz(&["inspect", index.to_str().unwrap(), "--verify", "-m", model.to_str().unwrap()])
    };
    let rope = verify(&index, &model());
    assert!(!rope.status.success() && stderr(&rope).contains("other RoPE base"), "{}", stderr(&rope));
    let index = build(folder.path(), &text(900), &[]);
    let own = verify(&index, &model());
    assert!(own.status.success(), "{}", stderr(&own));
    assert!(String::from_utf8_lossy(&own.stdout).ends_with("the index fits this model\n"));
    let other = verify(&index, &model_file("gemma3-270m.gguf"));
    assert!(
        !other.status.success() && stderr(&other).contains("other architecture, layers, weights"),
        "{}",
        stderr(&other)
    );
}

#[test]
fn a_host_with_a_bad_index_lives_and_stays_dense() {
    let folder = tempfile::tempdir().unwrap();
    let good = build(folder.path(), &text(900), &[]);
    let bytes = std::fs::read(&good).unwrap();
    let prompt = folder.path().join("prefix.txt");
    let dense = completion(&prompt, &[]);
    assert!(dense.status.success(), "{}", stderr(&dense));
    assert!(dense.stdout.len() > 10);

    let case = |name: &str, content: Option<Vec<u8>>| {
        let path = folder.path().join(name);
        if let Some(content) = content {
            std::fs::write(&path, content).unwrap();
        }
        path.to_str().unwrap().to_string()
    };
    let mut flipped = bytes.clone();
    *flipped.last_mut().unwrap() ^= 1;
    let mut newer = bytes.clone();
    let key = b"squeeze.version";
    let at = newer.windows(key.len()).position(|w| w == key).unwrap() + key.len() + 4;
    newer[at] += 1;
    let cases = [
        (case("truncated", Some(bytes[..bytes.len() / 2].to_vec())), "cut off"),
        (case("flipped", Some(flipped)), "checksum"),
        (case("foreign", Some(std::fs::read(model()).unwrap())), "no squeeze index"),
        (case("newer", Some(newer)), "version"),
        (case("missing", None), "no such file"),
    ];
    let plugin = plugin();
    let mut said = Vec::new();
    for (path, word) in &cases {
        let variables = [("GGML_BACKEND_PATH", &*plugin), ("GGML_SQUEEZE_INDEX", path), ("GGML_SQUEEZE_LOG", "1")];
        let run = completion(&prompt, &variables);
        assert!(run.status.success(), "{word}: {}", stderr(&run));
        assert_eq!(run.stdout, dense.stdout, "{word}: another answer than without the plugin");
        let err = stderr(&run);
        let line = own_lines(&err).next().unwrap_or_else(|| panic!("{word}: silent"));
        assert!(line.contains(&**path) && line.contains("stays dense"), "{word}: {line}");
        assert!(line.to_lowercase().contains(word), "{word}: {line}");
        said.push(line.replace(&**path, ""));
    }
    said.sort();
    said.dedup();
    assert_eq!(said.len(), cases.len(), "two cases share a message: {said:#?}");

    // an index of another model: one of another shape, and one that differs in a later layer alone
    let gemma = build_with(&model_file("gemma3-270m.gguf"), &folder.path().join("gemma"), &text(2400), &[]);
    let tuned = folder.path().join("tuned.gguf");
    scale_tensor(&model(), &tuned, c"blk.11.attn_norm.weight");
    let tuned = build_with(&tuned, &folder.path().join("tuned-index"), &text(900), &[]);
    for (path, why) in [(gemma, "elements"), (tuned, "other keys in later layers")] {
        let path = path.to_str().unwrap();
        let log = [("GGML_SQUEEZE_LOG", "1"), ("GGML_SQUEEZE_MIN_PREFIX", "0")];
        let run = completion(&prompt, &[("GGML_BACKEND_PATH", &*plugin), ("GGML_SQUEEZE_INDEX", path), log[0], log[1]]);
        let err = stderr(&run);
        assert!(run.status.success(), "{err}");
        assert_eq!(run.stdout, dense.stdout, "{why}: another answer than without the plugin");
        let said: Vec<&str> = err.lines().filter(|l| l.contains("another model")).collect();
        assert!(said.len() == 1 && said[0].contains(path) && said[0].contains(why), "{err}");
        assert!(err.lines().any(|l| l.contains("sparse 0 nodes")), "{err}");
    }

    // the same plugin with the good index is used, in the same unmodified program
    let path = good.to_str().unwrap();
    let log = [("GGML_SQUEEZE_LOG", "1"), ("GGML_SQUEEZE_MIN_PREFIX", "0")];
    let variables = [("GGML_BACKEND_PATH", &*plugin), ("GGML_SQUEEZE_INDEX", path), log[0], log[1]];
    let run = completion(&prompt, &variables);
    let err = stderr(&run);
    assert!(run.status.success() && err.contains("is bound"), "{err}");
    assert!(err.lines().any(|l| l.contains("totals:") && !l.contains("sparse 0 nodes")), "{err}");
}

/// Copies a model with the elements of an F32 tensor changed, as fine-tuning would change them, by up to a half.
fn scale_tensor(from: &Path, to: &Path, name: &CStr) {
    let mut bytes = std::fs::read(from).unwrap();
    let path = CString::new(from.to_str().unwrap()).unwrap();
    // SAFETY: a file that the library reads and describes; freed once.
    let (at, size) = unsafe {
        let gguf = sys::gguf_init_from_file(path.as_ptr(), sys::gguf_init_params { no_alloc: true, ctx: null_mut() });
        let tensor = sys::gguf_find_tensor(gguf, name.as_ptr());
        assert!(tensor >= 0 && sys::gguf_get_tensor_type(gguf, tensor) == sys::GGML_TYPE_F32);
        let at = sys::gguf_get_data_offset(gguf) + sys::gguf_get_tensor_offset(gguf, tensor);
        let size = sys::gguf_get_tensor_size(gguf, tensor);
        sys::gguf_free(gguf);
        (at, size)
    };
    for (i, x) in bytes[at..at + size].chunks_exact_mut(4).enumerate() {
        let value = f32::from_le_bytes(x.try_into().unwrap());
        x.copy_from_slice(&(value * (1.0 + 0.5 * (i as f32).sin())).to_le_bytes());
    }
    std::fs::write(to, bytes).unwrap();
}
