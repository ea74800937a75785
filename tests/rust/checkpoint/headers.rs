//! Headers against the reference implementation and against junk.

use proptest::prelude::*;
use safetensors::SafeTensors;
use shallower_core::checkpoint::{Header, MAX_HEADER_BYTES};

use super::files::{DTYPES, file_bytes, framed, parse, tensors};

/// JSON near to a header, with everything that could be wrong about it.
fn header_like() -> impl Strategy<Value = String> {
    let number = prop_oneof![
        4 => (0_u64..40).prop_map(|n| n.to_string()),
        1 => any::<i64>().prop_map(|n| n.to_string()),
        1 => Just("18446744073709551616".to_owned()),
        1 => any::<f64>().prop_map(|n| n.to_string()),
    ];
    let dtype = prop_oneof![
        4 => prop::sample::select(DTYPES.map(|(name, _)| name).to_vec()).prop_map(str::to_owned),
        1 => "[A-Z0-9_]{0,6}",
    ];
    let list = prop::collection::vec(number.clone(), 0..4).prop_map(|axes| axes.join(","));
    let tensor = (dtype, list, number.clone(), number, "[ab]{1,2}").prop_map(
        |(dtype, shape, start, end, name)| {
            format!(
                r#""{name}":{{"dtype":"{dtype}","shape":[{shape}],"data_offsets":[{start},{end}]}}"#
            )
        },
    );
    prop::collection::vec(tensor, 0..4).prop_map(|entries| format!("{{{}}}", entries.join(",")))
}

fn check_invariants(header: &Header, data_len: u64) {
    let mut end = 0;
    for tensor in &header.tensors {
        assert_eq!(tensor.start, end);
        assert!(tensor.end >= tensor.start);
        end = tensor.end;
    }
    assert_eq!(end, data_len);
    let written = header.to_bytes();
    assert_eq!(written.len() % 8, 0);
    assert_eq!(&Header::parse(&written[8..], data_len).unwrap(), header);
}

proptest! {
    #![proptest_config(crate::config(128))]

    #[test]
    fn junk_is_no_header(bytes in prop::collection::vec(any::<u8>(), 0..200), len in any::<u64>()) {
        if let Ok(header) = Header::parse(&bytes, len) {
            check_invariants(&header, len);
        }
        let _ = parse(&bytes);
    }

    #[test]
    fn what_is_accepted_the_reference_accepts(text in header_like(), data_len in 0_usize..40) {
        let bytes = framed(&text, &vec![0; data_len]);
        let ours = parse(&bytes);
        let theirs = SafeTensors::read_metadata(&bytes);
        if let Ok(header) = &ours {
            check_invariants(header, data_len as u64);
            let known = |t: &shallower_core::checkpoint::Tensor| DTYPES.iter().any(|(d, _)| *d == t.dtype);
            if header.tensors.iter().all(known) {
                prop_assert!(theirs.is_ok(), "{text} {theirs:?}");
            }
        } else if theirs.is_ok() {
            prop_assert!(ours.unwrap_err().contains("twice"), "{}", text);
        }
    }

    #[test]
    fn a_damaged_file_is_refused_or_read_as_the_reference_does(
        (_, shards) in tensors(), damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..3),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut bytes = file_bytes(&shards[0]);
        for (place, byte) in damage {
            let place = place.index(bytes.len());
            bytes[place] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        let theirs = SafeTensors::read_metadata(&bytes);
        match parse(&bytes) {
            Ok(header) => prop_assert!(
                theirs.is_ok() || header.tensors.iter().any(|t| !DTYPES.iter().any(|(d, _)| *d == t.dtype)),
                "{:?}", theirs
            ),
            Err(what) => prop_assert!(
                theirs.is_err() || ["twice", "unknown field", "begin with"].iter().any(|w| what.contains(w)),
                "{}", what
            ),
        }
    }
}

