//! What is written is what is read, and how it gets to the disk.

use proptest::prelude::*;

use super::*;

#[track_caller]
fn assert_same(parts: &IndexParts, index: &Index) {
    assert_eq!(index.meta(), &parts.meta);
    assert_eq!(index.shapes(), parts.layers.iter().map(|l| l.shape).collect::<Vec<_>>());
    for layer in &parts.layers {
        let view = index.layer(layer.shape.layer).unwrap();
        assert_eq!(view.shape, layer.shape);
        assert_eq!(view.centroids, layer.centroids);
        assert_eq!(view.mean_values, layer.mean_values);
        assert_eq!(view.variances, layer.variances);
        assert_eq!(view.variance_scales, layer.variance_scales);
        assert_eq!(view.radii, layer.radii);
        assert_eq!(view.offsets, layer.offsets);
        assert_eq!((0..view.members.len()).map(|i| view.members.get(i)).collect::<Vec<_>>(), layer.members);
        assert_eq!(view.coarse_centroids, layer.coarse_centroids);
        assert_eq!(view.coarse_offsets, layer.coarse_offsets);
        assert_eq!(view.n_clustered(), parts.meta.n_clustered());
    }
    let sketch = index.sketch();
    assert_eq!(sketch.layer, parts.sketch.layer);
    assert_eq!((sketch.k_dims, sketch.v_dims), (&parts.sketch.k_dims[..], &parts.sketch.v_dims[..]));
    assert_eq!((sketch.k, sketch.v), (&parts.sketch.k[..], &parts.sketch.v[..]));
    assert_eq!((sketch.k_block, sketch.v_block), (parts.sketch.k_block, parts.sketch.v_block));
    assert_eq!((sketch.k_peaks, sketch.v_peaks), (&parts.sketch.k_peaks[..], &parts.sketch.v_peaks[..]));
    let probes: Vec<ProbeParts> = index
        .probes()
        .iter()
        .map(|p| ProbeParts { layer: p.layer, tokens: p.tokens.to_vec(), k: p.k.to_vec() })
        .collect();
    assert_eq!(probes, parts.probes);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_shape_comes_back_equal(
        seed: u64,
        n_prefix in 4usize..300,
        layers in 1usize..4,
        heads in 1usize..4,
        dk in 1usize..20,
        dv in 1usize..20,
        fine in 0.0f64..1.0,
        coarse in 0.0f64..1.0,
        plain: bool,
    ) {
        let n = n_prefix - (n_prefix / 8).min(16) - (n_prefix / 8).min(100);
        let n_cluster = 1 + (fine * (n - 1) as f64) as usize;
        let mut parts = sample_parts(seed, n_prefix, layers, heads, dk, dv, n_cluster);
        if !plain {
            add_coarse(&mut parts, seed, 1 + (coarse * (n_cluster - 1) as f64) as usize);
        }
        let bytes = to_bytes(&parts).unwrap();
        prop_assert_eq!(&bytes, &to_bytes(&parts).unwrap());
        let index = open(&bytes).unwrap();
        assert_same(&parts, &index);
        prop_assert_eq!(index.file_bytes(), bytes.len() as u64);
    }
}

#[test]
fn a_long_prefix_has_wide_members() {
    for (n_prefix, wide) in [(32767, false), (32768, true), (70000, true)] {
        let parts = sample_parts(3, n_prefix, 1, 1, 2, 2, 9);
        let index = open(&to_bytes(&parts).unwrap()).unwrap();
        let members = index.layer(0).unwrap().members;
        assert_eq!(matches!(members, Members::U32(_)), wide, "{n_prefix}");
        assert_same(&parts, &index);
    }
}

#[test]
fn an_index_without_probes_window_sinks_or_calibration_is_valid() {
    let mut parts = sample_parts(1, 7, 1, 1, 1, 1, 7);
    assert_eq!((parts.meta.n_sink, parts.meta.n_window, parts.probes.len()), (0, 0, 0));
    parts.meta.calibration.clear();
    parts.meta.mass_targets.clear();
    parts.meta.dense_layers.clear();
    assert_same(&parts, &open(&to_bytes(&parts).unwrap()).unwrap());
}

