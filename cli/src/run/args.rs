//! The user's own command line for llama.cpp's programs: what of it `sqz run` must know. Nothing is judged here; options
//! that are not in the table pass through unread.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{anyhow, bail, ensure, Context as _, Result};
use clap::ValueEnum as _;
use ggml_squeeze::attention::Element;

use crate::llama::{cache_type, GpuArgs, RopeArgs, RopeScaling};

/// Which program it is, by its file name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Server,
    Completion,
    Cli,
    /// Any other program: it gets plugin and index through its environment, and its arguments stay as they are.
    Other,
}

impl Kind {
    pub fn of(program: &OsStr) -> Kind {
        match Path::new(program).file_stem().and_then(OsStr::to_str) {
            Some("llama-server") => Kind::Server,
            Some("llama-completion") => Kind::Completion,
            Some("llama-cli") => Kind::Cli,
            _ => Kind::Other,
        }
    }
}

/// An option of llama.cpp: its names and its environment variable.
pub struct Opt {
    names: &'static [&'static str],
    env: Option<&'static str>,
}

const fn opt(names: &'static [&'static str], env: &'static str) -> Opt {
    Opt { names, env: if env.is_empty() { None } else { Some(env) } }
}

pub const MODEL: Opt = opt(&["-m", "--model"], "LLAMA_ARG_MODEL");
pub const CTX: Opt = opt(&["-c", "--ctx-size"], "LLAMA_ARG_CTX_SIZE");
pub const THREADS: Opt = opt(&["-t", "--threads"], "LLAMA_ARG_THREADS");
pub const UBATCH: Opt = opt(&["-ub", "--ubatch-size"], "LLAMA_ARG_UBATCH");
pub const FLASH: Opt = opt(&["-fa", "--flash-attn"], "LLAMA_ARG_FLASH_ATTN");
pub const GPU_LAYERS: Opt = opt(&["-ngl", "--gpu-layers", "--n-gpu-layers"], "LLAMA_ARG_N_GPU_LAYERS");
pub const DEVICE: Opt = opt(&["-dev", "--device"], "LLAMA_ARG_DEVICE");
pub const TYPE_K: Opt = opt(&["-ctk", "--cache-type-k"], "LLAMA_ARG_CACHE_TYPE_K");
pub const TYPE_V: Opt = opt(&["-ctv", "--cache-type-v"], "LLAMA_ARG_CACHE_TYPE_V");
pub const PROMPT: Opt = opt(&["-p", "--prompt"], "");
pub const FILE: Opt = opt(&["-f", "--file"], "");
pub const BINARY_FILE: Opt = opt(&["-bf", "--binary-file"], "");
pub const SERVER_BASE: Opt = opt(&["--server-base"], "");
pub const SYSTEM: Opt = opt(&["-sys", "--system-prompt"], "");
pub const SYSTEM_FILE: Opt = opt(&["-sysf", "--system-prompt-file"], "");
pub const PROMPT_CACHE: Opt = opt(&["--prompt-cache"], "");
pub const TEMPLATE: Opt = opt(&["--chat-template"], "LLAMA_ARG_CHAT_TEMPLATE");
pub const TEMPLATE_FILE: Opt = opt(&["--chat-template-file"], "LLAMA_ARG_CHAT_TEMPLATE_FILE");
pub const HOST: Opt = opt(&["--host"], "LLAMA_ARG_HOST");
pub const PORT: Opt = opt(&["--port"], "LLAMA_ARG_PORT");
pub const API_PREFIX: Opt = opt(&["--api-prefix"], "LLAMA_ARG_API_PREFIX");
pub const API_KEY: Opt = opt(&["--api-key"], "LLAMA_API_KEY");
pub const API_KEY_FILE: Opt = opt(&["--api-key-file"], "LLAMA_ARG_API_KEY_FILE");
pub const SSL_KEY: Opt = opt(&["--ssl-key-file"], "LLAMA_ARG_SSL_KEY_FILE");
pub const SLOT_PATH: Opt = opt(&["--slot-save-path"], "");
pub const PARALLEL: Opt = opt(&["-np", "--parallel"], "LLAMA_ARG_N_PARALLEL");
const ROPE_SCALING: Opt = opt(&["--rope-scaling"], "LLAMA_ARG_ROPE_SCALING_TYPE");
const ROPE_SCALE: Opt = opt(&["--rope-scale"], "LLAMA_ARG_ROPE_SCALE");
const ROPE_BASE: Opt = opt(&["--rope-freq-base"], "LLAMA_ARG_ROPE_FREQ_BASE");
const ROPE_FREQ: Opt = opt(&["--rope-freq-scale"], "LLAMA_ARG_ROPE_FREQ_SCALE");
const YARN_CTX: Opt = opt(&["--yarn-orig-ctx"], "LLAMA_ARG_YARN_ORIG_CTX");
const YARN_EXT: Opt = opt(&["--yarn-ext-factor"], "LLAMA_ARG_YARN_EXT_FACTOR");
const YARN_ATTN: Opt = opt(&["--yarn-attn-factor"], "LLAMA_ARG_YARN_ATTN_FACTOR");
const YARN_SLOW: Opt = opt(&["--yarn-beta-slow"], "LLAMA_ARG_YARN_BETA_SLOW");
const YARN_FAST: Opt = opt(&["--yarn-beta-fast"], "LLAMA_ARG_YARN_BETA_FAST");
/// Models from elsewhere.
const REMOTE: Opt = opt(&["-mu", "--model-url", "-hf", "-hfr", "--hf-repo", "-dr", "--docker-repo"], "");
/// What changes keys and values without changing the model's file.
const ADAPTERS: Opt = opt(&["--lora", "--lora-scaled", "--control-vector", "--control-vector-scaled"], "");

