//! The picture itself, on any of plotters' backends.

use plotters::chart::MeshStyle;
use plotters::coord::ranged1d::ValueFormatter;
use plotters::coord::types::RangedCoordf64;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::{Heat, Picture, Point};

/// Pixels of the whole picture.
pub const SIZE: (u32, u32) = (1800, 1440);

const INK: RGBColor = RGBColor(38, 43, 51);
const FAINT: RGBColor = RGBColor(112, 120, 130);
const GRID: RGBColor = RGBColor(228, 231, 235);
const BLUE: RGBColor = RGBColor(31, 95, 168);
const SKY: RGBColor = RGBColor(130, 178, 224);
const ORANGE: RGBColor = RGBColor(214, 96, 28);
const GREEN: RGBColor = RGBColor(38, 130, 84);
const FONT: &str = "sans-serif";

/// Colours of a scale from low to high, equally far apart: dark to light, so that what is low stands out.
const SCALE: [RGBColor; 6] = [
    RGBColor(49, 10, 91),
    RGBColor(123, 31, 110),
    RGBColor(196, 62, 84),
    RGBColor(240, 122, 57),
    RGBColor(250, 193, 84),
    RGBColor(253, 246, 208),
];

type Area<'a, DB> = DrawingArea<DB, Shift>;
type Drawn<DB> = Result<(), DrawingAreaErrorKind<<DB as DrawingBackend>::ErrorType>>;

fn text(size: i32) -> TextStyle<'static> {
    TextStyle::from((FONT, size).into_font()).color(&INK)
}

fn bold(size: i32) -> TextStyle<'static> {
    TextStyle::from((FONT, size, FontStyle::Bold).into_font()).color(&INK)
}

/// Draws everything.
pub fn draw<DB: DrawingBackend>(root: &Area<DB>, picture: &Picture) -> Drawn<DB> {
    root.fill(&WHITE)?;
    let (head, body) = root.split_vertically(96);
    head.draw(&Text::new(picture.title.clone(), (30, 18), bold(32)))?;
    head.draw(&Text::new(picture.subtitle.clone(), (30, 62), text(20)))?;
    let panels = body.margin(0, 16, 14, 14).split_evenly((3, 2));
    for (panel, map) in panels.iter().zip(&picture.maps) {
        heat_map(panel, map, &picture.layers)?;
    }
    recall(&panels[3], picture)?;
    sizes(&panels[4], &picture.sizes)?;
    thresholds(&panels[5], &picture.points)
}

/// A panel with its title; what is left of it.
fn panel<'a, DB: DrawingBackend>(
    area: &Area<'a, DB>,
    title: &str,
) -> Result<Area<'a, DB>, DrawingAreaErrorKind<DB::ErrorType>> {
    let area = area.margin(8, 8, 16, 16);
    area.draw(&Text::new(title.to_string(), (6, 4), bold(22)))?;
    Ok(area.margin(40, 0, 0, 0))
}

fn colour(share: f64) -> RGBColor {
    let at = share.clamp(0.0, 1.0) * (SCALE.len() - 1) as f64;
    let i = (at as usize).min(SCALE.len() - 2);
    let (low, high, part) = (SCALE[i], SCALE[i + 1], at - i as f64);
    let mix = |a: u8, b: u8| (f64::from(a) + (f64::from(b) - f64::from(a)) * part).round() as u8;
    RGBColor(mix(low.0, high.0), mix(low.1, high.1), mix(low.2, high.2))
}

/// Bounds of a colour scale: the values', widened to whole steps of 5 %.
fn bounds(values: impl Iterator<Item = f32>) -> (f64, f64) {
    let (low, high) = values.fold((1.0f32, 0.0f32), |(low, high), v| (low.min(v), high.max(v)));
    let (low, high) = ((f64::from(low) * 20.0).floor() / 20.0, (f64::from(high) * 20.0).ceil() / 20.0);
    (low.min(high - 0.05).max(0.0), high.max(low + 0.05))
}

fn percent(share: f64) -> String {
    let percent = 100.0 * share;
    if (percent - percent.round()).abs() < 0.05 {
        format!("{percent:.0} %")
    } else {
        format!("{percent:.1} %")
    }
}

