//! A made-up prefix with the structure of real keys, and the recall of an index on it: for tests and benches. Not part of the
//! public interface.

use half::f16;
use rayon::prelude::*;

use super::matmul::dot_rows;
use super::{sampled_queries, LayerCapture, LayerScores};
use crate::attention::keys_of_share;
use crate::index::LayerView;
use crate::random::split_mix;

/// Different tokens, topics of the text, and tokens between changes of topic, on average.
const TOKENS: usize = 2000;
const TOPICS: usize = 96;
const TOPIC_LENGTH: usize = 150;
const ROPE_BASE: f64 = 10000.0;

/// Numbers of mean 0 and variance 1, nearly Gaussian.
struct Noise(u64);

impl Noise {
    fn uniform(&mut self) -> f32 {
        (split_mix(&mut self.0) >> 40) as f32 / (1u64 << 24) as f32
    }

    fn next(&mut self) -> f32 {
        ((0..4).map(|_| self.uniform()).sum::<f32>() - 2.0) * 3f32.sqrt()
    }

    fn row(&mut self, dim: usize) -> Vec<f32> {
        (0..dim).map(|_| self.next()).collect()
    }

    fn below(&mut self, n: usize) -> usize {
        (self.uniform() * n as f32) as usize % n
    }
}

/// One head's vectors before RoPE: a mean that all keys share, a part per topic, a part per token, and noise.
struct Head {
    mean: Vec<f32>,
    topics: Vec<Vec<f32>>,
    tokens: Vec<Vec<f32>>,
}

/// Rotates the pairs (i, i + dim / 2) of a row to a position, as RoPE does.
fn rope(row: &mut [f32], position: usize) {
    let half = row.len() / 2;
    for i in 0..half {
        let angle = position as f64 * ROPE_BASE.powf(-(i as f64) / half as f64);
        let (sin, cos) = (angle.sin() as f32, angle.cos() as f32);
        let (a, b) = (row[i], row[i + half]);
        (row[i], row[i + half]) = (a * cos - b * sin, a * sin + b * cos);
    }
}

/// A prefix whose keys are a shared mean (strong in the pairs that RoPE turns slowly), a topic that lasts for some hundred tokens
/// and returns, a token drawn by Zipf's law and noise, turned by RoPE; every window query looks for the keys of one
/// earlier token and its topic. The first P tokens are the same for every `n_prefix`; the window's queries differ.
pub fn prefix(
    n_prefix: usize,
    n_window: usize,
    n_head_kv: usize,
    n_group: usize,
    dim: usize,
    seed: u64,
) -> LayerCapture {
    let noise = &mut Noise(seed);
    let slow = |d: usize| (d % (dim / 2)) as f32 / (dim / 2) as f32;
    let heads: Vec<Head> = (0..n_head_kv)
        .map(|_| Head {
            mean: noise.row(dim).iter().enumerate().map(|(d, x)| 3.0 * slow(d) * x).collect(),
            topics: (0..TOPICS).map(|_| noise.row(dim)).collect(),
            tokens: (0..TOKENS).map(|_| noise.row(dim)).collect(),
        })
        .collect();
    let (mut topic, mut text) = (0, Vec::with_capacity(n_prefix));
    for _ in 0..n_prefix {
        if noise.below(TOPIC_LENGTH) == 0 {
            topic = noise.below(TOPICS);
        }
        // The density of Zipf's law is 1 / rank: its logarithm is uniform.
        let token = (TOKENS as f32).powf(noise.uniform()) as usize % TOKENS;
        text.push((topic, token, noise.0));
    }
    // As before RoPE, with the noise that the key of this token has.
    let plain = |head: usize, (topic, token, seed): (usize, usize, u64)| -> Vec<f32> {
        let (h, mut noise) = (&heads[head], Noise(seed ^ (head as u64) << 40));
        (0..dim).map(|d| h.mean[d] + 0.7 * h.topics[topic][d] + h.tokens[token][d] + 0.7 * noise.next()).collect()
    };
    let rows = |position: usize| {
        let key = |head: usize| {
            let mut row = plain(head, text[position]);
            rope(&mut row, position);
            row
        };
        (0..n_head_kv).flat_map(key).map(f16::from_f32).collect::<Vec<f16>>()
    };
    let k: Vec<f16> = (0..n_prefix).into_par_iter().flat_map_iter(rows).collect();
    let v: Vec<f16> = (0..n_prefix).flat_map(|p| noise_values(text[p].2, n_head_kv * dim)).collect();
    let noise = &mut Noise(seed ^ n_prefix as u64);
    let mut q = Vec::with_capacity(n_window * n_head_kv * n_group * dim);
    for position in n_prefix - n_window..n_prefix {
        for head in 0..n_head_kv * n_group {
            let mut row = plain(head / n_group, text[noise.below(position)]);
            // Some queries are sharp, some look almost everywhere.
            let strength = (3.0 + 3.0 * noise.uniform()) / (dim as f32).sqrt();
            row.iter_mut().for_each(|x| *x = strength * (*x + noise.next()));
            rope(&mut row, position);
            q.extend(row);
        }
    }
    LayerCapture {
        layer: 0,
        n_head_kv: n_head_kv as u32,
        n_group: n_group as u32,
        head_dim_k: dim as u32,
        head_dim_v: dim as u32,
        scale: 1.0 / (dim as f32).sqrt(),
        k,
        v,
        q,
    }
}

