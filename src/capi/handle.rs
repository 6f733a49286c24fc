//! Handles: what C holds is a number in the shape of a pointer, never followed and never given twice. So a handle that was
//! freed, or is of another type, or is no handle at all, is told from a live one.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use super::status::sqz_status::*;
use super::status::{fail, Outcome};

/// What a handle stands for; one variant per type in C.
pub(super) trait Object: Send + Sync + Sized + 'static {
    /// C's name of the type.
    const NAME: &'static str;
    fn wrap(object: Arc<Self>) -> Any;
    fn unwrap(any: &Any) -> Option<&Arc<Self>>;
}

#[derive(Clone)]
pub(super) enum Any {
    Index(Arc<super::index::OpenIndex>),
    Builder(Arc<super::builder::Builder>),
    Context(Arc<super::context::Context>),
}

macro_rules! object {
    ($type:ty, $variant:ident, $name:literal) => {
        impl Object for $type {
            const NAME: &'static str = $name;
            fn wrap(object: Arc<Self>) -> Any {
                Any::$variant(object)
            }
            fn unwrap(any: &Any) -> Option<&Arc<Self>> {
                match any {
                    Any::$variant(object) => Some(object),
                    _ => None,
                }
            }
        }
    };
}

object!(super::index::OpenIndex, Index, "sqz_index");
object!(super::builder::Builder, Builder, "sqz_builder");
object!(super::context::Context, Context, "sqz_context");

#[derive(Default)]
struct Table {
    live: HashMap<usize, Any>,
    last: usize,
}

fn table() -> MutexGuard<'static, Table> {
    static TABLE: OnceLock<Mutex<Table>> = OnceLock::new();
    TABLE.get_or_init(Mutex::default).lock().unwrap_or_else(|e| e.into_inner())
}

/// Numbers are this far apart and begin in a page that no program has mapped.
const STEP: usize = 16;

/// A new handle.
pub(super) fn put<T: Object, C>(object: T) -> *mut C {
    let mut table = table();
    table.last += STEP;
    let number = table.last;
    table.live.insert(number, T::wrap(Arc::new(object)));
    std::ptr::without_provenance_mut(number)
}

/// What a handle stands for.
pub(super) fn get<T: Object, C>(handle: *const C) -> Outcome<Arc<T>> {
    if handle.is_null() {
        return fail(SQZ_ERROR_NULL, format!("the {} is null", T::NAME));
    }
    let found = table().live.get(&handle.addr()).and_then(T::unwrap).cloned();
    found.map_or_else(|| not_live::<T, C>(handle), Ok)
}

fn not_live<T: Object, C>(handle: *const C) -> Outcome<Arc<T>> {
    fail(SQZ_ERROR_HANDLE, format!("{handle:p} is not a live {}: it was freed, or is something else", T::NAME))
}

/// Ends a handle; null is none. Whoever uses the object at this moment keeps it until done.
pub(super) fn free<T: Object, C>(handle: *mut C) -> Outcome {
    if handle.is_null() {
        return Ok(());
    }
    // Found and taken out in one step: of two threads that free it one is told so. Dropped when the table is free again, for a drop
    // may take long.
    let object = {
        let mut table = table();
        let is_one = table.live.get(&handle.addr()).is_some_and(|any| T::unwrap(any).is_some());
        is_one.then(|| table.live.remove(&handle.addr())).flatten()
    };
    match object {
        Some(object) => {
            drop(object);
            Ok(())
        }
        None => not_live::<T, C>(handle).map(drop),
    }
}
