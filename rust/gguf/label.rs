//! The size label and the name of a file, true again after a cut.

use super::kept::New;

/// A size as llama.cpp names it, `135M` or `8x7B`: `size_label` of gguf-py, from the parameters
/// that are there. Experts count once, and their number stands before.
pub(super) fn size_label(tensors: &[New]) -> String {
    let (mut shared, mut expert, mut experts, mut stacks) = (0_u64, 0_u64, 0_u64, 0_u64);
    for New { name, dims, .. } in tensors {
        // The parser has held the product against the file.
        let size: u64 = dims.iter().product();
        let stacked = if name.contains(".bias") { 1 } else { 2 };
        match dims.get(stacked) {
            Some(&number) if name.contains("_exps.") && dims.len() > 2 && number > 0 => {
                expert = expert.saturating_add(size / number);
                experts = experts.saturating_add(number);
                stacks += 1;
            }
            _ => shared = shared.saturating_add(size),
        }
    }
    let label = rounded(shared.saturating_add(expert));
    match experts.checked_div(stacks) {
        Some(number @ 1..) => format!("{number}x{label}"),
        _ => label,
    }
}

/// A number of parameters to two digits, or to all that stand before the point.
fn rounded(parameters: u64) -> String {
    const UNITS: [(f64, f64, char); 3] = [(1e12, 1e-12, 'T'), (1e9, 1e-9, 'B'), (1e6, 1e-6, 'M')];
    let exact = parameters as f64;
    let unit = UNITS.iter().find(|(least, ..)| exact > *least);
    let (scale, suffix) = unit.map_or((1e-3, 'K'), |&(_, scale, suffix)| (scale, suffix));
    let scaled = exact * scale;
    let whole = format!("{:.0}", scaled.round_ties_even());
    let digits = 2_usize.saturating_sub(whole.trim_start_matches('0').len());
    format!("{scaled:.digits$}{suffix}")
}

/// A number of things that a name may tell: what they are, and how many before and after a cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Count {
    pub what: &'static str,
    pub before: u64,
    pub after: u64,
}

impl Count {
    fn told(&self, number: u64) -> String {
        let end = if number == 1 { "" } else { "s" };
        format!("{number} {}{end}", self.what)
    }
}

/// A model's name with the numbers of what is left: `Smol (22 layers)`. Numbers that an earlier
/// cut left there are replaced, so that cutting twice is cutting once.
pub(super) fn name_with_counts(name: &str, counts: &[Count]) -> String {
    let before: Vec<String> = counts
        .iter()
        .map(|count| count.told(count.before))
        .collect();
    let earlier = name
        .strip_suffix(')')
        .and_then(|name| name.rsplit_once(" ("));
    let earlier =
        earlier.filter(|(_, told)| told.split(", ").all(|one| before.iter().any(|b| b == one)));
    let (name, told) = earlier.unwrap_or((name, ""));
    let told: Vec<&str> = told.split(", ").collect();
    let left = counts.iter().zip(&before);
    let left = left
        .filter(|(count, before)| count.before != count.after || told.contains(&before.as_str()));
    let left: Vec<String> = left.map(|(count, _)| count.told(count.after)).collect();
    format!("{} ({})", name.trim_end(), left.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `model_weight_count_rounded_notation` of gguf-py 0.19 gives.
    const ROUNDED: [(u64, &str); 30] = [
        (0, "0.00K"),
        (10, "0.01K"),
        (95, "0.10K"),
        (949, "0.9K"),
        (950, "1.0K"),
        (1049, "1.0K"),
        (1050, "1.1K"),
        (9499, "9.5K"),
        (9500, "10K"),
        (99_499, "99K"),
        (99_500, "100K"),
        (999_999, "1000K"),
        (1_000_000, "1000K"),
        (1_000_001, "1.0M"),
        (1_050_000, "1.1M"),
        (2_500_001, "2.5M"),
        (9_949_999, "10M"),
        (134_515_008, "135M"),
        (999_999_999, "1000M"),
        (1_000_000_000, "1000M"),
        (1_000_000_001, "1.0B"),
        (6_738_415_616, "6.7B"),
        (9_949_999_999, "10B"),
        (70_553_706_496, "71B"),
        (671_026_419_200, "671B"),
        (1_000_000_000_000, "1000B"),
        (1_000_000_000_001, "1.0T"),
        (1_250_000_000_000, "1.2T"),
        (9_999_999_999_999, "10T"),
        (9_223_372_036_854_775_807, "9223372T"),
    ];

    #[test]
    fn parameters_are_rounded_as_gguf_py_rounds_them() {
        for (parameters, label) in ROUNDED {
            assert_eq!(rounded(parameters), label, "{parameters}");
        }
    }

    #[test]
    fn experts_count_once_and_stand_before() {
        let tensor = |name: &str, dims: &[u64]| New {
            name: name.into(),
            dims: dims.into(),
            ggml_type: 0,
            ranges: vec![],
        };
        let tensors = [
            tensor("token_embd.weight", &[1000, 3000]),
            tensor("blk.0.ffn_up_exps.weight", &[1000, 500, 8]),
            tensor("blk.0.ffn_up_exps.bias", &[500, 8]),
            tensor("blk.1.ffn_up_exps.weight", &[1000, 500, 16]),
        ];
        assert_eq!(size_label(&tensors), "12x4.0M");
        assert_eq!(size_label(&tensors[..1]), "3.0M");
        assert_eq!(size_label(&[]), "0.00K");
        let many = tensor("blk.0.x_exps.weight", &[i64::MAX as u64, 1, 1]);
        assert_eq!(
            size_label(&[many.clone(), many.clone(), many]),
            "1x18446744T"
        );
    }

    #[test]
    fn a_name_tells_what_is_left() {
        let layers = |before, after| Count {
            what: "layer",
            before,
            after,
        };
        let experts = |before, after| Count {
            what: "expert",
            before,
            after,
        };
        let told = |name, counts: &[Count]| name_with_counts(name, counts);
        assert_eq!(told("Smol", &[layers(30, 22)]), "Smol (22 layers)");
        assert_eq!(told("Smol (22 layers)", &[layers(22, 1)]), "Smol (1 layer)");
        assert_eq!(
            told("Smol (22 layers)", &[layers(30, 21)]),
            "Smol (22 layers) (21 layers)"
        );
        assert_eq!(told("", &[layers(3, 2)]), " (2 layers)");
        for (name, layers, experts, expected) in [
            ("Mix", layers(4, 4), experts(8, 6), "Mix (6 experts)"),
            ("Mix", layers(4, 3), experts(8, 8), "Mix (3 layers)"),
            (
                "Mix",
                layers(4, 3),
                experts(8, 6),
                "Mix (3 layers, 6 experts)",
            ),
            (
                "Mix (3 layers)",
                layers(3, 3),
                experts(8, 6),
                "Mix (3 layers, 6 experts)",
            ),
            (
                "Mix (6 experts)",
                layers(4, 3),
                experts(6, 6),
                "Mix (3 layers, 6 experts)",
            ),
            (
                "Mix (3 layers, 6 experts)",
                layers(3, 3),
                experts(6, 1),
                "Mix (3 layers, 1 expert)",
            ),
            (
                "Mix (3 layers, 6 experts)",
                layers(3, 2),
                experts(8, 8),
                "Mix (3 layers, 6 experts) (2 layers)",
            ),
        ] {
            assert_eq!(told(name, &[layers, experts]), expected, "{name}");
        }
    }
}
