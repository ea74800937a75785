//! Files that are refused.

use shallower_core::gguf::GgufError;

use super::model::{Model, T, V, cut, hostile, read, text, u32s};

#[test]
fn files_that_are_no_whole_model_are_refused() {
    let no_layers = |model: &Model, words: &str| {
        let error = read(&model.bytes()).unwrap_err();
        assert!(matches!(error, GgufError::NoLayers(_)), "{error}");
        assert!(error.to_string().contains(words), "{error}");
    };
    let mut short = Model::new(3);
    short
        .tensors
        .retain(|(name, _)| !name.starts_with("blk.1."));
    no_layers(&short, "no tensor is named blk.1");
    let mut long = Model::new(3);
    long.entries[1].1 = V::U32(2);
    no_layers(&long, "blk.2.ffn.weight is not in one of its 2 blocks");
    long.entries[1].1 = V::U32(u32::MAX);
    no_layers(&long, "no tensor is named blk.3");
    long.entries[1].1 = V::Text("3".into());
    no_layers(&long, "llama.block_count is missing");
    for name in [
        "blk.01.x",
        "blk.+1.x",
        "blk.-1.x",
        "blk..x",
        "blk.99999999999999999999.x",
    ] {
        let mut odd = Model::new(3);
        odd.tensors[1].0 = name.into();
        no_layers(&odd, name);
    }
    let all = Model::new(2).with("llama.nextn_predict_layers", V::U32(2));
    no_layers(&all, "of 2 blocks");
    let split = Model::new(2).with("split.count", V::U8(3));
    assert_eq!(read(&split.bytes()), Err(GgufError::Split(3)));
}

#[test]
fn versions_and_byte_orders_are_told_apart() {
    let file = Model::new(2).bytes();
    let versioned = |bytes: [u8; 4]| [&file[..4], &bytes[..], &file[8..]].concat();
    assert!(cut(&versioned([2, 0, 0, 0]), &[0]).unwrap()[4] == 2);
    let words = |file: &[u8]| read(file).unwrap_err().to_string();
    assert!(words(&versioned([0, 0, 0, 3])).contains("big-endian"));
    assert!(words(&versioned([1, 0, 0, 0])).contains("convert the model again"));
    assert!(words(&versioned([4, 0, 0, 0])).contains("version 4, expected 2 or 3"));
    assert!(words(b"PK\x03\x04zip").contains("not a GGUF file"));
    assert!(words(b"").contains("cut short"));
}

#[test]
fn lengths_are_held_against_the_file() {
    let huge = u64::MAX.to_le_bytes();
    let key = |code: u32, rest: &[u8]| {
        let mut bytes = Vec::new();
        text(&mut bytes, "k");
        bytes.extend(code.to_le_bytes());
        bytes.extend(rest);
        bytes.extend([0; 64]);
        bytes
    };
    let array = |code: u32, count: u64| [&code.to_le_bytes()[..], &count.to_le_bytes()].concat();
    for file in [
        hostile(u64::MAX, 0, &[0; 64]),
        hostile(0, u64::MAX, &[0; 64]),
        hostile(1 << 61, 1 << 61, &[0; 64]),
        hostile(1, 0, &[&huge[..], &[0; 64]].concat()),
        hostile(1, 0, &key(8, &huge)),
        hostile(1, 0, &key(8, &(i64::MAX as u64).to_le_bytes())),
        hostile(1, 0, &key(9, &array(10, u64::MAX / 8))),
        hostile(1, 0, &key(9, &array(10, 1 << 61))),
        hostile(1, 0, &key(9, &array(8, u64::MAX))),
        hostile(1, 0, &key(9, &array(9, u64::MAX))),
        hostile(1, 0, &key(9, &array(13, 1))),
        hostile(1, 0, &key(13, &[])),
        hostile(1, 0, &key(7, &[2])),
        hostile(2, 0, &[key(0, &[])[..14].to_vec(), key(0, &[])].concat()),
    ] {
        let error = read(&file).unwrap_err();
        assert!(matches!(error, GgufError::Damaged { .. }), "{error}");
    }
}

#[test]
fn nested_arrays_have_a_bottom() {
    let nest = |depth: usize| (0..depth).fold(u32s(&[1]), |inner, _| V::Array(9, vec![inner]));
    assert!(read(&Model::new(2).with("x", nest(7)).bytes()).is_ok());
    for depth in [8, 9, 20_000] {
        let mut deep = Model::new(2).with("x", V::U32(9)).bytes();
        let at = deep
            .windows(5)
            .position(|w| w == [b'x', 4, 0, 0, 0])
            .unwrap()
            + 1;
        let mut bytes = 9_u32.to_le_bytes().to_vec();
        for _ in 0..depth {
            bytes.extend(9_u32.to_le_bytes());
            bytes.extend(1_u64.to_le_bytes());
        }
        deep.splice(at..at + 8, bytes);
        let words = read(&deep).unwrap_err().to_string();
        assert!(words.contains("nested deeper than 8"), "{words}");
    }
}

#[test]
fn tensors_must_follow_one_another() {
    let damaged = |file: &[u8], words: &str| {
        let error = read(file).unwrap_err();
        assert!(matches!(error, GgufError::Damaged { .. }), "{error}");
        assert!(error.to_string().contains(words), "{error}");
    };
    let with = |change: fn(&mut T)| {
        let mut model = Model::new(2);
        change(&mut model.tensors[1].1);
        model.bytes()
    };
    damaged(&with(|t| t.2.extend([0; 64])), "expected 96");
    damaged(&with(|t| t.1 = vec![u64::MAX, 2]), "too large");
    damaged(&with(|t| t.1 = vec![1 << 63]), "too large");
    damaged(&with(|t| t.1 = vec![1 << 50]), "cut short");
    damaged(&with(|t| t.1 = vec![31]), "packs 32 at a time");
    damaged(&with(|t| t.1 = vec![1; 5]), "5 dimensions");
    let mut twice = Model::new(2);
    twice.tensors[2].0 = twice.tensors[1].0.clone();
    damaged(&twice.bytes(), "there twice");
    let whole = Model::new(2).bytes();
    damaged(&whole[..whole.len() - 29], "cut short");
    assert!(
        read(&whole[..whole.len() - 28]).is_ok(),
        "the last padding may be missing"
    );
    damaged(&[&whole[..], b"tail"].concat(), "truncate -s");
    for alignment in [V::U32(0), V::U32(48), V::U64(32), V::Text("32".into())] {
        damaged(
            &Model::new(2).with("general.alignment", alignment).bytes(),
            "power of two",
        );
    }
    let giant = Model::new(2).with("general.alignment", V::U32(1 << 31));
    damaged(&giant.bytes(), "");
}

#[test]
fn an_unknown_type_cannot_reach_beyond_all_numbers() {
    let mut model = Model::new(1);
    model.tensors[1].1.0 = 137;
    let mut file = model.bytes();
    let name = b"blk.0.norm.weight";
    let next = file.windows(name.len()).position(|seen| seen == name);
    let offset = next.unwrap() + name.len() + 4 + 8 + 4;
    file[offset..offset + 8].copy_from_slice(&(u64::MAX - 7).to_le_bytes());
    let error = read(&file).unwrap_err().to_string();
    assert!(error.contains("it is cut short"), "{error}");
}
