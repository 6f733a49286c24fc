//! Pictures of a report, as SVG that stands in a page: text takes the page's colour, and grounds are clear, so that light and dark
//! pages show the same picture.

use anyhow::{anyhow, Result};
use plotters::prelude::*;

use crate::plot::font;

/// Pixels of a picture; a page scales it.
const SIZE: (u32, u32) = (760, 460);
/// Width of the names beside it.
const NAMES: i32 = 220;
/// Stands for the page's colour of text until the end.
const INK: RGBColor = RGBColor(1, 2, 3);
const INK_AS_WRITTEN: &str = "#010203";
const GRID: RGBColor = RGBColor(136, 142, 150);
/// Colours of series, legible on white and on black.
const COLOURS: [RGBColor; 12] = [
    RGBColor(47, 125, 209),
    RGBColor(226, 106, 44),
    RGBColor(52, 152, 92),
    RGBColor(176, 92, 190),
    RGBColor(196, 150, 30),
    RGBColor(214, 74, 96),
    RGBColor(38, 158, 168),
    RGBColor(130, 118, 220),
    RGBColor(148, 120, 92),
    RGBColor(120, 160, 48),
    RGBColor(206, 96, 152),
    RGBColor(110, 130, 150),
];

/// A point with the ends of its interval.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    pub x: f64,
    pub y: f64,
    pub low: f64,
    pub high: f64,
}

/// Points of one name, in order of x.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    pub name: String,
    /// Number of its colour: the same in all pictures of a page.
    pub colour: usize,
    pub points: Vec<Point>,
}

/// What is drawn.
pub struct Chart<'a> {
    pub title: String,
    pub x: &'a str,
    pub y: &'a str,
    /// The y axis is logarithmic: points at 0 are left out.
    pub log: bool,
    /// A level to compare with, and its name.
    pub level: Option<(&'a str, f64)>,
    pub lines: Vec<Line>,
}

fn text(size: i32) -> TextStyle<'static> {
    TextStyle::from(("sans-serif", size).into_font()).color(&INK)
}

/// Two digits that count.
fn short(y: f64) -> String {
    let digits = (1.0 - y.abs().max(1e-12).log10().floor()).clamp(0.0, 12.0) as usize;
    let text = format!("{y:.digits$}");
    if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.').to_string()
    } else {
        text
    }
}

/// Draws a chart.
///
/// # Errors
/// plotters cannot, which is an error of ours.
pub fn draw(chart: &Chart<'_>) -> Result<String> {
    font()?;
    let mut out = String::new();
    {
        let root = SVGBackend::with_string(&mut out, SIZE).into_drawing_area();
        draw_on(&root, chart).and_then(|()| root.present()).map_err(|e| anyhow!("cannot draw {}: {e}", chart.title))?;
    }
    // A picture inside a page needs no name space, scales with its frame, and takes the colour of text.
    let ink = [format!("\"{INK_AS_WRITTEN}\""), format!("\"{INK_AS_WRITTEN};")];
    let body = out.find("<svg").map_or("", |at| &out[at..]);
    let end = body.find('>').unwrap_or(0);
    let title = chart.title.replace('&', "&amp;").replace('<', "&lt;").replace('"', "&quot;");
    let head = format!("<svg viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{title}\"", SIZE.0, SIZE.1);
    Ok(format!("{head}{}", &body[end..]).replace(&ink[0], "\"currentColor\"").replace(&ink[1], "\"currentColor;"))
}

