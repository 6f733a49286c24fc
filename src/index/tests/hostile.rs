//! Files whose checksums all agree and whose contents lie. None may be accepted with a broken rule, and none may panic.

use proptest::prelude::*;

use super::*;
use crate::index::sample::{owned, touch};

fn forge() -> Forge {
    Forge::new(&to_bytes(&small()).unwrap())
}

const HUGE: [u64; 6] = [1 << 20, 1 << 32, 1 << 40, i64::MAX as u64, u64::MAX - 7, u64::MAX];

#[test]
fn huge_counts_of_keys_and_tensors() {
    for n in HUGE {
        let mut f = forge();
        f.n_kv = n;
        assert!(f.open().is_err(), "{n} keys");
        let mut f = forge();
        f.n_tensor = n;
        assert!(f.open().is_err(), "{n} tensors");
    }
}

#[test]
fn huge_lengths_of_strings_and_arrays() {
    let keys = forge().keys;
    for (key, kind, _) in &keys {
        let at = match *kind {
            gguf::STRING => 0,
            gguf::ARRAY => 4,
            _ => continue,
        };
        for n in HUGE {
            let mut f = forge();
            f.key(key)[at..at + 8].copy_from_slice(&n.to_le_bytes());
            assert!(f.open().is_err(), "{key}: {n}");
        }
    }
}

#[test]
fn unknown_and_nested_value_types() {
    for kind in [gguf::ARRAY, 13, u32::MAX] {
        let mut f = forge();
        f.key("squeeze.prefix.tokens")[..4].copy_from_slice(&kind.to_le_bytes());
        assert!(invalid(f.open()).contains("value type"));
        let mut f = forge();
        f.keys[6].1 = kind;
        assert!(f.open().is_err());
    }
}

#[test]
fn missing_doubled_swapped_and_unknown_keys() {
    let n = forge().keys.len();
    for i in 0..n {
        let mut f = forge();
        f.keys.remove(i);
        f.n_kv -= 1;
        assert!(f.open().is_err(), "without {}", forge().keys[i].0);
        let mut f = forge();
        f.keys.insert(i, f.keys[i].clone());
        f.n_kv += 1;
        assert!(f.open().is_err(), "twice {}", forge().keys[i].0);
        if i + 1 < n {
            let mut f = forge();
            f.keys.swap(i, i + 1);
            assert!(f.open().is_err(), "swapped {}", forge().keys[i].0);
        }
        let mut f = forge();
        f.keys.insert(i, ("general.author".into(), gguf::U32, vec![0; 4]));
        f.n_kv += 1;
        let what = invalid(f.open());
        assert!(what.contains("general.author"), "{what}");
    }
}

#[test]
fn names_that_are_not_utf8() {
    let mut f = forge();
    let name = f.key("squeeze.model.name");
    *name.last_mut().unwrap() = 0xff;
    assert!(invalid(f.open()).contains("UTF-8"));
    // In a key and in a tensor name: changed in the finished bytes, since a String cannot hold it.
    for text in ["squeeze.model.name", "blk.0.radii"] {
        let mut bytes = forge().bytes();
        let at = bytes.windows(text.len()).position(|w| w == text.as_bytes()).unwrap();
        bytes[at] = 0xff;
        assert!(invalid(open(&bytes)).contains("UTF-8"));
    }
}

#[test]
fn shapes_that_overflow_or_disagree() {
    for column in ["n_head_kv", "n_group", "head_dim_k", "head_dim_v", "n_cluster", "n_coarse"] {
        for n in [0, 1 << 16, 1 << 20, i32::MAX as u32, u32::MAX] {
            let mut f = forge();
            f.key(&format!("squeeze.layer.{column}"))[12..16].copy_from_slice(&n.to_le_bytes());
            if (column, n) == ("n_group", 1 << 16) {
                f.open().unwrap();
            } else {
                invalid(f.open());
            }
        }
    }
    let names: Vec<String> = forge().tensors.iter().map(|t| t.name.clone()).collect();
    for name in &names {
        for n in HUGE {
            let mut f = forge();
            *f.tensor(name).ne.last_mut().unwrap() = n;
            invalid(f.open());
            let mut f = forge();
            f.tensor(name).offset = n;
            invalid(f.open());
        }
        for dims in [vec![], vec![1; 5]] {
            let mut f = forge();
            f.tensor(name).ne = dims;
            invalid(f.open());
        }
        let mut f = forge();
        f.tensor(name).ne.push(1);
        assert!(invalid(f.open()).contains(name));
        for kind in [0, 1, 2, 24, 25, 26, 99] {
            let mut f = forge();
            if f.tensor(name).kind != kind {
                f.tensor(name).kind = kind;
                assert!(invalid(f.open()).contains(name));
            }
        }
    }
}

