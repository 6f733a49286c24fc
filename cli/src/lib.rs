//! The parts of `sqz`, as a library for its tests.

#![deny(unsafe_code)]

pub mod bench;
pub mod build_cmd;
pub mod eval;
pub mod extend_cmd;
pub mod facts;
#[allow(unsafe_code)]
pub mod gpu;
#[allow(unsafe_code)]
pub mod info;
pub mod inspect;
#[allow(unsafe_code)]
pub mod llama;
pub mod metrics;
pub mod pages;
pub mod plot;
pub mod progress;
pub mod random_model;
pub mod run;
pub mod session;
pub mod synthetic;
pub mod tasks;
pub mod template;
pub mod tokens;
pub mod verify;
pub mod whole;