#[test]
fn layers_are_found_by_number_and_sized() {
    let mut parts = small();
    parts.meta.n_layer = 40;
    parts.layers[0].shape.layer = 3;
    parts.layers[1].shape.layer = 30;
    parts.sketch.layer = 3;
    parts.probes[0].layer = 30;
    let index = open(&to_bytes(&parts).unwrap()).unwrap();
    assert!(index.layer(0).is_none() && index.layer(31).is_none() && index.layer(u32::MAX).is_none());
    assert_eq!(index.layer(30).unwrap().centroids, parts.layers[1].centroids);
    // 2 heads, 5 clusters of 4 and 3 dimensions, 2 coarse ones, 18 members.
    let expected = 2 * (5 * (4 * 2 + 3 * 2 + 4 + 4 + 4) + 6 * 4 + 18 * 2 + 3 * 4);
    assert_eq!((index.layer_bytes(3), index.layer_bytes(30), index.layer_bytes(4)), (expected, expected, 0));
}

#[test]
fn a_file_is_mapped_and_equal() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.sqz.gguf");
    let parts = small();
    let size = write(&path, &parts).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), to_bytes(&parts).unwrap());
    let index = Index::open(&path).unwrap();
    assert_same(&parts, &index);
    assert_eq!((index.path(), index.file_bytes()), (Some(path.as_path()), size));
    assert_eq!(open(&to_bytes(&parts).unwrap()).unwrap().path(), None);
}

#[test]
fn an_old_file_stays_readable_while_it_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.sqz.gguf");
    let (old, new) = (small(), sample_parts(9, 40, 1, 1, 4, 4, 3));
    write(&path, &old).unwrap();
    let index = Index::open(&path).unwrap();
    write(&path, &new).unwrap();
    assert_same(&old, &index);
    assert_same(&new, &Index::open(&path).unwrap());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn an_index_can_be_shared_between_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<Index>();
}

#[track_caller]
fn io_error<T: std::fmt::Debug>(result: Result<T, IndexError>, path: &std::path::Path) -> String {
    let error = result.unwrap_err();
    assert!(matches!(&error, IndexError::Io { path: found, .. } if found == path), "{error:?}");
    assert!(error.to_string().contains(&path.display().to_string()), "{error}");
    error.to_string()
}

#[test]
fn unwritable_output_is_an_error_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let parts = small();
    let missing = folder.path().join("missing/a.sqz.gguf");
    io_error(write(&missing, &parts), &missing);
    let text = io_error(write(folder.path(), &parts), folder.path());
    assert!(text.contains("folder"), "{text}");
    let long = folder.path().join("n".repeat(300));
    io_error(write(&long, &parts), &long);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
#[cfg(unix)]
fn a_device_is_written_to_and_a_socket_is_not_replaced() {
    let folder = tempfile::tempdir().unwrap();
    // A link, so that a failure costs the machine nothing.
    let null = folder.path().join("null");
    std::os::unix::fs::symlink("/dev/null", &null).unwrap();
    assert!(write(&null, &small()).unwrap() > 0);
    assert!(null.is_symlink() && crate::index::is_special(&null));
    let path = folder.path().join("socket");
    let _socket = std::os::unix::net::UnixListener::bind(&path).unwrap();
    io_error(write(&path, &small()), &path);
    assert!(crate::index::is_special(&path));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
}

#[test]
fn a_failed_rename_removes_the_temporary_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.sqz.gguf");
    std::fs::create_dir(&path).unwrap();
    // Everything is written, then a file cannot take the place of a folder.
    assert!(crate::index::write::store(&path, path.file_name().unwrap(), b"bytes").is_err());
    let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(left, [path]);
}

#[test]
fn invalid_parts_leave_the_old_file_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.sqz.gguf");
    write(&path, &small()).unwrap();
    let before = std::fs::read(&path).unwrap();
    let mut parts = small();
    parts.layers[0].radii[0] = f32::NAN;
    invalid(write(&path, &parts));
    assert_eq!(std::fs::read(&path).unwrap(), before);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn a_name_of_the_longest_length_can_be_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("n".repeat(255));
    write(&path, &small()).unwrap();
    assert_same(&small(), &Index::open(&path).unwrap());
}

#[test]
fn missing_files_and_folders_are_io_errors() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("missing.sqz.gguf");
    io_error(Index::open(&missing), &missing);
    let text = io_error(Index::open(folder.path()), folder.path());
    assert!(text.contains("not a regular file"), "{text}");
}
