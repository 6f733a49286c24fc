//! An index file that is cut, overwritten, replaced or removed under a server that uses it.

use std::path::Path;

use ggml_squeeze::index::sample::sample_parts;

use crate::common::host::{squeeze, turn, Server};
use crate::{assert_dense, assert_fact, common, fact, fixture, next_log, other, BUDGET, N};

fn start(index: &Path) -> Server {
    let args = ["-np", "1", "-c", "1024", "--cache-ram", "0"];
    Server::start(&common::model(), &args, &squeeze(index, BUDGET), &next_log(&fixture().folder))
}

#[test]
fn an_index_file_that_changes_under_a_server_changes_nothing_in_it() {
    let _turn = turn();
    let path = fixture().folder.join("changing.sqz.gguf");
    let whole = std::fs::read(&fixture().index).unwrap();
    std::fs::write(&path, &whole).unwrap();
    let server = start(&path);
    let (prompt, right) = fact(0);
    server.ask_slot(0, &prompt, N);
    let before = server.ask_slot(0, &prompt, N);
    assert_fact(&before, right);

    let cut = |n: u64| std::fs::File::options().write(true).open(&path).unwrap().set_len(n).unwrap();
    let harm: [(&str, &dyn Fn()); 6] = [
        ("overwritten in place", &|| std::fs::write(&path, vec![0xff; whole.len()]).unwrap()),
        ("cut to half", &|| cut(whole.len() as u64 / 2)),
        ("cut to nothing", &|| cut(0)),
        ("longer than it was", &|| cut(2 * whole.len() as u64)),
        ("replaced by another index", &|| {
            ggml_squeeze::index::write(&path, &sample_parts(1, 200, 2, 3, 64, 64, 4)).unwrap();
        }),
        ("removed", &|| std::fs::remove_file(&path).unwrap()),
    ];
    for (what, harm) in harm {
        harm();
        let answer = server.ask_slot(0, &prompt, N);
        assert_fact(&answer, right);
        assert_eq!(answer.content, before.content, "{what}");
        // and where the cells are computed anew and the index is bound again
        assert_dense(&server.ask_slot(0, &other(0, 600), N));
        assert!(server.ask_slot(0, &prompt, N).content.starts_with(right), "{what}");
        assert_fact(&server.ask_slot(0, &prompt, N), right);
    }
    server.stop();

    // Whoever starts now, with what is left, is dense and says so.
    std::fs::write(&path, &whole[..whole.len() / 3]).unwrap();
    let server = start(&path);
    let log = server.log();
    let said: Vec<&str> = common::own_lines(&log).collect();
    assert!(said.len() == 1 && said[0].contains("cut off") && said[0].contains("stays dense"), "{said:?}");
    assert!(server.ask_slot(0, &prompt, N).content.starts_with(right));
    server.stop();
}