/// Options with a value: what follows one of these is no option, whatever it looks like.
const VALUED: &[&Opt] = &[
    &MODEL,
    &CTX,
    &THREADS,
    &UBATCH,
    &FLASH,
    &TYPE_K,
    &TYPE_V,
    &GPU_LAYERS,
    &DEVICE,
    &PROMPT,
    &FILE,
    &BINARY_FILE,
    &SYSTEM,
    &SYSTEM_FILE,
    &PROMPT_CACHE,
    &SERVER_BASE,
    &TEMPLATE,
    &TEMPLATE_FILE,
    &HOST,
    &PORT,
    &API_PREFIX,
    &API_KEY,
    &API_KEY_FILE,
    &SSL_KEY,
    &SLOT_PATH,
    &PARALLEL,
    &ROPE_SCALING,
    &ROPE_SCALE,
    &ROPE_BASE,
    &ROPE_FREQ,
    &YARN_CTX,
    &YARN_EXT,
    &YARN_ATTN,
    &YARN_SLOW,
    &YARN_FAST,
    &REMOTE,
    &ADAPTERS,
];

/// A program and its arguments.
#[derive(Clone, Debug)]
pub struct Child {
    pub kind: Kind,
    pub program: OsString,
    pub args: Vec<OsString>,
    /// Its options are llama.cpp's; those of any other program may mean anything.
    known: bool,
    /// Reads a variable of the environment that the program will have.
    env: fn(&str) -> Option<OsString>,
}

fn from_process(name: &str) -> Option<OsString> {
    std::env::var_os(name)
}

/// An option's name as llama.cpp compares it: `--ctx_size` is `--ctx-size`.
fn name(arg: &OsStr) -> Option<String> {
    let text = arg.to_str()?;
    Some(if text.starts_with("--") { text.replace('_', "-") } else { text.to_string() })
}

impl Child {
    /// `command` is the program and its arguments.
    ///
    /// # Errors
    /// It is empty.
    pub fn new(command: &[OsString]) -> Result<Child> {
        let (program, args) = command.split_first().context("no program is given: write it after --")?;
        let name = Path::new(program).file_name().and_then(OsStr::to_str);
        let known = name.is_some_and(|n| n.starts_with("llama-"));
        Ok(Child { kind: Kind::of(program), program: program.clone(), args: args.to_vec(), known, env: from_process })
    }

