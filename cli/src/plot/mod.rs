//! `sqz inspect --plot`: one picture by which a person can judge an index. SVG or PNG, with a font of its own, so that a bare
//! machine draws the same.

mod draw;

use std::path::Path;
use std::sync::OnceLock;

use anyhow::{anyhow, bail, ensure, Context as _, Result};
use ggml_squeeze::config::DEFAULT_BUDGET;
use ggml_squeeze::index::{Calibration, HeadShares, Index};
use plotters::prelude::*;

use crate::inspect::{clean, size};

/// A number of each KV head of each layer.
struct Heat {
    title: String,
    /// `[layer][KV head]`, shares.
    values: Vec<Vec<f32>>,
}

/// A row of the calibration table.
struct Point {
    budget: f32,
    threshold: f32,
    /// Share of the keys and of the attention in threshold mode.
    kept: f32,
    mass: f32,
    /// Share of the attention in budget mode: mean over KV heads, and the least.
    budget_mass: f32,
    budget_least: f32,
}

/// What is drawn.
struct Picture {
    title: String,
    subtitle: String,
    /// Numbers of the layers.
    layers: Vec<u32>,
    maps: [Heat; 3],
    points: Vec<Point>,
    /// Shares of the keys and of the attention in mass mode.
    masses: Vec<(f32, f32)>,
    /// Keys of every cluster.
    sizes: Vec<u32>,
}

impl Picture {
    fn of(index: &Index) -> Result<Picture> {
        let meta = index.meta();
        let nearest = |a: &&Calibration, b: &&Calibration| {
            let far = |row: &Calibration| (row.budget - DEFAULT_BUDGET).abs();
            far(a).total_cmp(&far(b))
        };
        let shown = meta.calibration.iter().min_by(nearest);
        let shown = shown.context("the index has no calibration table to draw: build it again with `sqz build`")?;
        let heat = |title: &str, of: fn(&HeadShares) -> f32| {
            let mut heads = shown.heads.iter().map(of);
            let values = index.shapes().iter().map(|s| heads.by_ref().take(s.n_head_kv as usize).collect()).collect();
            Heat { title: format!("{title} {:.0} %", 100.0 * shown.budget), values }
        };
        let point = |row: &Calibration| Point {
            budget: row.budget,
            threshold: row.threshold,
            kept: row.kept,
            mass: row.mass,
            budget_mass: row.heads.iter().map(|h| h.budget_mass).sum::<f32>() / row.heads.len() as f32,
            budget_least: row.heads.iter().map(|h| h.budget_mass).fold(1.0, f32::min),
        };
        let views = index.shapes().iter().filter_map(|shape| index.layer(shape.layer));
        let sizes: Vec<u32> = views
            .flat_map(|v| (0..v.shape.n_head_kv as usize).flat_map(move |h| v.head_offsets(h).windows(2)))
            .map(|run| run[1] - run[0])
            .collect();
        let name = index.path().and_then(Path::file_name).map(|n| clean(&n.to_string_lossy()));
        Ok(Picture {
            title: name.unwrap_or_else(|| "index".into()),
            subtitle: format!(
                "{} ({}): prefix of {} tokens, {} layers indexed, {} clusters, {}",
                clean(&meta.model.name),
                clean(&meta.model.architecture),
                meta.n_prefix(),
                index.shapes().len(),
                sizes.len(),
                size(index.file_bytes()),
            ),
            layers: index.shapes().iter().map(|s| s.layer).collect(),
            maps: [
                heat("Attention kept by a budget of", |h| h.budget_mass),
                heat("Keys kept by the threshold for", |h| h.kept),
                heat("Attention kept by the threshold for", |h| h.mass),
            ],
            points: meta.calibration.iter().map(point).collect(),
            masses: meta.mass_targets.iter().map(|row| (row.kept, row.mass)).collect(),
            sizes,
        })
    }
}

/// Gives plotters its font: DejaVu Sans, in the program itself.
pub(crate) fn font() -> Result<()> {
    static GIVEN: OnceLock<bool> = OnceLock::new();
    let give = |style, bytes| plotters::style::register_font("sans-serif", style, bytes).is_ok();
    let given = GIVEN.get_or_init(|| {
        give(FontStyle::Normal, dejavu::sans::regular()) && give(FontStyle::Bold, dejavu::sans::bold())
    });
    ensure!(*given, "the font of the picture cannot be read");
    Ok(())
}

/// Draws an index to a file whose name ends in .svg or .png.
///
/// # Errors
/// Another ending, no calibration table, or the file cannot be written.
pub fn plot(index: &Index, path: &Path) -> Result<()> {
    let picture = Picture::of(index)?;
    font()?;
    let bytes = match path.extension().and_then(|e| e.to_str()).map(str::to_ascii_lowercase).as_deref() {
        Some("svg") => svg(&picture)?.into_bytes(),
        Some("png") => png(&picture)?,
        _ => bail!("{} names no kind of picture: end it in .svg or .png", path.display()),
    };
    std::fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))
}

fn svg(picture: &Picture) -> Result<String> {
    let mut out = String::new();
    {
        let root = SVGBackend::with_string(&mut out, draw::SIZE).into_drawing_area();
        draw::draw(&root, picture).and_then(|()| root.present()).map_err(|e| anyhow!("cannot draw the index: {e}"))?;
    }
    Ok(out)
}