#[test]
fn unknown_missing_swapped_and_overlapping_tensors() {
    let names: Vec<String> = forge().tensors.iter().map(|t| t.name.clone()).collect();
    for (i, name) in names.iter().enumerate() {
        let mut f = forge();
        f.tensors[i].name.push('x');
        assert!(invalid(f.open()).contains(name));
        let mut f = forge();
        f.tensors.remove(i);
        f.n_tensor -= 1;
        invalid(f.open());
        let mut f = forge();
        f.tensors.insert(i, f.tensors[i].clone());
        f.n_tensor += 1;
        invalid(f.open());
        if i > 0 {
            let mut f = forge();
            f.tensors.swap(i, i - 1);
            invalid(f.open());
            let mut f = forge();
            f.tensors[i].offset = f.tensors[i - 1].offset;
            assert!(invalid(f.open()).contains("starts at"));
        }
    }
}

#[test]
fn padding_that_is_not_zero() {
    let bytes = to_bytes(&small()).unwrap();
    let mut f = forge();
    let padding = f.at("blk.0.mean_values") - 1;
    assert_eq!(f.data[padding], 0);
    // 2 heads x 5 clusters x 4 dimensions x 2 bytes = 80, so 16 bytes of padding follow the centroids.
    f.data[padding] = 1;
    assert!(invalid(f.open()).contains("padding after the tensor blk.0.centroids"));
    let mut last = forge();
    let used = 4 * 4 + last.at("probe.1.tokens");
    assert_eq!(used + 16, last.at("probe.1.k"));
    last.data[used] = 1;
    assert!(invalid(last.open()).contains("padding after the tensor probe.1.tokens"));
    let mut header = bytes.clone();
    let at = bytes.len() - f.data.len() - 1;
    assert_eq!(header[at], 0);
    header[at] = 1;
    assert!(reseal(&mut header));
    assert!(invalid(open(&header)).contains("padding of the header"));
}

/// Overwrites 32-bit words of a tensor.
fn set_words(f: &mut Forge, name: &str, first: usize, words: &[u32]) {
    let at = f.at(name) + 4 * first;
    f.data[at..at + 4 * words.len()].copy_from_slice(bytemuck::cast_slice(words));
}

#[test]
fn offsets_and_members_out_of_rule() {
    for (word, value) in [(0, 1), (1, 0), (1, u32::MAX), (2, 0), (5, 17), (5, 19), (6, 1), (11, u32::MAX)] {
        let mut f = forge();
        set_words(&mut f, "blk.1.offsets", word, &[value]);
        assert!(invalid(f.open()).contains("cluster offsets"), "{word} {value}");
    }
    for (word, value) in [(0, 1), (1, 0), (1, 5), (2, 4), (2, 6), (4, u32::MAX)] {
        let mut f = forge();
        set_words(&mut f, "blk.0.coarse_offsets", word, &[value]);
        assert!(invalid(f.open()).contains("coarse offsets"), "{word} {value}");
    }
    // S = 3, P - W = 21; 18 members per head.
    for value in [0u16, 2, 21, 32767, 65535] {
        for slot in [0, 17, 18, 35] {
            let mut f = forge();
            let at = f.at("blk.0.members") + 2 * slot;
            f.data[at..at + 2].copy_from_slice(&value.to_le_bytes());
            assert!(invalid(f.open()).contains("members"), "{value} in {slot}");
        }
    }
    let mut f = forge();
    let at = f.at("blk.0.members");
    let first: [u8; 2] = f.data[at..at + 2].try_into().unwrap();
    f.data[at + 34..at + 36].copy_from_slice(&first);
    assert!(invalid(f.open()).contains("members"));
}

#[test]
fn wide_members_out_of_rule_and_members_of_the_other_width() {
    let forge =
        |n_prefix| Forge::new(&to_bytes(&crate::index::sample::sample_parts(5, n_prefix, 1, 1, 1, 1, 3)).unwrap());
    let wide = forge(32768);
    wide.open().unwrap();
    // S = 16, P - W = 32668.
    for value in [0, 15, 32668, 65536 + 16, u32::MAX] {
        for slot in [0, 32651] {
            let mut f = wide.clone();
            set_words(&mut f, "blk.0.members", slot, &[value]);
            assert!(invalid(f.open()).contains("members"), "{value} in {slot}");
        }
    }
    for (n_prefix, kind, other) in [(32767, 25, 26), (32768, 26, 25)] {
        let mut f = forge(n_prefix);
        let found = std::mem::replace(&mut f.tensor("blk.0.members").kind, other);
        assert_eq!(found, kind);
        assert!(invalid(f.open()).contains("blk.0.members"), "{n_prefix}");
    }
}

