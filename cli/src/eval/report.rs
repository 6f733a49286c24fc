//! The report: one page that needs nothing else, and the same as JSON.

use anyhow::{Context as _, Result};
use minijinja::value::Serde;
use minijinja::{context, Environment, Value};
use serde::Serialize;

use super::plot::{draw, Chart, Line, Point};
use super::summary::{tasks, Answered, Numbers, Row, HEAD};
use super::variant::{Amount, How, Variant};
use crate::metrics::bootstrap::Interval;

/// What a report is about.
#[derive(Clone, Debug, Default, Serialize)]
pub struct About {
    pub model: String,
    pub cache: String,
    /// Name and tokens of each prefix.
    pub prefixes: Vec<(String, usize)>,
    pub version: String,
    pub command: String,
    pub date: String,
    /// Questions that have all of their results, and all there are.
    pub answered: usize,
    pub asked: usize,
}

#[derive(Serialize)]
struct Said<'a> {
    variant: &'a str,
    answer: &'a str,
    score: Option<f64>,
    kl: f64,
    bytes: f64,
}

#[derive(Serialize)]
struct Each<'a> {
    id: &'a str,
    task: &'a str,
    prefix: &'a str,
    depth: Option<f64>,
    prompt: &'a str,
    want: String,
    dense: &'a str,
    dense_score: Option<f64>,
    said: Vec<Said<'a>>,
}

fn each<'a>(variants: &'a [Variant], answered: &'a [Answered]) -> Vec<Each<'a>> {
    use crate::tasks::Want;
    let want = |want: &Want| match want {
        Want::Nothing => String::new(),
        Want::Parts(parts) => parts.iter().map(|p| p.answer.trim()).collect::<Vec<_>>().join(" | "),
        Want::OneOf(all) | Want::Words(all) | Want::Metric(_, all) => {
            all.iter().map(|a| a.trim()).collect::<Vec<_>>().join(" | ")
        }
        Want::Text(text) => text.clone(),
    };
    let said = |a: &'a Answered| -> Vec<Said<'a>> {
        let pairs = variants.iter().zip(&a.outcomes);
        pairs
            .map(|(v, o)| Said {
                variant: &v.label,
                answer: &o.answer,
                score: o.score,
                kl: crate::metrics::mean(&o.kl),
                bytes: o.read.bytes,
            })
            .collect()
    };
    let of = |a: &'a Answered| Each {
        id: &a.question.id,
        task: &a.question.task,
        prefix: &a.prefix,
        depth: a.question.depth,
        prompt: &a.question.prompt,
        want: want(&a.question.want),
        dense: &a.reference.answer,
        dense_score: a.reference.score,
        said: said(a),
    };
    answered.iter().map(of).collect()
}

/// Everything as one JSON object.
pub fn json(about: &About, variants: &[Variant], answered: &[Answered], rows: &[Row]) -> Result<String> {
    #[derive(Serialize)]
    struct Whole<'a> {
        #[serde(flatten)]
        about: &'a About,
        variants: &'a [Variant],
        results: &'a [Row],
        questions: Vec<Each<'a>>,
    }
    let whole = Whole { about, variants, results: rows, questions: each(variants, answered) };
    Ok(serde_json::to_string_pretty(&whole)? + "\n")
}

/// Numbers of a row, of one task or all.
fn of_task<'a>(row: &'a Row, task: Option<&str>) -> Option<&'a Numbers> {
    match task {
        None => Some(&row.all),
        Some(task) => row.tasks.iter().find(|t| t.task == task).map(|t| &t.numbers),
    }
}

/// Lines of the series that are named, in the order of `names`.
fn lines(rows: &[Row], names: &[String], task: Option<&str>, y: &dyn Fn(&Numbers) -> Option<Interval>) -> Vec<Line> {
    let line = |(colour, name): (usize, &String)| {
        let own = rows.iter().filter(|r| r.series == *name).filter_map(|r| of_task(r, task));
        let mut points: Vec<Point> =
            own.filter_map(|n| y(n).map(|i| Point { x: n.bytes, y: i.mean, low: i.low, high: i.high })).collect();
        points.sort_by(|a, b| a.x.total_cmp(&b.x));
        Line { name: name.clone(), colour, points }
    };
    names.iter().enumerate().map(line).filter(|l| !l.points.is_empty()).collect()
}