fn png(picture: &Picture) -> Result<Vec<u8>> {
    let (width, height) = draw::SIZE;
    let mut pixels = vec![0; 3 * (width * height) as usize];
    {
        let root = BitMapBackend::with_buffer(&mut pixels, draw::SIZE).into_drawing_area();
        draw::draw(&root, picture).and_then(|()| root.present()).map_err(|e| anyhow!("cannot draw the index: {e}"))?;
    }
    let mut out = Vec::new();
    let mut encoder = png::Encoder::new(&mut out, width, height);
    encoder.set_color(png::ColorType::Rgb);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&pixels)?;
    writer.finish()?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ggml_squeeze::index::sample::sample_parts;
    use ggml_squeeze::index::{to_bytes, IndexParts};

    fn parts(layers: usize, heads: usize) -> IndexParts {
        let mut parts = sample_parts(3, 200, layers, heads, 4, 4, 20);
        parts.meta.model.name = "A <b>model</b> & more\u{1b}".into();
        parts
    }

    fn index(parts: &IndexParts) -> Index {
        Index::from_bytes(to_bytes(parts).unwrap()).unwrap()
    }

    #[test]
    fn the_picture_has_what_the_index_has() {
        let mut parts = parts(3, 2);
        let head = |kept, mass, budget_mass| HeadShares { kept, mass, budget_mass };
        let heads = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6].map(|x| head(x, x + 0.1, x + 0.2));
        parts.meta.calibration[2].heads = heads.to_vec();
        let picture = Picture::of(&index(&parts)).unwrap();
        let near = |a: &[Vec<f32>], b: [[f32; 2]; 3]| {
            assert!(a.iter().flatten().zip(b.iter().flatten()).all(|(a, b)| (a - b).abs() < 1e-6), "{a:?}");
            assert_eq!(a.iter().map(Vec::len).collect::<Vec<_>>(), [2, 2, 2]);
        };
        near(&picture.maps[0].values, [[0.3, 0.4], [0.5, 0.6], [0.7, 0.8]]);
        near(&picture.maps[1].values, [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]);
        near(&picture.maps[2].values, [[0.2, 0.3], [0.4, 0.5], [0.6, 0.7]]);
        assert!(picture.maps[0].title.ends_with("20 %"), "{}", picture.maps[0].title);
        let point = &picture.points[2];
        assert!((point.budget_mass - 0.55).abs() < 1e-6 && (point.budget_least - 0.3).abs() < 1e-6);
        assert_eq!((picture.layers, picture.masses.len(), picture.points.len()), (vec![0, 1, 2], 3, 4));
        assert_eq!((picture.sizes.len(), picture.sizes.iter().sum::<u32>()), (3 * 2 * 20, 3 * 2 * 159));
    }

    #[test]
    fn svg_and_png_of_small_and_large_indexes() {
        let folder = tempfile::tempdir().unwrap();
        for (layers, heads) in [(1, 1), (24, 2), (32, 32)] {
            let index = index(&parts(layers, heads));
            let (svg, png) = (folder.path().join("a.svg"), folder.path().join("a.PNG"));
            plot(&index, &svg).unwrap();
            let text = std::fs::read_to_string(&svg).unwrap();
            for expected in
                ["KV head", "Cluster sizes", "Thresholds", "probability per key", "A &lt;b&gt;model", "</svg>"]
            {
                assert!(text.contains(expected), "{expected:?} is not in the picture of {layers} x {heads}");
            }
            assert!(!text.contains('\u{1b}'));
            plot(&index, &png).unwrap();
            let mut reader =
                png::Decoder::new(std::io::BufReader::new(std::fs::File::open(&png).unwrap())).read_info().unwrap();
            assert_eq!((reader.info().width, reader.info().height), draw::SIZE);
            let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
            reader.next_frame(&mut pixels).unwrap();
            let white = pixels.chunks_exact(3).filter(|p| **p == [255; 3]).count() as f64 / (pixels.len() / 3) as f64;
            // A light ground, and something on it.
            assert!((0.3..0.9).contains(&white), "{white} of {layers} x {heads} is white");
        }
    }

    #[test]
    fn zero_thresholds_and_equal_shares_are_drawn() {
        let mut parts = parts(2, 2);
        for row in &mut parts.meta.calibration {
            row.threshold = 0.0;
            row.heads.iter_mut().for_each(|h| (h.kept, h.mass, h.budget_mass) = (1.0, 1.0, 1.0));
            (row.kept, row.mass) = (1.0, 1.0);
        }
        parts.meta.mass_targets.clear();
        let picture = Picture::of(&index(&parts)).unwrap();
        font().unwrap();
        assert!(svg(&picture).unwrap().contains("Thresholds"));
    }

    #[test]
    fn what_cannot_be_drawn_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let error = |parts: &IndexParts, name: &str| {
            format!("{:#}", plot(&index(parts), &folder.path().join(name)).unwrap_err())
        };
        assert!(error(&parts(1, 1), "a.pdf").contains(".svg or .png"));
        assert!(error(&parts(1, 1), "none/a.svg").contains("cannot write"));
        let mut without = parts(1, 1);
        without.meta.calibration.clear();
        assert!(error(&without, "a.svg").contains("no calibration table"));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