/// Layers from left to right, KV heads from top to bottom, and the colour scale beside them.
fn heat_map<DB: DrawingBackend>(area: &Area<DB>, map: &Heat, layers: &[u32]) -> Drawn<DB> {
    let area = panel(area, &map.title)?;
    let (width, _) = area.dim_in_pixel();
    let (plot, bar) = area.split_horizontally(width as i32 - 104);
    let n_head = map.values.iter().map(Vec::len).max().unwrap_or(1);
    let mut chart = ChartBuilder::on(&plot)
        .x_label_area_size(58)
        .y_label_area_size(74)
        .build_cartesian_2d(-0.5..layers.len() as f64 - 0.5, n_head as f64 - 0.5..-0.5)?;
    let (low, high) = bounds(map.values.iter().flatten().copied());
    let cells = map.values.iter().enumerate().flat_map(|(x, heads)| {
        heads.iter().enumerate().map(move |(y, value)| {
            let (x, y, share) = (x as f64, y as f64, (f64::from(*value) - low) / (high - low));
            Rectangle::new([(x - 0.5, y - 0.5), (x + 0.5, y + 0.5)], colour(share).filled())
        })
    });
    chart.draw_series(cells)?;
    let whole = |x: &f64| (x - x.round()).abs() < 1e-6 && *x > -0.5;
    chart
        .configure_mesh()
        .disable_mesh()
        .axis_style(FAINT)
        .label_style(text(18))
        .axis_desc_style(text(19))
        .x_desc("layer")
        .y_desc("KV head")
        .x_labels(layers.len().min(16))
        .y_labels(n_head.min(9))
        .x_label_formatter(&|x| match layers.get(x.round().max(0.0) as usize) {
            Some(layer) if whole(x) => layer.to_string(),
            _ => String::new(),
        })
        .y_label_formatter(&|y| if whole(y) { format!("{y:.0}") } else { String::new() })
        .draw()?;
    let (_, height) = bar.dim_in_pixel();
    let (top, bottom) = (4, height as i32 - 60);
    for y in top..bottom {
        let share = 1.0 - f64::from(y - top) / f64::from(bottom - top);
        bar.draw(&Rectangle::new([(14, y), (34, y + 1)], colour(share).filled()))?;
    }
    bar.draw(&Rectangle::new([(14, top), (34, bottom)], FAINT.stroke_width(1)))?;
    let style = text(18).pos(Pos::new(HPos::Left, VPos::Center));
    for i in 0..5 {
        let value = low + (high - low) * f64::from(i) / 4.0;
        let y = bottom - (bottom - top) * i / 4;
        bar.draw(&Text::new(percent(value), (41, y.clamp(top + 8, bottom - 8)), style.clone()))?;
    }
    Ok(())
}

/// Attention mass against keys kept, in each mode.
fn recall<DB: DrawingBackend>(area: &Area<DB>, picture: &Picture) -> Drawn<DB> {
    let area = panel(area, "Attention kept for keys kept, on the window's queries")?;
    let points = &picture.points;
    let of = |x: fn(&Point) -> f32, y: fn(&Point) -> f32| -> Vec<(f64, f64)> {
        points.iter().map(|p| (f64::from(x(p)), f64::from(y(p)))).collect()
    };
    let mass: Vec<(f64, f64)> =
        picture.masses.iter().map(|(kept, mass)| (f64::from(*kept), f64::from(*mass))).collect();
    let lines = [
        ("budget, mean", of(|p| p.budget, |p| p.budget_mass), BLUE),
        ("budget, least KV head", of(|p| p.budget, |p| p.budget_least), SKY),
        ("threshold, mean", of(|p| p.kept, |p| p.mass), ORANGE),
        ("mass, mean", mass, GREEN),
    ];
    let all = || lines.iter().flat_map(|l| &l.1);
    let right = all().fold(0.1f64, |m, p| m.max(p.0)).min(1.0);
    let low = all().fold(1.0f64, |m, p| m.min(p.1));
    let mut chart = ChartBuilder::on(&area)
        .x_label_area_size(58)
        .y_label_area_size(84)
        .margin_right(20)
        .build_cartesian_2d(0.0..right * 1.03, (low * 10.0).floor() / 10.0..1.0)?;
    mesh(chart.configure_mesh().x_desc("share of the prefix's keys").y_desc("share of the attention"))
        .x_label_formatter(&|x| percent(*x))
        .y_label_formatter(&|y| percent(*y))
        .draw()?;
    for (name, line, colour) in lines {
        let dots = line.clone();
        let legend = move |(x, y)| PathElement::new([(x, y), (x + 26, y)], colour.stroke_width(3));
        chart.draw_series(LineSeries::new(line, colour.stroke_width(3)))?.label(name).legend(legend);
        chart.draw_series(dots.into_iter().map(|p| Circle::new(p, 4, colour.filled())))?;
    }
    legend(&mut chart, SeriesLabelPosition::LowerRight)
}

/// The names of a chart's series.
fn legend<'a, DB: DrawingBackend + 'a>(
    chart: &mut ChartContext<'a, DB, Cartesian2d<RangedCoordf64, RangedCoordf64>>,
    at: SeriesLabelPosition,
) -> Drawn<DB> {
    chart
        .configure_series_labels()
        .position(at)
        .margin(18)
        .legend_area_size(36)
        .background_style(WHITE.mix(0.9))
        .border_style(GRID)
        .label_font(text(18))
        .draw()
}

