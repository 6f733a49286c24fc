//! A node of the attention op as a GPU's backend sees it, which has no such op of its own.

use std::ffi::c_int;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use ggml_sys as sys;

use super::run::run_node;
use super::{numbers, OpOptions, State};
use crate::attention::Problem;
use crate::backend::runtime::Scope;
use crate::backend::stats::Reason;
use crate::backend::tensor::{Inputs, Tensor};
use crate::index::Index;

/// What a node was made with.
#[derive(Clone)]
pub struct Node {
    pub problem: Result<Problem, Reason>,
    pub index: Arc<Index>,
    pub layer: u32,
    pub scope: Arc<Scope>,
    pub options: OpOptions,
    /// One per index and layer of a context, gone with them; counts how often everything is to be verified anew.
    pub generation: Arc<AtomicU64>,
}

impl Node {
    /// The same for all nodes of an index's layer in a context, until everything is to be verified anew.
    pub fn identity(&self) -> (usize, u64) {
        (Arc::as_ptr(&self.generation) as usize, self.generation.load(Ordering::Relaxed))
    }
}

/// ggml's parameters of a custom op, if the callback is ours.
fn parameters(node: &sys::ggml_tensor) -> Option<sys::ggml_custom_op_params> {
    if node.op != sys::GGML_OP_CUSTOM {
        return None;
    }
    // SAFETY: what ggml_custom_4d has put there; any alignment will do.
    let own = unsafe { node.op_params.as_ptr().cast::<sys::ggml_custom_op_params>().read_unaligned() };
    let ours: unsafe extern "C" fn(*mut sys::ggml_tensor, c_int, c_int, *mut std::ffi::c_void) = run_node;
    own.fun.filter(|fun| *fun as usize == ours as usize).map(|_| own)
}

/// Is it a node of the attention op?
pub fn is_node(node: &sys::ggml_tensor) -> bool {
    parameters(node).is_some()
}

/// What a node of the attention op was made with; `None` for any other.
///
/// # Safety
/// The node's context lives, and its sources.
pub unsafe fn node(tensor: Tensor) -> Option<Node> {
    let own = parameters(tensor.raw())?;
    // SAFETY: user data of our callback is a state, which lives as long as its context.
    let state = unsafe { own.userdata.cast::<State>().as_ref()? };
    let inputs = Inputs::of(tensor).filter(|inputs| inputs.have_data() && tensor.has_data());
    Some(state.node(inputs.ok_or(Reason::Type).and_then(|i| i.problem(tensor.array(), numbers(tensor)))))
}

impl State {
    /// A call as a node.
    pub(super) fn node(&self, problem: Result<Problem, Reason>) -> Node {
        Node {
            problem,
            index: self.index.clone(),
            layer: self.layer,
            scope: self.shared.scope.clone(),
            options: self.shared.options,
            generation: self.generation.clone(),
        }
    }
}

/// The FLASH_ATTN_EXT node that computes the same densely, into the same memory; `None` for a node of another op.
pub fn stock_node(node: &sys::ggml_tensor) -> Option<sys::ggml_tensor> {
    parameters(node)?;
    let mut stock = *node;
    stock.op = sys::GGML_OP_FLASH_ATTN_EXT;
    stock.op_params = [0; _];
    // SAFETY: the node that was given, of which only its own numbers are read.
    let numbers = unsafe { Tensor::new(node) }.map_or([0.0; 3], numbers);
    // op_params of that op: scale, max_bias, logit_softcap as f32
    stock.op_params.iter_mut().zip(numbers).for_each(|(to, x)| *to = x.to_bits() as i32);
    Some(stock)
}

#[cfg(test)]
mod tests {
    use super::super::set_numbers;
    use super::*;

    #[test]
    fn a_node_of_ours_is_told_from_others_and_has_a_plain_twin() {
        // SAFETY: plain numbers and pointers, for all of which zero is a value.
        let mut node: sys::ggml_tensor = unsafe { std::mem::zeroed() };
        node.op = sys::GGML_OP_CUSTOM;
        node.ne = [64, 4, 2, 1];
        set_numbers(&mut node, [0.125, 0.0, 30.0]);
        assert!(!is_node(&node) && stock_node(&node).is_none());
        let own = sys::ggml_custom_op_params { fun: Some(run_node), n_tasks: 4, userdata: std::ptr::null_mut() };
        // SAFETY: as ggml_custom_4d leaves them; there is room for more.
        unsafe { node.op_params.as_mut_ptr().cast::<sys::ggml_custom_op_params>().write_unaligned(own) };
        assert!(is_node(&node));
        let stock = stock_node(&node).expect("one of ours");
        assert_eq!((stock.op, stock.ne), (sys::GGML_OP_FLASH_ATTN_EXT, [64, 4, 2, 1]));
        let numbers: Vec<f32> = stock.op_params[..3].iter().map(|x| f32::from_bits(*x as u32)).collect();
        assert_eq!(numbers, [0.125, 0.0, 30.0]);
        assert!(stock.op_params[3..].iter().all(|x| *x == 0));
        node.op = sys::GGML_OP_MUL_MAT;
        assert!(!is_node(&node));
    }
}