#[test]
fn numbers_that_are_not_finite() {
    for (tensor, bits) in [
        ("blk.0.centroids", &[0x00, 0x7c][..]),
        ("blk.0.mean_values", &[0x01, 0x7e]),
        ("blk.1.radii", &[0, 0, 0xc0, 0x7f]),
        ("blk.1.variance_scales", &[0, 0, 0x80, 0x7f]),
        ("blk.0.radii", &[0, 0, 0x80, 0xbf]),
        ("sketch.k", &[0xff, 0x7f]),
        ("sketch.v", &[0xff, 0xff]),
        ("sketch.k_peaks", &[0x00, 0x7c]),
        ("sketch.v_peaks", &[0x00, 0xbc]),
        ("probe.1.k", &[0x00, 0x7c]),
    ] {
        let mut f = forge();
        let at = f.at(tensor);
        f.data[at..at + bits.len()].copy_from_slice(bits);
        invalid(f.open());
    }
    for key in [
        "squeeze.layer.scale",
        "squeeze.calibration.threshold",
        "squeeze.calibration.budget",
        "squeeze.calibration.head_kept",
        "squeeze.calibration.head_mass",
        "squeeze.calibration.head_budget_mass",
        "squeeze.mass.share",
        "squeeze.mass.target",
        "squeeze.mass.kept",
    ] {
        for value in [f32::NAN, f32::INFINITY, -1.0] {
            let mut f = forge();
            f.key(key)[12..16].copy_from_slice(&value.to_le_bytes());
            invalid(f.open());
        }
    }
}

#[test]
fn tokens_and_their_hash_agree() {
    let mut f = forge();
    f.key("squeeze.prefix.tokens")[12] ^= 1;
    assert!(invalid(f.open()).contains("sha256"));
    for n in [0u32, 20, 21, 22, u32::MAX] {
        let mut f = forge();
        f.key("squeeze.prefix.n_sink").copy_from_slice(&n.to_le_bytes());
        invalid(f.open());
    }
}

/// A change that a fuzzer would make, aimed at the structure.
#[derive(Clone, Debug)]
enum Mutation {
    Byte(f64, u8),
    /// A 64-bit field at any place gets an edge value.
    Word(f64, u64),
    Half(f64, u32),
    Cut(f64, usize),
    Double(f64, usize),
}

fn mutation() -> impl Strategy<Value = Mutation> {
    let edge = prop_oneof![
        Just(0u64),
        Just(1),
        Just(2),
        Just(u64::MAX),
        Just(i64::MAX as u64),
        Just(1 << 32),
        Just(u64::from(u32::MAX)),
        any::<u64>(),
        0u64..64,
    ];
    prop_oneof![
        (0.0..1.0, any::<u8>()).prop_map(|(at, x)| Mutation::Byte(at, x)),
        (0.0..1.0, edge.clone()).prop_map(|(at, x)| Mutation::Word(at, x)),
        (0.0..1.0, edge).prop_map(|(at, x)| Mutation::Half(at, x as u32)),
        (0.0..1.0, 1usize..40).prop_map(|(at, n)| Mutation::Cut(at, n)),
        (0.0..1.0, 1usize..40).prop_map(|(at, n)| Mutation::Double(at, n)),
    ]
}

fn mutate(bytes: &mut Vec<u8>, mutation: &Mutation) {
    let at = |share: f64, n: usize| (share * bytes.len().saturating_sub(n) as f64) as usize;
    match *mutation {
        Mutation::Byte(share, x) => {
            let i = at(share, 1);
            bytes[i] = x;
        }
        Mutation::Word(share, x) => {
            let i = at(share, 8);
            bytes[i..i + 8].copy_from_slice(&x.to_le_bytes());
        }
        Mutation::Half(share, x) => {
            let i = at(share, 4);
            bytes[i..i + 4].copy_from_slice(&x.to_le_bytes());
        }
        Mutation::Cut(share, n) => {
            let i = at(share, n);
            bytes.drain(i..i + n);
        }
        Mutation::Double(share, n) => {
            let i = at(share, n);
            let copy = bytes[i..i + n].to_vec();
            bytes.splice(i..i, copy);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn mutated_and_sealed_files_never_panic(mutations in prop::collection::vec(mutation(), 1..4)) {
        let mut bytes = to_bytes(&small()).unwrap();
        mutations.iter().for_each(|m| mutate(&mut bytes, m));
        reseal(&mut bytes);
        if let Ok(index) = open(&bytes) {
            // What is accepted obeys every rule: the writer, which checks owned parts, takes it too, byte for byte.
            touch(&index);
            prop_assert!(to_bytes(&owned(&index)).unwrap() == bytes);
        }
    }
}