fn noise_values(seed: u64, n: usize) -> Vec<f16> {
    let mut noise = Noise(!seed);
    (0..n).map(|_| f16::from_f32(noise.uniform() - 0.5)).collect()
}

/// Share of the attention mass over all clustered keys that lies in the keys which budget mode keeps, and in as many best
/// keys of each KV head: means over the window's queries and all heads. `scores` are those of the index's layer `view`.
pub fn recall(view: &LayerView, scores: &LayerScores, capture: &LayerCapture, budget: f32) -> [f64; 2] {
    let c = scores.n_cluster as usize;
    let (n_head_kv, n_group) = (capture.n_head_kv as usize, capture.n_group as usize);
    let (dim, n, n_sink) = (capture.head_dim_k as usize, view.n_clustered(), scores.n_sink as usize);
    let n_window = capture.q.len() / (n_head_kv * n_group * dim);
    let queries = sampled_queries(n_window, n);
    let n_query = queries.len();
    let target = keys_of_share(budget, n + n_sink + n_window, n_window);
    let one = |i: usize| -> [f64; 2] {
        let (h, w) = (i / n_query, i % n_query);
        let keys: Vec<f32> = (n_sink..n_sink + n)
            .flat_map(|t| &capture.k[t * capture.row_k() + h * dim..][..dim])
            .map(|x| x.to_f32())
            .collect();
        let q = &capture.q[(queries[w] * n_head_kv + h) * n_group * dim..][..n_group * dim];
        let mut p = vec![0.0f32; n_group * n];
        dot_rows(q, &keys, dim, &mut p);
        let mut mass = vec![0.0f64; n];
        for row in p.chunks_exact(n) {
            let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let exp: Vec<f64> = row.iter().map(|x| f64::from((x - max) * capture.scale).exp()).collect();
            let sum: f64 = exp.iter().sum();
            mass.iter_mut().zip(exp).for_each(|(m, e)| *m += e / (sum * n_group as f64));
        }
        let own = &scores.scores[(h * n_query + w) * c..][..c];
        let mut order: Vec<usize> = (0..c).collect();
        order.sort_by(|&a, &b| own[b].total_cmp(&own[a]));
        let offsets = view.head_offsets(h);
        let (mut kept, mut found) = (n_sink, 0.0);
        for i in order {
            if kept >= target {
                break;
            }
            let run = offsets[i] as usize..offsets[i + 1] as usize;
            kept += run.len();
            found += run.map(|j| mass[view.member(h, j) as usize - n_sink]).sum::<f64>();
        }
        mass.sort_by(|a, b| b.total_cmp(a));
        [found, mass[..(kept - n_sink).min(n)].iter().sum()]
    };
    let all: Vec<[f64; 2]> = (0..n_head_kv * n_query).into_par_iter().map(one).collect();
    [0, 1].map(|i| all.iter().map(|x| x[i]).sum::<f64>() / all.len() as f64)
}
