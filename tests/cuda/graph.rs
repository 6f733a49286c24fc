use super::*;

/// A captured call.
pub struct Graph {
    graph: sys::CUgraph,
    exec: sys::CUgraphExec,
}

impl Graph {
    pub fn new(gpu: &OnGpu, attention: &Attention) -> Graph {
        // SAFETY: everything lives in `gpu`.
        Graph::of(gpu, &|stream| unsafe { attention.launch(stream) }.unwrap())
    }

    /// Of whatever is put on the stream.
    pub fn of(gpu: &OnGpu, put: &dyn Fn(sys::CUstream)) -> Graph {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        let mut exec = std::mem::MaybeUninit::uninit();
        // SAFETY: our own stream; what is captured lives in `gpu`, which outlives every graph of a test.
        unsafe {
            result::stream::begin_capture(gpu.stream, mode).unwrap();
            put(gpu.stream);
            let graph = result::stream::end_capture(gpu.stream).unwrap();
            sys::cuGraphInstantiateWithFlags(exec.as_mut_ptr(), graph, 0).result().unwrap();
            Graph { graph, exec: exec.assume_init() }
        }
    }

    pub fn replay(&self, gpu: &OnGpu) -> Vec<f32> {
        gpu.dst.write(0, &vec![f32::NAN; gpu.dst.bytes() / 4]).unwrap();
        // SAFETY: as above.
        unsafe { sys::cuGraphLaunch(self.exec, gpu.stream) }.result().unwrap();
        gpu.output()
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: ours. After a failed test the context may be of no use.
        let _ = unsafe { (sys::cuGraphExecDestroy(self.exec), sys::cuGraphDestroy(self.graph)) };
    }
}