fn draw_on<DB: DrawingBackend>(
    root: &DrawingArea<DB, plotters::coord::Shift>,
    chart: &Chart<'_>,
) -> Result<(), DrawingAreaErrorKind<DB::ErrorType>> {
    root.draw(&Text::new(chart.title.clone(), (8, 8), text(18)))?;
    let usable = |p: &&Point| p.x.is_finite() && p.y.is_finite() && (!chart.log || p.y > 0.0);
    let lines: Vec<(Vec<Point>, &Line)> =
        chart.lines.iter().map(|l| (l.points.iter().filter(usable).copied().collect(), l)).collect();
    let all = || lines.iter().flat_map(|l| &l.0);
    let fold = |of: &dyn Fn(&Point) -> f64, start: f64, f: fn(f64, f64) -> f64| all().map(of).fold(start, f);
    let right = fold(&|p| p.x, f64::NEG_INFINITY, f64::max);
    let left = fold(&|p| p.x, f64::INFINITY, f64::min);
    let (left, right) = if left < right { (left, right) } else { (0.0, 1.0) };
    let pad = 0.04 * (right - left);
    let level = chart.level.map(|l| l.1).filter(|y| !chart.log || *y > 0.0);
    let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
    for p in all() {
        // The whole interval is shown; on a logarithmic axis as far as it has a place there.
        low = low.min(if chart.log && p.low <= 0.0 { p.y / 2.0 } else { p.low.min(p.y) });
        high = high.max(p.high.max(p.y));
    }
    if let Some(y) = level {
        (low, high) = (low.min(y), high.max(y));
    }
    if !(low.is_finite() && high.is_finite()) {
        (low, high) = (0.1, 1.0);
    }
    let (width, height) = root.dim_in_pixel();
    let (plot, names) = root.split_horizontally(width as i32 - NAMES);
    let area = plot.margin(34, 4, 4, 8);
    // Logarithms are drawn on an even axis, so that both kinds are one.
    let scale = |y: f64| if chart.log { y.max(1e-12).log10() } else { y };
    let (mut low, mut high) = (scale(low), scale(high));
    let margin = 0.05 * (high - low).max(1e-6);
    (low, high) = (low - margin, high + margin);
    let mut on = ChartBuilder::on(&area)
        .x_label_area_size(46)
        .y_label_area_size(66)
        .build_cartesian_2d(left - pad..right + pad, low..high)?;
    on.configure_mesh()
        .bold_line_style(GRID.mix(0.35))
        .light_line_style(TRANSPARENT)
        .axis_style(GRID)
        .label_style(text(13))
        .axis_desc_style(text(14))
        .x_labels(8)
        .y_labels(7)
        .x_desc(chart.x)
        .y_desc(chart.y)
        .x_label_formatter(&|x| if (right - left) > 3.0 { format!("{x:.0}") } else { format!("{x:.2}") })
        .y_label_formatter(&|y| match chart.log {
            true => short(10f64.powf(*y)),
            false => format!("{y:.2}"),
        })
        .draw()?;
    if let Some(y) = level {
        let ends = [(left - pad, scale(y)), (right + pad, scale(y))];
        on.draw_series(DashedLineSeries::new(ends, 6, 4, INK.mix(0.7).stroke_width(1)))?;
    }
    for (points, line) in &lines {
        let colour = COLOURS[line.colour % COLOURS.len()];
        on.draw_series(LineSeries::new(points.iter().map(|p| (p.x, scale(p.y))), colour.stroke_width(2)))?;
        on.draw_series(points.iter().map(|p| Circle::new((p.x, scale(p.y)), 3, colour.filled())))?;
        let bars = points.iter().filter(|p| p.high > p.low).map(|p| {
            let bottom = if chart.log && p.low <= 0.0 { low } else { scale(p.low).max(low) };
            PathElement::new([(p.x, bottom), (p.x, scale(p.high))], colour.mix(0.55).stroke_width(1))
        });
        on.draw_series(bars)?;
    }
    let mut at = 40;
    let step = ((height as i32 - 60) / (lines.len() as i32 + 1)).clamp(12, 22);
    for (_, line) in lines.iter().filter(|l| !l.0.is_empty()) {
        let colour = COLOURS[line.colour % COLOURS.len()];
        names.draw(&PathElement::new([(4, at + 7), (26, at + 7)], colour.stroke_width(3)))?;
        names.draw(&Text::new(line.name.clone(), (32, at), text(13)))?;
        at += step;
    }
    if let (Some((name, _)), Some(_)) = (chart.level, level) {
        names.draw(&PathElement::new([(4, at + 7), (12, at + 7)], INK.mix(0.7).stroke_width(1)))?;
        names.draw(&PathElement::new([(17, at + 7), (26, at + 7)], INK.mix(0.7).stroke_width(1)))?;
        names.draw(&Text::new(name.to_string(), (32, at), text(13)))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(log: bool, points: Vec<Point>) -> String {
        let line = Line { name: "a <line>".into(), colour: 3, points };
        let title = "T & \"t\"".to_string();
        draw(&Chart { title, x: "x axis", y: "y axis", log, level: Some(("dense", 0.5)), lines: vec![line] }).unwrap()
    }

    fn point(x: f64, y: f64) -> Point {
        Point { x, y, low: y - 0.1, high: y + 0.1 }
    }

    #[test]
    fn pictures_name_what_they_show_and_take_the_pages_colour() {
        for log in [false, true] {
            let svg = chart(log, vec![point(0.1, 0.5), point(0.2, 0.05), point(0.3, 0.0)]);
            for expected in ["x axis", "y axis", "a &lt;line&gt;", "dense", "currentColor", "</svg>"] {
                assert!(svg.contains(expected), "{expected:?} is not in {svg}");
            }
            assert!(!svg.contains(INK_AS_WRITTEN) && !svg.contains("http") && svg.starts_with("<svg viewBox"));
            assert!(!svg.contains("NaN") && !svg.contains("inf"));
        }
    }

    #[test]
    fn numbers_of_a_logarithmic_axis_are_short() {
        for (y, text) in [(0.0316, "0.032"), (0.1, "0.1"), (0.00316, "0.0032"), (31.6, "32"), (1.0, "1")] {
            assert_eq!(short(y), text);
        }
    }

    #[test]
    fn nothing_and_one_point_are_drawn() {
        for points in [vec![], vec![point(0.2, 0.3)], vec![Point { x: f64::NAN, ..point(0.0, 0.0) }]] {
            assert!(chart(true, points.clone()).ends_with("</svg>\n") && chart(false, points).contains("</svg>"));
        }
    }
}
