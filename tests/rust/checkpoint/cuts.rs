//! Cuts against the slow twin, and what interrupts them.

use std::fs;
use std::ops::ControlFlow;
use std::os::unix::fs::MetadataExt;

use proptest::prelude::*;
use shallower_core::checkpoint::{Cut, Error, INDEX_FILE, Job, SINGLE_FILE};
use tempfile::{TempDir, tempdir};

use super::files::{
    expected, job, open, read_checkpoint, survivors, tensors, write, write_checkpoint,
};

proptest! {
    #![proptest_config(crate::config(128))]

    #[test]
    fn a_cut_equals_the_slow_twin((n, shards) in tensors(), mask in any::<u64>(), size in 1_u64..200) {
        let (source, out, again) = (tempdir().unwrap(), tempdir().unwrap(), tempdir().unwrap());
        write_checkpoint(source.path(), &shards);
        let survivors = survivors(n, mask);
        let job = job(source.path(), n, &survivors, size);
        let mut last = (0, 0);
        job.write(out.path(), &mut |done, total| {
            assert!(done >= last.0 && done <= total);
            last = (done, total);
            ControlFlow::Continue(())
        }).unwrap();
        let seen = read_checkpoint(out.path());
        let wanted = expected(&shards, &survivors);
        prop_assert_eq!(seen.keys().collect::<Vec<_>>(), wanted.keys().collect::<Vec<_>>());
        for (name, (_, _, bytes)) in &seen {
            prop_assert_eq!(bytes, &wanted[name].1);
        }
        let total: u64 = wanted.values().map(|(_, bytes)| bytes.len() as u64).sum();
        prop_assert_eq!(job.total_bytes(), total);
        prop_assert!(total == 0 || last == (total, total));
        for (name, len) in job.files() {
            prop_assert_eq!(fs::metadata(out.path().join(name)).unwrap().len(), len);
        }
        write(&job, again.path());
        for entry in fs::read_dir(out.path()).unwrap() {
            let name = entry.unwrap().file_name();
            prop_assert_eq!(fs::read(out.path().join(&name)).unwrap(), fs::read(again.path().join(&name)).unwrap());
        }
    }

    #[test]
    fn a_stopped_job_goes_on((n, shards) in tensors(), mask in any::<u64>(), size in 1_u64..60, stop in 0_usize..6) {
        let (source, out, whole) = (tempdir().unwrap(), tempdir().unwrap(), tempdir().unwrap());
        write_checkpoint(source.path(), &shards);
        let survivors = survivors(n, mask);
        let job = job(source.path(), n, &survivors, size);
        write(&job, whole.path());
        let mut calls = 0;
        let stopped = job.write(out.path(), &mut |_, _| {
            calls += 1;
            if calls > stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        prop_assert!(stopped.is_ok() || matches!(stopped, Err(Error::Cancelled)));
        let complete: Vec<_> = job.files().iter().map(|(name, _)| out.path().join(name))
            .filter(|path| path.exists() && !path.ends_with(INDEX_FILE))
            .map(|path| (fs::metadata(&path).unwrap().ino(), path)).collect();
        write(&job, out.path());
        for (inode, path) in complete {
            prop_assert_eq!(fs::metadata(path).unwrap().ino(), inode);
        }
        prop_assert_eq!(read_checkpoint(out.path()), read_checkpoint(whole.path()));
        prop_assert_eq!(fs::read_dir(out.path()).unwrap().count(), job.files().len());
    }
}

#[test]
fn a_cut_names_layers_that_are_there() {
    let cut = |prefixes: &[&str], n, survivors: &[u64]| {
        Cut::new(
            prefixes.iter().map(|&p| p.to_owned()).collect(),
            n,
            survivors.to_vec(),
        )
    };
    for (n, survivors) in [
        (3, &[][..]),
        (3, &[3]),
        (3, &[1, 1]),
        (3, &[2, 0]),
        (0, &[0]),
    ] {
        assert!(matches!(
            cut(&["l."], n, survivors),
            Err(Error::Survivors { .. })
        ));
    }
    for prefix in ["", ".", "layers"] {
        assert!(matches!(cut(&[prefix], 3, &[0]), Err(Error::Prefix(_))));
    }
    let cut = cut(&["a.l.", "b.l."], 12, &[0, 2, 11]).unwrap();
    for (name, new) in [
        ("a.l.0.w", Some("a.l.0.w")),
        ("a.l.1.w", None),
        ("b.l.2.w.l.2", Some("b.l.1.w.l.2")),
        ("a.l.11", Some("a.l.2")),
        ("a.l.norm", Some("a.l.norm")),
        ("c.l.1.w", Some("c.l.1.w")),
        ("xa.l.1.w", Some("xa.l.1.w")),
        ("a.l..w", Some("a.l..w")),
    ] {
        assert_eq!(cut.rename(name).unwrap().as_deref(), new, "{name}");
    }
    for name in [
        "a.l.12.w",
        "a.l.00.w",
        "a.l.02.w",
        "a.l.99999999999999999999.w",
    ] {
        assert!(
            matches!(cut.rename(name), Err(Error::NoSuchLayer { .. })),
            "{name}"
        );
    }
}

fn small() -> (TempDir, TempDir) {
    let (source, out) = (tempdir().unwrap(), tempdir().unwrap());
    let given = |i: u8| (format!("model.layers.{i}.w"), "U8", vec![5], vec![i; 5]);
    write_checkpoint(
        source.path(),
        &[vec![given(0), given(1)], vec![given(2), given(3)]],
    );
    (source, out)
}

#[test]
fn a_source_that_changes_is_refused() {
    let (source, out) = small();
    let job = job(source.path(), 4, &[0, 2], 5);
    let path = source.path().join("part-0.safetensors");
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    let failed = job.write(out.path(), &mut |_, _| ControlFlow::Continue(()));
    assert!(matches!(failed, Err(Error::Changed(_))), "{failed:?}");
    fs::write(&path, &bytes).unwrap();
    let failed = job.write(out.path(), &mut |_, _| ControlFlow::Continue(()));
    assert!(matches!(failed, Err(Error::Changed(_))), "{failed:?}");
}

#[test]
fn shards_that_are_not_this_jobs_are_written_anew() {
    let (source, out) = small();
    let job = job(source.path(), 4, &[0, 2], 5);
    let (name, len) = (job.files()[0].0.to_owned(), job.files()[0].1);
    fs::write(out.path().join(&name), vec![0; len as usize]).unwrap();
    fs::write(out.path().join(format!(".{name}.partial")), [1; 1000]).unwrap();
    write(&job, out.path());
    assert_eq!(read_checkpoint(out.path()).len(), 2);
    assert_eq!(fs::read_dir(out.path()).unwrap().count(), 3);
}

#[test]
fn a_journal_is_of_one_job() {
    let (source, _out) = small();
    let journal = job(source.path(), 4, &[0, 2], 5).journal();
    assert_eq!(journal, job(source.path(), 4, &[0, 2], 5).journal());
    assert_ne!(journal, job(source.path(), 4, &[0, 1], 5).journal());
    assert_ne!(journal, job(source.path(), 4, &[0, 2], 6).journal());
    let path = source.path().join("part-0.safetensors");
    let text = fs::read(&path).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(20));
    fs::write(&path, text).unwrap();
    assert_ne!(journal, job(source.path(), 4, &[0, 2], 5).journal());
}

#[test]
fn shards_have_the_size_that_is_asked() {
    let (source, _out) = small();
    for (size, files) in [(1, 5), (5, 5), (10, 3), (19, 3), (20, 1), (u64::MAX, 1)] {
        let names = job(source.path(), 4, &[0, 1, 2, 3], size);
        assert_eq!(names.files().len(), files, "{size}");
    }
    assert_eq!(job(source.path(), 4, &[1], 20).files()[0].0, SINGLE_FILE);
    let cut = Cut::new(vec!["model.layers.".into()], 4, vec![0]).unwrap();
    assert!(matches!(
        Job::new(open(source.path()), cut, 0),
        Err(Error::ShardSize { .. })
    ));
}

#[test]
fn a_place_that_cannot_be_written_to_is_an_error() {
    let (source, out) = small();
    let job = job(source.path(), 4, &[0, 2], 5);
    let failed = job.write(
        &out.path().join("no"),
        &mut |_, _| ControlFlow::Continue(()),
    );
    assert!(matches!(failed, Err(Error::Write { .. })), "{failed:?}");
}