/// Share of the clusters and of the keys by cluster size, in powers of two.
fn sizes<DB: DrawingBackend>(area: &Area<DB>, sizes: &[u32]) -> Drawn<DB> {
    let area = panel(area, "Cluster sizes, all layers and KV heads")?;
    let n_bin = sizes.iter().max().map_or(1, |max| max.ilog2() as usize + 1);
    let (mut clusters, mut keys) = (vec![0.0f64; n_bin], vec![0.0f64; n_bin]);
    let total: f64 = sizes.iter().map(|n| f64::from(*n)).sum();
    for n in sizes {
        clusters[n.ilog2() as usize] += 1.0 / sizes.len() as f64;
        keys[n.ilog2() as usize] += f64::from(*n) / total;
    }
    let top = clusters.iter().chain(&keys).fold(0.0f64, |m, x| m.max(*x));
    let mut chart = ChartBuilder::on(&area)
        .x_label_area_size(58)
        .y_label_area_size(84)
        .margin_right(20)
        .build_cartesian_2d(-0.5..n_bin as f64 - 0.5, 0.0..top * 1.15)?;
    let name = |x: &f64| match x.round() {
        i if (x - i).abs() > 1e-6 || i < 0.0 || i >= n_bin as f64 => String::new(),
        0.0 => "1".to_string(),
        i => format!("{}-{}", 1u64 << i as u32, (1u64 << (i as u32 + 1)) - 1),
    };
    mesh(chart.configure_mesh().x_desc("keys in the cluster").y_desc("share"))
        .disable_x_mesh()
        .x_labels(n_bin + 1)
        .x_label_formatter(&name)
        .y_label_formatter(&|y| percent(*y))
        .draw()?;
    for (name, shares, colour, from) in [("of the clusters", clusters, BLUE, -0.38), ("of the keys", keys, ORANGE, 0.0)]
    {
        let bars = shares.into_iter().enumerate().map(|(i, share)| {
            let x = i as f64 + from;
            Rectangle::new([(x, 0.0), (x + 0.38, share)], colour.filled())
        });
        let legend = move |(x, y)| Rectangle::new([(x, y - 6), (x + 26, y + 6)], colour.filled());
        chart.draw_series(bars)?.label(name).legend(legend);
    }
    legend(&mut chart, SeriesLabelPosition::UpperRight)
}

/// The threshold of each nominal share.
fn thresholds<DB: DrawingBackend>(area: &Area<DB>, points: &[Point]) -> Drawn<DB> {
    let area = panel(area, "Thresholds")?;
    let line: Vec<(f64, f64)> = points.iter().map(|p| (f64::from(p.budget), f64::from(p.threshold))).collect();
    let right = points.iter().fold(0.1, |m, p| f64::from(p.budget).max(m));
    // Whole decades around all of them; a threshold that is 0 has no place on the axis.
    let positive = || line.iter().map(|p| p.1).filter(|t| *t > 0.0);
    let low = 10f64.powf(positive().fold(1.0, f64::min).max(1e-12).log10().floor());
    let high = 10f64.powf(positive().fold(low * 10.0, f64::max).log10().ceil());
    let mut chart = ChartBuilder::on(&area)
        .x_label_area_size(58)
        .y_label_area_size(84)
        .margin_right(20)
        .build_cartesian_2d(0.0..right * 1.03, (low..high).log_scale())?;
    mesh(chart.configure_mesh().x_desc("nominal share of the keys").y_desc("probability per key"))
        .x_label_formatter(&|x| percent(*x))
        .y_label_formatter(&|y| format!("{y:.0e}"))
        .draw()?;
    let line: Vec<(f64, f64)> = line.into_iter().filter(|p| p.1 >= low).collect();
    chart.draw_series(LineSeries::new(line.clone(), ORANGE.stroke_width(3)))?;
    chart.draw_series(line.into_iter().map(|p| Circle::new(p, 4, ORANGE.filled())))?;
    Ok(())
}

/// The look of every chart with a grid.
fn mesh<'m, 'a, 'b, X, Y, DB>(mesh: &'m mut MeshStyle<'a, 'b, X, Y, DB>) -> &'m mut MeshStyle<'a, 'b, X, Y, DB>
where
    X: Ranged + ValueFormatter<X::ValueType>,
    Y: Ranged + ValueFormatter<Y::ValueType>,
    DB: DrawingBackend,
{
    mesh.bold_line_style(GRID)
        .light_line_style(WHITE)
        .axis_style(FAINT)
        .label_style(text(18))
        .axis_desc_style(text(19))
        .x_labels(7)
        .y_labels(7)
}