fn refused(header: &str, data: &[u8], words: &str) {
    let what = parse(&framed(header, data)).unwrap_err();
    assert!(what.contains(words), "{header}: {what}");
}

fn tensor(name: &str, dtype: &str, shape: &str, start: u64, end: u64) -> String {
    format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{start},{end}]}}"#)
}

#[test]
fn hostile_headers_are_refused_with_the_reason() {
    let a = tensor("a", "U8", "[4]", 0, 4);
    let two = |b: String| format!("{{{a},{b}}}");
    refused(
        &two(tensor("b", "U8", "[4]", 2, 6)),
        &[0; 6],
        "a and b overlap",
    );
    refused(
        &two(tensor("b", "U8", "[4]", 5, 9)),
        &[0; 9],
        "4 .. 5 belong to no tensor",
    );
    refused(&two(a.clone()), &[0; 4], "a is named twice");
    refused(&format!("{{{a}}}"), &[0; 3], "need 4 bytes, it holds 3");
    refused(&format!("{{{a}}}"), &[0; 5], "need 4 bytes, it holds 5");
    refused(
        &format!("{{{}}}", tensor("a", "F32", "[4]", 0, 4)),
        &[0; 4],
        "needs 128 bits",
    );
    refused(
        &format!("{{{}}}", tensor("a", "F4", "[3]", 0, 1)),
        &[0; 1],
        "needs 12 bits",
    );
    refused(
        &format!("{{{}}}", tensor("a", "U8", "[4]", 4, 0)),
        &[],
        "before its start",
    );
    let huge = tensor("a", "U8", "[4294967296,4294967296]", 0, 4);
    refused(&format!("{{{huge}}}"), &[0; 4], "overflows");
    let huge = tensor("a", "F64", "[2305843009213693952]", 0, 0);
    refused(&format!("{{{huge}}}"), &[], "overflows");
    refused(
        &format!("{{{}}}", tensor("a", "NEW", "[0]", 0, 4)),
        &[0; 4],
        "no values but 4 bytes",
    );
    refused(
        &format!("{{{}}}", tensor("a", "U8", "[-1]", 0, 4)),
        &[0; 4],
        "broken",
    );
    let deep = format!("[{}1]", "1,".repeat(64));
    refused(
        &format!("{{{}}}", tensor("a", "U8", &deep, 0, 1)),
        &[0; 1],
        "at most 64 axes",
    );
    refused(
        r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"more":1}}"#,
        &[0],
        "unknown field",
    );
    refused(r#"{"__metadata__":{"a":"1","a":"2"}}"#, &[], "come twice");
    refused(r#"{"__metadata__":{},"__metadata__":{}}"#, &[], "duplicate");
    refused(" {}", &[], "begin with");
    refused("{} {}", &[], "broken");
    refused(&"[".repeat(100_000), &[], "begin with");
    refused(&format!("{{\"a\":{}", "[".repeat(100_000)), &[], "broken");
}

#[test]
fn unknown_dtypes_are_taken_by_their_offsets() {
    let text = format!(
        "{{{},{}}}",
        tensor("a", "F3_NEW", "[8]", 0, 3),
        tensor("b", "U8", "[4]", 3, 7)
    );
    let header = parse(&framed(&text, &[0; 7])).unwrap();
    assert_eq!(header.tensors.len(), 2);
    assert_eq!(header.tensors[0].bits(), 3);
}

#[test]
fn a_header_is_read_only_as_far_as_the_file_goes() {
    let long = |len: u64| parse(&[&len.to_le_bytes()[..], b"{}"].concat()).unwrap_err();
    assert!(long(u64::MAX).contains("at most 100000000"));
    assert!(long(MAX_HEADER_BYTES + 1).contains("at most 100000000"));
    assert!(long(MAX_HEADER_BYTES).contains("the file has 10"));
    assert!(long(3).contains("the file has 10"));
    assert!(parse(b"1234567").unwrap_err().contains("7 bytes"));
}
