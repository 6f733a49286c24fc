//! The stock CUDA backend under a patched instance: whole graphs, parts of one, and events on its stream.

use ggml_sys as sys;

use crate::attention::cuda::Event;

/// One backend's own functions, for one graph.
pub struct Stock<'a> {
    pub backend: sys::ggml_backend_t,
    pub original: &'a sys::ggml_backend_i,
}

/// A node that computes nothing and differs in every call. The stock backend captures a graph for itself once it comes a second
/// time unchanged; a part of a graph that we capture or that is computed once must not be.
pub struct Mark {
    node: Box<sys::ggml_tensor>,
    list: Vec<*mut sys::ggml_tensor>,
    calls: usize,
}

impl Default for Mark {
    fn default() -> Mark {
        // SAFETY: plain numbers and pointers, for all of which zero is a value; no operation is number 0.
        let mut node: Box<sys::ggml_tensor> = Box::new(unsafe { std::mem::zeroed() });
        (node.type_, node.op) = (sys::GGML_TYPE_F32, sys::GGML_OP_NONE);
        (node.ne, node.nb) = ([1; 4], [4; 4]);
        Mark { node, list: Vec::new(), calls: 0 }
    }
}

// SAFETY: the pointers are the node's own and those of a graph at hand; they are used only during a call.
unsafe impl Send for Mark {}

impl Stock<'_> {
    /// Does it have all that we call?
    pub fn is_complete(&self) -> bool {
        let i = self.original;
        i.graph_compute.is_some() && i.event_record.is_some() && i.event_wait.is_some()
    }

    /// Computes a graph as the host asked.
    pub fn compute(&self, graph: *mut sys::ggml_cgraph) -> sys::ggml_status {
        let Some(compute) = self.original.graph_compute else { return sys::GGML_STATUS_FAILED };
        // SAFETY: the backend's own function on a live graph.
        unsafe { compute(self.backend, graph) }
    }

    /// Computes some consecutive nodes of a graph, one kernel after the other.
    pub fn part(&self, graph: &sys::ggml_cgraph, nodes: &[*mut sys::ggml_tensor], mark: &mut Mark) -> sys::ggml_status {
        mark.calls += 1;
        // Never followed: the stock backend only compares the field.
        mark.node.extra = std::ptr::without_provenance_mut(mark.calls);
        mark.list.clear();
        mark.list.push(&mut *mark.node);
        mark.list.extend_from_slice(nodes);
        let mut part = *graph;
        part.nodes = mark.list.as_mut_ptr();
        part.n_nodes = mark.list.len() as i32;
        part.size = part.size.max(part.n_nodes);
        part.uid = 0;
        self.compute(&mut part)
    }

    fn event(&self, event: &Event) -> sys::ggml_backend_event {
        // SAFETY: a live backend.
        let device = unsafe { (*self.backend).device };
        // In ggml-backend-impl.h: the device, then what the backend calls an event, for CUDA a cudaEvent_t.
        sys::ggml_backend_event { _bindgen_opaque_blob: [device as u64, event.raw() as u64] }
    }

    /// The event becomes the end of what is on the backend's stream now.
    pub fn record(&self, event: &Event) {
        if let Some(record) = self.original.event_record {
            // SAFETY: the backend's own function; the event lives for the call, which reads its handle.
            unsafe { record(self.backend, &mut self.event(event)) }
        }
    }

    /// What is put on the backend's stream from now on comes after the event.
    pub fn wait(&self, event: &Event) {
        if let Some(wait) = self.original.event_wait {
            // SAFETY: as above.
            unsafe { wait(self.backend, &mut self.event(event)) }
        }
    }
}
