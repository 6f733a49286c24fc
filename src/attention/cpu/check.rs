//! Whether the kernels can run a call; what they rely on is checked here, once per plan.

#![forbid(unsafe_code)]

use super::{Unsupported, HEAD_DIM_MAX, HEAD_DIM_MIN, HEAD_DIM_STEP};
use crate::attention::{Array, Call, Problem, Row};
use crate::hadamard;
use crate::index::LayerShape;

/// Can the kernels compute this, if every row is dense?
pub fn check_problem(p: &Problem) -> Result<(), Unsupported> {
    for (what, size) in [("key", p.q.ne[0]), ("value", p.v.ne[0])] {
        if !(HEAD_DIM_MIN..=HEAD_DIM_MAX).contains(&size) || size % HEAD_DIM_STEP != 0 {
            return Err(Unsupported::HeadDim { what, size });
        }
    }
    for (what, size, element) in [("key", p.q.ne[0], p.k_type), ("value", p.v.ne[0], p.v_type)] {
        if size % element.block() != 0 {
            return Err(Unsupported::Block { what, size, element: element.name(), block: element.block() });
        }
    }
    let [_, n_query, n_head, n_stream] = p.q.ne;
    let [_, n_kv, n_head_kv, kv_stream] = p.k.ne;
    let contiguous = |what, a: &Array, want| {
        let step = a.nb[0];
        (step == want).then_some(()).ok_or(Unsupported::Stride { what, step, want })
    };
    contiguous("q", &p.q, 4)?;
    contiguous("k", &p.k, p.k_type.block_bytes())?;
    contiguous("v", &p.v, p.v_type.block_bytes())?;
    contiguous("dst", &p.dst, 4)?;
    equal("k", 0, p.k.ne[0], p.q.ne[0])?;
    equal("v", 1, p.v.ne[1], n_kv)?;
    equal("v", 2, p.v.ne[2], n_head_kv)?;
    for (dim, want) in [p.v.ne[0], n_head, n_query, n_stream].into_iter().enumerate() {
        equal("dst", dim, p.dst.ne[dim], want)?;
    }
    multiple("q", 2, n_head, n_head_kv)?;
    multiple("q", 3, n_stream, kv_stream)?;
    multiple("q", 3, n_stream, p.v.ne[3])?;
    if let Some(m) = &p.mask {
        contiguous("mask", m, 2)?;
        for (dim, want) in [(0, n_kv), (1, n_query)] {
            if m.ne[dim] < want {
                return Err(Unsupported::Shape { what: "mask", dim, got: m.ne[dim], want });
            }
        }
        multiple("mask", 2, n_head, m.ne[2])?;
        multiple("mask", 3, n_stream, m.ne[3])?;
    }
    Ok(())
}

/// Does a layer of an index have the shape of a call?
pub fn check_shape(p: &Problem, shape: &LayerShape) -> Result<(), Unsupported> {
    for (what, index, call) in [
        ("KV heads", shape.n_head_kv as usize, p.k.ne[2]),
        ("query heads per KV head", shape.n_group as usize, p.n_group()),
        ("key head size", shape.head_dim_k as usize, p.k.ne[0]),
        ("value head size", shape.head_dim_v as usize, p.v.ne[0]),
    ] {
        if index != call {
            return Err(Unsupported::Index { what, index, call });
        }
    }
    Ok(())
}

pub(super) fn check(call: &Call) -> Result<(), Unsupported> {
    let p = &call.problem;
    check_problem(p)?;
    if call.rows.len() != p.n_row() {
        return Err(Unsupported::Rows { got: call.rows.len(), want: p.n_row() });
    }
    let mut sparse = false;
    for row in call.rows.iter() {
        if let Row::Sparse(n) = row {
            sparse = true;
            if *n as usize >= call.bindings.len() {
                return Err(Unsupported::NoBinding { got: *n as usize, n: call.bindings.len() });
            }
        }
    }
    let mut end = 0;
    for (tile, rows) in call.tiles.iter().enumerate() {
        let run = call.rows.get(rows.clone()).unwrap_or_default();
        let alike = run.first().is_some_and(|row| *row != Row::Dense && run.iter().all(|r| r == row));
        if !alike || rows.len() < 2 || rows.start < end || rows.start / p.q.ne[1] != (rows.end - 1) / p.q.ne[1] {
            return Err(Unsupported::Tile { tile });
        }
        end = rows.end;
    }
    if !sparse {
        return Ok(());
    }
    if p.max_bias != 0.0 {
        return Err(Unsupported::Alibi { max_bias: p.max_bias.to_string() });
    }
    for (what, block, size) in [("K", call.rotation.k, p.q.ne[0]), ("V", call.rotation.v, p.v.ne[0])] {
        if !hadamard::fits(block, size) {
            return Err(Unsupported::Rotation { what, block, size });
        }
    }
    (0..call.bindings.len()).try_for_each(|n| binding(call, n))
}

fn binding(call: &Call, n: usize) -> Result<(), Unsupported> {
    let (p, b) = (&call.problem, &call.bindings[n]);
    let shape = b.index.layer(call.layer).ok_or(Unsupported::NoLayer { layer: call.layer })?.shape;
    check_shape(p, &shape)?;
    let meta = b.index.meta();
    if b.cells.len() != meta.n_prefix() {
        return Err(Unsupported::Binding { what: "prefix cells", got: b.cells.len(), want: meta.n_prefix() });
    }
    if b.always.len() < meta.n_sink as usize || p.k.ne[1] == 0 {
        return Err(Unsupported::Binding { what: "sink cells", got: b.always.len(), want: meta.n_sink as usize });
    }
    Ok(())
}

fn equal(what: &'static str, dim: usize, got: usize, want: usize) -> Result<(), Unsupported> {
    (got == want).then_some(()).ok_or(Unsupported::Shape { what, dim, got, want })
}

/// `got` is a multiple of `step`, which is not 0.
fn multiple(what: &'static str, dim: usize, got: usize, step: usize) -> Result<(), Unsupported> {
    (step > 0 && got.is_multiple_of(step)).then_some(()).ok_or(Unsupported::Shape { what, dim, got, want: step })
}