/// Series of budgets, thresholds, masses and baselines; and those of the usual selection with what was tried of it.
fn series(variants: &[Variant]) -> [Vec<String>; 2] {
    let (mut compared, mut tried): (Vec<String>, Vec<String>) = (Vec::new(), Vec::new());
    for v in variants {
        let own = matches!(v.how, How::Sparse(s) if v.series != "reference rule" && s.build.sinks > 0);
        let listed = own && (matches!(v.amount, Amount::Nominal(_)) || v.label.starts_with("budget "));
        let add = |to: &mut Vec<String>| {
            if !to.contains(&v.series) {
                to.push(v.series.clone());
            }
        };
        match v.how {
            How::Stock => {}
            _ if listed => {
                add(&mut compared);
                add(&mut tried);
            }
            How::Baseline(_) => add(&mut compared),
            _ if v.series == "reference rule" => add(&mut compared),
            _ => add(&mut tried),
        }
    }
    [compared, tried]
}

const BYTES: &str = "share of the prefix's KV bytes read";

/// Charts of divergence and score over bytes.
fn curves(rows: &[Row], names: &[String], task: Option<&str>, what: &str) -> Result<Vec<String>> {
    let kl = Chart {
        title: format!("{what}: KL divergence from dense"),
        x: BYTES,
        y: "nats per token",
        log: true,
        level: None,
        lines: lines(rows, names, task, &|n| Some(n.kl)),
    };
    let mut out = vec![draw(&kl)?];
    let dense = rows.first().and_then(|r| of_task(r, task)).and_then(|n| n.score);
    if let Some(dense) = dense {
        out.push(draw(&Chart {
            title: format!("{what}: score"),
            x: BYTES,
            y: "share right",
            log: false,
            level: Some(("dense", dense.mean)),
            lines: lines(rows, names, task, &|n| n.score),
        })?);
    }
    Ok(out)
}

/// Recall by layer of each series, at the variant whose bytes are nearest to a share.
fn layers(rows: &[Row], names: &[String], share: f64) -> Result<String> {
    let line = |(colour, name): (usize, &String)| {
        let is_measured = |r: &&Row| r.layers.iter().any(|l| l.sums.measured > 0.0);
        let own = rows.iter().filter(|r| r.series == *name).filter(is_measured);
        let far = |r: &&Row| (r.all.bytes - share).abs();
        let row = own.min_by(|a, b| far(a).total_cmp(&far(b)))?;
        let point = |l: &super::store::LayerSums| {
            let y = 1.0 - l.sums.missed;
            Point { x: l.layer.into(), y, low: y, high: y }
        };
        Some(Line { name: name.clone(), colour, points: row.layers.iter().map(point).collect() })
    };
    draw(&Chart {
        title: format!("Attention mass kept by layer, near {:.0} % of the bytes", 100.0 * share),
        x: "layer",
        y: "share of the prefix's mass",
        log: false,
        level: None,
        lines: names.iter().enumerate().filter_map(line).collect(),
    })
}