    /// Places of options: their numbers among the arguments.
    fn options(&self) -> impl Iterator<Item = (usize, String)> + '_ {
        let mut next = if self.known { 0 } else { self.args.len() };
        std::iter::from_fn(move || {
            let at = next;
            let option = name(self.args.get(at)?).unwrap_or_default();
            let valued = VALUED.iter().any(|o| o.names.contains(&option.as_str()));
            next = at + 1 + usize::from(valued);
            Some((at, option))
        })
    }

    /// Is one of these switches given?
    pub fn has(&self, names: &[&str]) -> bool {
        self.options().any(|(_, o)| names.contains(&o.as_str()))
    }

    /// The value in force: the last one on the command line, else the environment's.
    pub fn raw(&self, option: &Opt) -> Option<OsString> {
        let given = self.options().filter(|(_, o)| option.names.contains(&o.as_str())).last();
        match given {
            Some((at, _)) => self.args.get(at + 1).cloned(),
            None => option.env.and_then(self.env),
        }
    }

    /// The same as text; bytes that are not UTF-8 are replaced.
    pub fn text(&self, option: &Opt) -> Option<String> {
        self.raw(option).map(|v| v.to_string_lossy().into_owned())
    }

    pub fn path(&self, option: &Opt) -> Option<PathBuf> {
        self.raw(option).map(PathBuf::from)
    }

    /// The same as a number.
    ///
    /// # Errors
    /// The value is none.
    pub fn number<T: FromStr>(&self, option: &Opt) -> Result<Option<T>> {
        self.text(option)
            .map(|v| v.parse().map_err(|_| anyhow!("{} {v}: a number is needed", option.names[0])))
            .transpose()
    }

    /// Takes an option out, with its value.
    pub fn remove(&mut self, option: &Opt) {
        let places: Vec<usize> =
            self.options().filter(|(_, o)| option.names.contains(&o.as_str())).map(|(at, _)| at).collect();
        for at in places.into_iter().rev() {
            self.args.drain(at..(at + 2).min(self.args.len()));
        }
    }

    pub fn push(&mut self, option: &str, value: impl Into<OsString>) {
        self.args.extend([option.into(), value.into()]);
    }

    /// RoPE options: index and state must be made under the same ones.
    ///
    /// # Errors
    /// A value that llama.cpp would not take.
    pub fn rope(&self) -> Result<RopeArgs> {
        let scaling = self
            .text(&ROPE_SCALING)
            .map(|v| {
                RopeScaling::from_str(&v, false).map_err(|_| anyhow!("--rope-scaling {v}: give none, linear or yarn"))
            })
            .transpose()?;
        Ok(RopeArgs {
            rope_scaling: scaling,
            rope_scale: self.number(&ROPE_SCALE)?,
            rope_freq_base: self.number(&ROPE_BASE)?,
            rope_freq_scale: self.number(&ROPE_FREQ)?,
            yarn_orig_ctx: self.number(&YARN_CTX)?,
            yarn_ext_factor: self.number(&YARN_EXT)?,
            yarn_attn_factor: self.number(&YARN_ATTN)?,
            yarn_beta_slow: self.number(&YARN_SLOW)?,
            yarn_beta_fast: self.number(&YARN_FAST)?,
        })
    }

    /// Where its model runs; what llama.cpp decides by itself (auto, all) stays its decision.
    pub fn gpu(&self) -> GpuArgs {
        let names = self.text(&DEVICE).unwrap_or_default();
        GpuArgs {
            n_gpu_layers: self.text(&GPU_LAYERS).and_then(|v| v.parse().ok()),
            device: names.split(',').filter(|name| !name.is_empty()).map(str::to_string).collect(),
            no_kv_offload: self.no_kv_offload(),
        }
    }

    /// `-nkvo`, or its contrary, by option or environment.
    fn no_kv_offload(&self) -> bool {
        let [yes, no] = [["-nkvo", "--no-kv-offload"], ["-kvo", "--kv-offload"]];
        let given = self.options().filter(|(_, o)| yes.contains(&o.as_str()) || no.contains(&o.as_str())).last();
        let off = |v: OsString| ["0", "off", "disabled", "false"].iter().any(|name| v == *name);
        let env =
            || (self.env)("LLAMA_ARG_NO_KV_OFFLOAD").is_some() || (self.env)("LLAMA_ARG_KV_OFFLOAD").is_some_and(off);
        given.map_or_else(env, |(_, o)| yes.contains(&o.as_str()))
    }

    /// `--swa-full`, by option or environment.
    pub fn swa_full(&self) -> bool {
        let set = (self.env)("LLAMA_ARG_SWA_FULL").is_some_and(|v| v != "0" && v != "false");
        set || self.has(&["--swa-full"])
    }

    /// The program runs `model` and nothing else; gives it `-m` where it has none.
    ///
    /// # Errors
    /// Another model is named.
    pub fn set_model(&mut self, model: &Path) -> Result<()> {
        ensure!(
            !self.has(REMOTE.names),
            "the program is told to fetch a model: give sqz run the file alone, with -m in front of --"
        );
        let Some(given) = self.path(&MODEL) else {
            self.push("-m", model);
            return Ok(());
        };
        let same = match (given.canonicalize(), model.canonicalize()) {
            (Ok(a), Ok(b)) => a == b,
            _ => given == model,
        };
        if !same {
            bail!(
                "the program is given the model {} and sqz run {}: leave out the one after --",
                given.display(),
                model.display()
            );
        }
        Ok(())
    }

    /// Types of the K and V cache: index and state are made with the same ones. `Err`: why the plugin has none like it.
    pub fn cache_types(&self) -> Result<[Element; 2], String> {
        let of = |option: &Opt| match self.text(option) {
            Some(name) => cache_type(&name).map_err(|why| format!("{} {name}: {why}", option.names[0])),
            None => Ok(Element::F16),
        };
        Ok([of(&TYPE_K)?, of(&TYPE_V)?])
    }

    /// Why a saved state of the model cannot be the state of this program.
    pub fn no_state(&self) -> Option<String> {
        if let Err(why) = self.cache_types() {
            return Some(why);
        }
        let adapter = self.options().map(|(_, o)| o).find(|o| ADAPTERS.names.contains(&o.as_str()))?;
        Some(format!("{adapter} changes the model's keys and values"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn child(line: &str) -> Child {
        let words: Vec<OsString> = line.split(' ').map(OsString::from).collect();
        Child { env: |_| None, ..Child::new(&words).unwrap() }
    }

    #[test]
    fn programs_are_told_by_their_names() {
        for (program, kind) in [
            ("/opt/bin/llama-server", Kind::Server),
            ("llama-completion", Kind::Completion),
            ("./llama-cli", Kind::Cli),
            ("llama-bench", Kind::Other),
            ("llama-server-wrapper.sh", Kind::Other),
        ] {
            assert_eq!(Kind::of(OsStr::new(program)), kind, "{program}");
        }
        assert!(Child::new(&[]).is_err());
    }

    #[test]
    fn the_last_value_holds_and_a_value_is_no_option() {
        let c = child("llama-server -c 100 --ctx_size 200 -p -c --swa-full");
        assert_eq!(c.number::<u32>(&CTX).unwrap(), Some(200));
        assert_eq!(c.text(&PROMPT).as_deref(), Some("-c"));
        assert!(c.swa_full() && !c.has(&["--lora"]));
        assert!(child("llama-server -nkvo --swa-full").gpu().no_kv_offload && !c.gpu().no_kv_offload);
        assert!(!child("llama-server --no-kv-offload --kv-offload").gpu().no_kv_offload);
        assert!(child("llama-server -c many").number::<u32>(&CTX).is_err());
        assert_eq!(child("llama-server -c").raw(&CTX), None);
    }

    #[test]
    fn the_environment_counts_where_the_option_is_missing() {
        let env = |name: &str| (name == "LLAMA_ARG_PORT").then(|| OsString::from("9"));
        let c = Child { env, ..child("llama-server") };
        assert_eq!(c.number::<u16>(&PORT).unwrap(), Some(9));
        let c = Child { env, ..child("llama-server --port 7") };
        assert_eq!(c.number::<u16>(&PORT).unwrap(), Some(7));
        let env = |name: &str| (name == "LLAMA_ARG_KV_OFFLOAD").then(|| OsString::from("off"));
        assert!(Child { env, ..child("llama-server") }.gpu().no_kv_offload);
        assert!(!Child { env, ..child("llama-server -kvo") }.gpu().no_kv_offload);
    }

    #[test]
    fn options_are_taken_out_with_their_values() {
        let mut c = child("llama-completion -p hello -n 4 --prompt again -st");
        c.remove(&PROMPT);
        assert_eq!(c.args, ["-n", "4", "-st"]);
        c.push("-f", "x");
        assert_eq!(c.args, ["-n", "4", "-st", "-f", "x"]);
    }

    #[test]
    fn options_of_a_foreign_program_are_not_read() {
        assert_eq!(child("sh -c x").raw(&CTX), None);
        assert_eq!(child("llama-bench -c 5").number::<u32>(&CTX).unwrap(), Some(5));
    }

    #[test]
    fn one_model_only() {
        let mut c = child("llama-server");
        c.set_model(Path::new("a.gguf")).unwrap();
        assert_eq!(c.args, ["-m", "a.gguf"]);
        c.set_model(Path::new("a.gguf")).unwrap();
        assert_eq!(c.args.len(), 2);
        assert!(c.set_model(Path::new("b.gguf")).is_err());
        assert!(child("llama-server -hf a/b").set_model(Path::new("a.gguf")).is_err());
    }

    #[test]
    fn what_shapes_the_state_is_read() {
        let rope = child("llama-server --rope-scaling yarn --rope-scale 4 --yarn-ext-factor -1").rope().unwrap();
        assert_eq!((rope.rope_scaling, rope.freq_scale()), (Some(RopeScaling::Yarn), Some(0.25)));
        assert_eq!(rope.yarn_ext_factor, Some(-1.0));
        assert!(child("llama-server --rope-scaling odd").rope().is_err());
        let c = child("llama-server -ctk f16 --cache_type_v q8_0");
        assert_eq!((c.no_state(), c.cache_types()), (None, Ok([Element::F16, Element::Q8_0])));
        assert!(child("llama-server -ctv q5_1").no_state().unwrap().starts_with("-ctv q5_1: no cache type"));
        assert!(child("llama-server --lora x").no_state().unwrap().contains("--lora"));
    }
}
