//! What a report shows of a made-up index.

use super::*;
use ggml_squeeze::index::sample::{add_coarse, sample_parts};
use ggml_squeeze::index::{to_bytes, write, IndexParts};

fn parts() -> IndexParts {
    let mut parts = sample_parts(7, 200, 2, 2, 4, 3, 5);
    let layer = &mut parts.layers[1];
    // 159 keys: sizes 1, 1, 1, 1, 155 and 30, 30, 30, 30, 39.
    layer.offsets = vec![0, 1, 2, 3, 4, 159, 0, 30, 60, 90, 120, 159];
    for (head, members) in layer.members.chunks_exact_mut(159).enumerate() {
        members.sort_unstable();
        assert_eq!((members[0], members[158]), (16, 174), "head {head}");
    }
    // Last, since coarse centroids follow from the sizes.
    add_coarse(&mut parts, 8, 2);
    let head = |kept, mass, budget_mass| HeadShares { kept, mass, budget_mass };
    parts.meta.calibration[2].heads =
        vec![head(0.125, 0.5, 0.75), head(0.125, 0.5, 0.75), head(0.125, 0.75, 0.625), head(0.375, 1.0, 0.875)];
    parts
}

fn index(parts: &IndexParts) -> Index {
    Index::from_bytes(to_bytes(parts).unwrap()).unwrap()
}

#[test]
fn the_text_shows_what_was_indexed() {
    let text = render(&index(&parts()));
    for expected in [
        "model       Sample (llama), 3 layers\n",
        "rope        type 2, base 10000, scale 1\n",
        "prefix      200 tokens: 16 sinks, 159 clustered, 25 window\n",
        "chat raw, cache f16/f16\n",
        "sketch      layer 0, 8 elements of K and 6 of V per token, within 3.0 %\n",
        "probes      4 rows of layer 1\n",
        "| 20.0 % | 75.0 % | 62.5 % | 5.000e-4 | 20.0 % | 12.5 % to 37.5 % | 44.7 % |",
        "| 90.0 % | 0.8100 | 30.0 % |",
        "total: 2 layers, 20 clusters, ",
        // 200 tokens, 2 layers, 2 heads of 4 and 3 halves
        " % of K and V of the prefix in these layers (11.2 KB in F16)",
        "| sliding window of 512 |",
    ] {
        let squeezed = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(squeezed(&text).contains(&squeezed(expected)), "{expected:?} is not in\n{text}");
    }
}

#[test]
fn the_layer_table_has_sizes_and_kept_shares() {
    let text = render(&index(&parts()));
    let cells = |line: &str| line.split('|').map(|cell| cell.trim().to_string()).collect::<Vec<_>>();
    let head = text.lines().find(|line| line.contains("kv heads")).map(cells).unwrap();
    let row = text.lines().skip_while(|line| !line.contains("kv heads")).nth(3).map(cells).unwrap();
    let cell = |name: &str| row[head.iter().position(|h| h == name).unwrap()].as_str();
    let shape = ["layer", "kv heads", "group", "dim k", "dim v", "clusters", "coarse"].map(cell);
    assert_eq!(shape, ["1", "2", "2", "4", "3", "5", "2"]);
    let cells = ["mean", "p99", "max", "kept @ 20.0 %", "mass @ 20.0 %"].map(cell);
    assert_eq!(cells, ["31.8", "155", "155", "25.0 %", "87.5 %"]);
    let widths: Vec<usize> = text.lines().skip_while(|l| !l.contains("kv heads")).take(4).map(|l| l.len()).collect();
    assert!(widths.iter().all(|w| *w == widths[0]), "{widths:?}");
}

#[test]
fn p99_leaves_out_one_in_a_hundred() {
    let mut parts = sample_parts(1, 400, 1, 1, 2, 2, 100);
    let n = parts.meta.n_clustered() as u32;
    parts.layers[0].offsets = (0..100).map(|i| 2 * i).chain([n]).collect();
    parts.layers[0].members.sort_unstable();
    let layer = &report(&index(&parts)).layers[0];
    assert_eq!((layer.size_p99, layer.size_max), (2, n - 198));
}

#[test]
fn json_has_the_same_data() {
    let index = index(&parts());
    let json: serde_json::Value = serde_json::from_str(&render_json(&index, None).unwrap()).unwrap();
    assert_eq!(json["prefix"]["clustered"], 159);
    assert_eq!(json["model"]["fingerprint"].as_str().unwrap().len(), 64);
    assert_eq!(json["layers"][1]["size_max"], 155);
    assert_eq!(json["layers"][1]["kept"][1]["share"], 0.25);
    assert_eq!(json["layers"][1]["kept"][1]["heads"][1]["budget_mass"], 0.875);
    assert_eq!(json["masses"][0]["target"], 0.25);
    assert_eq!(json["calibration"].as_array().unwrap().len(), 4);
    assert_eq!(json["dense_layers"][0]["reason"], "sliding window of 512");
    let (layers, other) = (&json["total"]["layer_bytes"], &json["total"]["other_bytes"]);
    assert_eq!(layers.as_u64().unwrap() + other.as_u64().unwrap(), index.file_bytes());
    assert_eq!(layers.as_u64().unwrap(), index.layer_bytes(0) + index.layer_bytes(1));
    assert_eq!(json["total"]["cache_bytes"], 200 * 2 * 2 * (4 + 3) * 2);
    let share = json["total"]["cache_share"].as_f64().unwrap();
    // The parser may miss the last bit.
    assert!((share - index.file_bytes() as f64 / 11200.0).abs() < 1e-12, "{share}");
}

#[test]
fn without_calibration_and_dense_layers_there_is_still_a_report() {
    let mut parts = parts();
    parts.meta.calibration.clear();
    parts.meta.mass_targets.clear();
    parts.meta.dense_layers.clear();
    let text = render(&index(&parts));
    assert!(!text.contains("kept @") && text.ends_with("dense layers\nnone\n"), "{text}");
}

#[test]
fn many_budgets_are_shown_by_the_usual_ones() {
    let row = |budget| Calibration { budget, threshold: 0.0, kept: budget, mass: 1.0, heads: vec![] };
    let rows: Vec<Calibration> = (1..=20).map(|i| row(i as f32 / 20.0)).collect();
    assert_eq!(shown(&rows).iter().map(|r| r.budget).collect::<Vec<_>>(), [0.1, 0.2, 0.5]);
    assert_eq!(shown(&rows[9..]).iter().map(|r| r.budget).collect::<Vec<_>>(), [0.5]);
}

#[test]
fn escape_sequences_are_shown_not_sent() {
    let mut parts = parts();
    parts.meta.model.name = "a\u{1b}[2Jb\nc".into();
    let text = render(&index(&parts));
    assert!(text.contains(r"a\u{1b}[2Jb\nc (llama)") && !text.contains('\u{1b}'), "{text}");
}

#[test]
fn an_error_names_the_file_and_the_cause() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.gguf");
    std::fs::write(&file, "not a GGUF").unwrap();
    let error =
        run(InspectArgs { file: file.clone(), json: false, plot: None, verify: false, model: None }).unwrap_err();
    let text = format!("{error:#}");
    assert!(text.contains("model.gguf") && text.contains("not a GGUF file"), "{text}");
    write(&file, &parts()).unwrap();
    run(InspectArgs { file, json: true, plot: None, verify: false, model: None }).unwrap();
}