/// The page.
///
/// # Errors
/// A picture cannot be drawn, which is an error of ours.
pub fn html(about: &About, variants: &[Variant], answered: &[Answered], rows: &[Row]) -> Result<String> {
    let [compared, tried] = series(variants);
    let mut pictures = curves(rows, &compared, None, "All tasks")?;
    if tried.len() > 1 && tried != compared {
        pictures.extend(curves(rows, &tried, None, "One setting changed")?);
    }
    let middle = {
        let mut all: Vec<f64> = rows.iter().skip(1).map(|r| r.all.bytes).filter(|b| *b < 0.99).collect();
        all.sort_by(f64::total_cmp);
        all.get(all.len() / 2).copied()
    };
    if let Some(share) = middle {
        pictures.push(layers(rows, &compared, share)?);
        if tried.len() > 1 && tried != compared {
            pictures.push(layers(rows, &tried, share)?);
        }
    }
    let of_task = |task: &String| -> Result<Value> {
        let table: Vec<Vec<String>> = rows
            .iter()
            .filter_map(|r| {
                self::of_task(r, Some(task)).map(|n| [vec![r.variant.clone()], n.cells().to_vec()].concat())
            })
            .collect();
        let n = answered.iter().filter(|a| a.question.task == *task).count();
        Ok(context! { name => task, n, table, pictures => curves(rows, &compared, Some(task), task)? })
    };
    let by_task = tasks(answered).iter().map(of_task).collect::<Result<Vec<Value>>>()?;
    let table: Vec<Vec<String>> =
        rows.iter().map(|r| [vec![r.variant.clone()], r.all.cells().to_vec()].concat()).collect();
    let mut environment = Environment::new();
    environment.add_template("report.html", include_str!("report.html")).context("the template of the report")?;
    let page = environment.get_template("report.html")?;
    let (about, questions) = (Value::from(Serde(about)), Value::from(Serde(each(variants, answered))));
    page.render(context! { about, head => HEAD.to_vec(), table, pictures, tasks => by_task, questions })
        .context("cannot write the report")
}

#[cfg(test)]
mod tests {
    use super::super::summary::{rows, sample};
    use super::*;

    fn made() -> (About, Vec<Variant>, Vec<Answered>, Vec<Row>) {
        let variants = vec![sample::variant("budget <0.2>", "budget"), sample::variant("mass & 0.9", "mass")];
        let answered =
            vec![sample::answered("a-01", "a", 1.0, &[1.0, 0.0]), sample::answered("b-01", "b", 0.0, &[1.0, 0.5])];
        let rows = rows(&variants, &answered);
        let about = About { model: "a <model>".into(), answered: 2, asked: 3, ..About::default() };
        (about, variants, answered, rows)
    }

    /// Tags open and close in order, as far as HTML wants them to.
    fn well_formed(page: &str) {
        const VOID: [&str; 6] = ["meta", "br", "!DOCTYPE", "hr", "link", "img"];
        let mut open: Vec<&str> = Vec::new();
        let mut rest = page;
        while let Some(at) = rest.find('<') {
            rest = &rest[at + 1..];
            let end = rest.find('>').expect("a tag ends");
            let tag = &rest[..end];
            let name = tag.trim_start_matches('/').split([' ', '\n', '/']).next().unwrap();
            if tag.starts_with('/') {
                assert_eq!(open.pop(), Some(name), "{:?}", &rest[..end.min(60)]);
            } else if !tag.ends_with('/') && !VOID.contains(&name) && !tag.starts_with("!--") {
                open.push(name);
            }
            rest = &rest[end + 1..];
        }
        assert!(open.is_empty(), "{open:?} stay open");
    }

    #[test]
    fn the_page_is_whole_by_itself() {
        let (about, variants, answered, rows) = made();
        let page = html(&about, &variants, &answered, &rows).unwrap();
        well_formed(&page);
        for outside in ["http:", "https:", "src=", "<link", "@import", "url(", "<script"] {
            assert!(!page.contains(outside), "{outside} in the page");
        }
        for expected in
            ["a &lt;model&gt;", "budget &lt;0.2&gt;", "mass &amp; 0.9", "prefers-color-scheme", "<svg", "a-01", "b-01"]
        {
            assert!(page.contains(expected), "{expected} is not in the page");
        }
        assert!(page.contains("2 of 3"), "an unfinished run says so");
        assert!(page.contains("&lt;&#x2f;script&gt;"), "answers are text");
    }

    #[test]
    fn the_json_has_every_question_and_row() {
        let (about, variants, answered, rows) = made();
        let whole: serde_json::Value =
            serde_json::from_str(&json(&about, &variants, &answered, &rows).unwrap()).unwrap();
        assert_eq!(whole["results"].as_array().unwrap().len(), 3);
        assert_eq!(whole["questions"].as_array().unwrap().len(), 2);
        assert_eq!(whole["questions"][0]["said"][1]["variant"], "mass & 0.9");
        assert_eq!(whole["results"][1]["tasks"][1]["task"], "b");
    }
}
