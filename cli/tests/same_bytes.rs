//! `sqz build` on a real model gives the same file whatever the number of threads.

mod common;

#[test]
fn one_and_two_threads_write_the_same_bytes() {
    let built = ["1", "2"].map(|threads| {
        let folder = tempfile::tempdir().unwrap();
        let path = common::build(folder.path(), &common::text(1300), &["--threads", threads]);
        std::fs::read(path).unwrap()
    });
    assert!(built[0].len() > 100_000);
    assert!(built[0] == built[1], "the files differ");
}
