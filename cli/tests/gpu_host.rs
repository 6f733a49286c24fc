//! llama.cpp with a model on one or more GPUs, with and without the plugin: the same logits to the bit where no index is bound, and close ones
//! where one is that keeps all. Needs a GPU, and llama.cpp's CUDA backend: run with `--ignored`, the model and a text in SQZ_MODEL
//! and SQZ_TEXT.

mod common;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use common::context::divergences;
use ggml_squeeze::backend;
use ggml_squeeze::config::{Config, ModeSetting};
use ggml_squeeze::index::Index;
use sqz::build_cmd::BuildArgs;
use sqz::llama::{Context, GpuArgs, Model, ModelArgs, Outputs};

/// Tokens behind the prompt, decoded one by one.
const N_ANSWER: usize = 24;

/// Where a model runs.
struct Place {
    name: &'static str,
    devices: &'static [&'static str],
    layers: Option<u32>,
    cache_on_cpu: bool,
}

const PLACES: [Place; 5] = [
    Place { name: "one GPU", devices: &["CUDA0"], layers: None, cache_on_cpu: false },
    Place { name: "one GPU, the cache on the CPU", devices: &["CUDA0"], layers: None, cache_on_cpu: true },
    Place { name: "one GPU and the CPU", devices: &["CUDA0"], layers: Some(12), cache_on_cpu: false },
    Place { name: "two GPUs", devices: &["CUDA0", "CUDA1"], layers: None, cache_on_cpu: false },
    Place { name: "two GPUs and the CPU", devices: &["CUDA0", "CUDA1"], layers: Some(16), cache_on_cpu: false },
];

impl Place {
    fn is_here(&self) -> bool {
        self.devices.iter().all(|name| {
            let name = std::ffi::CString::new(*name).unwrap();
            // SAFETY: ggml's own list of devices.
            !unsafe { llama_cpp_sys_2::ggml_backend_dev_by_name(name.as_ptr()) }.is_null()
        })
    }

    fn args(&self, model: &ModelArgs) -> ModelArgs {
        let device = self.devices.iter().map(|name| name.to_string()).collect();
        let gpu = GpuArgs { n_gpu_layers: self.layers, device, no_kv_offload: self.cache_on_cpu };
        ModelArgs { gpu, ..model.clone() }
    }
}

/// Logits of each token behind the prompt, in a context of its own: the text goes on as it did in its middle.
fn logits(args: &ModelArgs, tokens: &[i32]) -> Vec<Vec<f32>> {
    let model = Model::load_on(&args.model, &args.gpu).unwrap();
    let mut context = Context::new(&model, args, tokens.len() + N_ANSWER, None).unwrap();
    context.prefill(tokens, |_| ()).unwrap();
    let one = |token: &i32| {
        context.decode(&[*token], Outputs::Last).unwrap();
        context.logits(0).unwrap().to_vec()
    };
    tokens[tokens.len() / 2..][..N_ANSWER].iter().map(one).collect()
}

fn index_of(build: &BuildArgs, text: &str, to: &Path) -> Arc<Index> {
    let input = to.with_extension("txt");
    std::fs::write(&input, text).unwrap();
    common::gpu::index(&common::gpu::build_of(&build.model.model, &input, to))
}

/// Of two answers: the largest difference of a logit, as a share of the largest logit.
fn difference(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    let all = || a.iter().flatten().zip(b.iter().flatten());
    all().map(|(x, y)| (x - y).abs()).fold(0.0, f32::max) / all().map(|(x, _)| x.abs()).fold(0.0, f32::max)
}

#[test]
#[ignore = "needs a GPU, SQZ_MODEL and SQZ_TEXT"]
fn without_a_bound_index_logits_are_llama_cpps_own_on_any_devices() {
    sqz::llama::start(false).unwrap();
    let build = common::gpu::build(Path::new("none"));
    let text = std::fs::read_to_string(&build.file).unwrap();
    let tokens = {
        let model = Model::load_on(&build.model.model, &PLACES[0].args(&build.model).gpu).unwrap();
        model.tokenise(&text, true).unwrap()
    };
    let places: Vec<&Place> = PLACES.iter().filter(|place| place.is_here()).collect();
    // Nothing is hooked yet.
    let bare: Vec<_> = places.iter().map(|place| logits(&place.args(&build.model), &tokens)).collect();

    backend::register(Config::default()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let other = index_of(&build, &text.replacen('e', "a", 1), &dir.path().join("other.sqz.gguf"));
    let own = index_of(&build, &text, &dir.path().join("own.sqz.gguf"));
    backend::configure(|c| (c.min_prefix, c.mode) = (Some(0), ModeSetting::Budget(1.0)));
    for (place, bare) in places.iter().zip(&bare) {
        let args = place.args(&build.model);
        for (what, indexes) in [("no index", vec![]), ("another text's index", vec![other.clone()])] {
            backend::set_indexes(indexes).unwrap();
            backend::reset_stats();
            let with = logits(&args, &tokens);
            let stats = backend::stats();
            assert_eq!(stats.nodes_sparse, 0, "{}, {what}: {stats}", place.name);
            assert!(with == *bare, "{}, {what}: logits are others, by {}", place.name, difference(&with, bare));
        }
        backend::set_indexes(vec![own.clone()]).unwrap();
        backend::reset_stats();
        let all = divergences(&logits(&args, &tokens), bare);
        let off = all.iter().sum::<f64>() / all.len() as f64;
        let stats = backend::stats();
        println!(
            "{}: the same logits without a bound index; with one, at budget 1, KL {off:.1e} from them; {stats}",
            place.name
        );
        if place.cache_on_cpu {
            // What the GPU gets then is a copy of the cache, whose writes it does not see.
            assert!(stats.nodes_sparse == 0 && off == 0.0, "{}: KL {off}: {stats}", place.name);
            continue;
        }
        assert!(stats.nodes_sparse > 0 && off < 0.05, "{}: KL {off}: {stats}", place.name);
    }
}

#[test]
#[ignore = "needs a GPU, SQZ_MODEL and SQZ_TEXT"]
fn graphs_whose_layers_are_spread_over_streams_are_left_alone() {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "with_layers_spread_over_streams", "--nocapture", "--ignored"]);
    let run = command.env("GGML_CUDA_GRAPH_OPT", "1").output().unwrap();
    let said = String::from_utf8_lossy(&run.stdout).into_owned() + &String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success() && said.contains("all dense"), "{said}");
    assert_eq!(said.matches("GGML_CUDA_GRAPH_OPT=1 spreads a layer over several streams").count(), 1, "{said}");
}

#[test]
#[ignore = "a part of graphs_whose_layers_are_spread_over_streams_are_left_alone"]
fn with_layers_spread_over_streams() {
    if std::env::var_os("GGML_CUDA_GRAPH_OPT").is_none() {
        return;
    }
    sqz::llama::start(false).unwrap();
    let build = common::gpu::build(Path::new("none"));
    let text: String = std::fs::read_to_string(&build.file).unwrap();
    let args = PLACES[0].args(&build.model);
    let tokens = Model::load_on(&args.model, &args.gpu).unwrap().tokenise(&text, true).unwrap();
    let bare = logits(&args, &tokens);
    backend::register(Config::default()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let own = index_of(&build, &text, &dir.path().join("own.sqz.gguf"));
    backend::configure(|c| c.min_prefix = Some(0));
    backend::set_indexes(vec![own]).unwrap();
    let with = logits(&args, &tokens);
    let stats = backend::stats();
    assert!(with == bare && stats.nodes_sparse == 0, "off by {}: {stats}", difference(&with, &bare));
    println!("all dense");
}
