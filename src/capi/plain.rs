//! What C passes by pointer: structures that begin with their size, strings, arrays, places for results.

use std::ffi::{c_char, CStr};
use std::path::PathBuf;

use super::status::sqz_status::*;
use super::status::{fail, Outcome};

/// A structure of C that begins with its size in bytes, so that it can grow.
///
/// # Safety
/// `#[repr(C)]`, first field `size: usize`; every pattern of bytes is a value.
pub(super) unsafe trait Plain: Copy {
    const NAME: &'static str;
    /// Bytes of its first version.
    const LEAST: usize;
}

/// Larger sizes are taken for garbage.
const MOST: usize = 4096;

fn check_size<T: Plain>(size: usize) -> Outcome {
    if size < T::LEAST || size > MOST {
        return fail(
            SQZ_ERROR_SIZE,
            format!("{} says that it has {size} bytes: set its size to sizeof(struct {})", T::NAME, T::NAME),
        );
    }
    Ok(())
}

/// Reads a structure over its defaults. One of a later version may only say what this one knows: the rest must be zero.
///
/// # Safety
/// Null, or readable for as many bytes as its first field says.
pub(super) unsafe fn read<T: Plain>(from: *const T, defaults: T) -> Outcome<T> {
    if from.is_null() {
        return Ok(defaults);
    }
    // SAFETY: readable by contract; bytes of a plain structure.
    unsafe {
        let size = from.cast::<usize>().read_unaligned();
        check_size::<T>(size)?;
        let bytes = std::slice::from_raw_parts(from.cast::<u8>(), size);
        if bytes.iter().skip(size_of::<T>()).any(|b| *b != 0) {
            return fail(SQZ_ERROR_SIZE, format!("{} sets something that this version does not know", T::NAME));
        }
        let mut value = defaults;
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), (&raw mut value).cast::<u8>(), size.min(size_of::<T>()));
        Ok(value)
    }
}

/// Fills a structure in, as far as its size goes; the size stays the caller's.
///
/// # Safety
/// Null, or readable and writable for as many bytes as its first field says.
pub(super) unsafe fn write<T: Plain>(to: *mut T, value: T) -> Outcome {
    if to.is_null() {
        return fail(SQZ_ERROR_NULL, format!("the {} to fill in is null", T::NAME));
    }
    // SAFETY: by contract.
    unsafe {
        let size = to.cast::<usize>().read_unaligned();
        check_size::<T>(size)?;
        let n = size.min(size_of::<T>());
        let head = size_of::<usize>();
        let from = (&raw const value).cast::<u8>().add(head);
        std::ptr::copy_nonoverlapping(from, to.cast::<u8>().add(head), n - head);
        std::ptr::write_bytes(to.cast::<u8>().add(n), 0, size - n);
    }
    Ok(())
}

/// # Safety
/// Null, or a terminated string.
pub(super) unsafe fn path(text: *const c_char) -> Outcome<PathBuf> {
    if text.is_null() {
        return fail(SQZ_ERROR_NULL, "the path is null");
    }
    // SAFETY: by contract.
    let bytes = unsafe { CStr::from_ptr(text) }.to_bytes();
    #[cfg(unix)]
    {
        use std::os::unix::ffi::OsStrExt;
        Ok(PathBuf::from(std::ffi::OsStr::from_bytes(bytes)))
    }
    #[cfg(not(unix))]
    Ok(PathBuf::from(String::from_utf8_lossy(bytes).into_owned()))
}

/// # Safety
/// Null, or `n` readable elements of a type that every pattern of bytes is a value of.
pub(super) unsafe fn slice<'a, T>(data: *const T, n: usize, what: &str) -> Outcome<&'a [T]> {
    if data.is_null() {
        return fail(SQZ_ERROR_NULL, format!("{what} is null"));
    }
    if !data.is_aligned() || n.checked_mul(size_of::<T>()).is_none_or(|bytes| bytes > isize::MAX as usize) {
        return fail(SQZ_ERROR_ARGUMENT, format!("{what} is not aligned to its elements, or too long"));
    }
    // SAFETY: not null, aligned and of a possible length (checked), readable by contract.
    Ok(unsafe { std::slice::from_raw_parts(data, n) })
}

/// A place for a new handle, which is null until then.
///
/// # Safety
/// Null, or writable.
pub(super) unsafe fn place<T>(to: *mut *mut T, what: &str) -> Outcome<&'static mut *mut T> {
    if to.is_null() || !to.is_aligned() {
        return fail(SQZ_ERROR_NULL, format!("the place for {what} is null"));
    }
    // SAFETY: by contract; used within the call alone.
    unsafe {
        *to = std::ptr::null_mut();
        Ok(&mut *to)
    }
}
