//! Invariants 18, 19, 20 and 22 of the specification of distillation, for the estimators that there
//! are: LSQ and its kin, PACT, DoReFa, and those whose grid follows from the row. EWGS, the binary
//! signs of ReActNet and SEQ are not among them. For grids of the row that values of the grid are
//! their own is shown in [`super::tests`], where the scale can be held fixed.

use super::*;
use crate::testing::normals;

/// The estimator that a recipe's settings name.
fn estimator(settings: &str) -> Box<dyn Estimator> {
    serde_json::from_str::<EstimatorSpec>(settings).unwrap().build().unwrap()
}

/// What a recorded row comes to.
struct Found {
    y: Vec<f32>,
    dx: Vec<f32>,
    /// Of the learned values.
    dl: Vec<f32>,
}

/// Values of one row, and gradients of `Σ dy·y`.
fn run(of: &dyn Estimator, x: &[f32], learned: &[f32], dy: &[f32]) -> Found {
    let mut tape = Tape::default();
    let v = tape.leaf(Tensor::new([1, x.len()], x.to_vec()), true);
    let vars: Vec<Var> =
        learned.iter().map(|l| tape.leaf(Tensor::new([1], vec![*l]), true)).collect();
    let y = of.record(&mut tape, v, &vars);
    tape.backward_from(y, dy);
    let gradient = |v: Var| tape.grad(v).map_or(Vec::new(), <[f32]>::to_vec);
    Found {
        y: tape.data(y).to_vec(),
        dx: gradient(v),
        dl: vars.iter().map(|v| gradient(*v).first().copied().unwrap_or(0.0)).collect(),
    }
}

fn values(of: &dyn Estimator, x: &[f32], learned: &[f32]) -> Vec<f32> {
    run(of, x, learned, &vec![1.0; x.len()]).y
}

/// What is learned at first, for a row.
fn first(of: &dyn Estimator, x: &[f32]) -> Vec<f32> {
    of.parameters(x, x.len()).iter().map(|(_, value)| value.data()[0]).collect()
}

/// Estimators with fixed parameters, whose grid has `2^bits` levels over about `[−2, 2]`, with what
/// they have learned; those of DoReFa end at 1.
fn fixed_grids(bits: u8) -> Vec<(Box<dyn Estimator>, Vec<f32>)> {
    let step = 4.0 / level_count(bits);
    let mut all = vec![
        (format!(r#"{{"type": "lsq", "bits": {bits}}}"#), vec![step]),
        (format!(r#"{{"type": "lsq_plus_weight", "bits": {bits}}}"#), vec![step]),
        (format!(r#"{{"type": "lsq_plus_activation", "bits": {bits}}}"#), vec![step, 0.3]),
        (format!(r#"{{"type": "pact", "bits": {bits}}}"#), vec![2.0]),
        (format!(r#"{{"type": "dorefa_activation", "bits": {bits}}}"#), Vec::new()),
        (
            format!(r#"{{"type": "dorefa_activation", "bits": {bits}, "signed": false}}"#),
            Vec::new(),
        ),
    ];
    if bits > 1 {
        all.push((
            format!(r#"{{"type": "lsq", "bits": {bits}, "raise_zero": false}}"#),
            vec![step],
        ));
    }
    all.into_iter().map(|(settings, learned)| (estimator(&settings), learned)).collect()
}

/// Ascending values; the levels that they are rounded to must be `2^bits` (`exactly`) or fewer,
/// ascend with them, and be at most half a step away between the outermost two.
fn check_levels(x: &[f32], y: &[f32], bits: u8, exactly: bool) {
    assert!(y.is_sorted(), "not monotone");
    let mut levels = y.to_vec();
    levels.dedup();
    let most = 1usize << bits;
    assert!(levels.len() <= most && (!exactly || levels.len() == most), "{}", levels.len());
    let (low, high) = (levels[0], levels[levels.len() - 1]);
    let steps = levels.windows(2).map(|pair| pair[1] - pair[0]);
    let half = steps.fold(0f32, f32::max) / 2.0;
    for (x, y) in x.iter().zip(y).filter(|(x, _)| (low..=high).contains(*x)) {
        assert!((x - y).abs() <= half * 1.001 + 1e-6, "{x} became {y}, half a step is {half}");
    }
}

/// Invariant 18: a value of the grid is its own, there are `2^b` levels, the error inside is at most
/// half a step, and order is kept.
#[test]
fn invariant_18_grids() {
    let x: Vec<f32> = (0..4001).map(|i| (i - 2000) as f32 * 2e-3).collect();
    for bits in 1..=8u8 {
        for (of, learned) in fixed_grids(bits) {
            let y = values(&*of, &x, &learned);
            assert_eq!(values(&*of, &y, &learned), y, "{} at {bits} bits", of.name());
            check_levels(&x, &y, bits, true);
        }
    }
}

/// Invariant 18 for grids that follow from the tensor.
#[test]
fn invariant_18_grids_of_the_row() {
    let mut x = normals(61, 4096);
    x.sort_by(f32::total_cmp);
    for bits in 1..=8u8 {
        for kind in ["quest", "ste", "clip", "absmax", "gaussian", "dorefa_weight"] {
            let more = if kind == "dorefa_weight" { "" } else { r#", "hadamard": 0"# };
            let of = estimator(&format!(r#"{{"type": "{kind}", "bits": {bits}{more}}}"#));
            let y = values(&*of, &x, &[]);
            assert!(y.is_sorted(), "{kind} at {bits} bits");
            // DoReFa rounds tanh of the weights, the Gaussian grid is not uniform: the bound of half
            // the widest step holds for the latter only.
            if kind != "dorefa_weight" {
                check_levels(&x, &y, bits, false);
            }
        }
    }
    for (settings, most) in [(r#"{"type": "ternary", "hadamard": 0}"#, 3), (FP4, 15)] {
        let y = values(&*estimator(settings), &x, &[]);
        let mut levels = y.clone();
        levels.dedup();
        assert!(y.is_sorted() && levels.len() <= most);
    }
}

const FP4: &str = r#"{"type": "fp4", "hadamard": 0}"#;

/// Asserts that all are as near as rounding allows.
fn assert_close(found: &[f32], want: &[f32]) {
    assert_eq!(found.len(), want.len());
    for (found, want) in found.iter().zip(want) {
        approx::assert_abs_diff_eq!(*found, *want, epsilon = 1e-6);
    }
}

/// Invariant 19: the worked vector of LSQ (section 3.1), two bits around zero.
#[test]
fn invariant_19_lsq_by_hand() {
    let of = estimator(r#"{"type": "lsq", "bits": 2, "raise_zero": false}"#);
    let x = [-1.4, -0.9, -0.3, 0.2, 0.3, 0.9];
    let found = run(&*of, &x, &[0.5], &[1.0; 6]);
    assert_eq!(found.y, [-1.0, -1.0, -0.5, 0.0, 0.5, 0.5]);
    assert_eq!(found.dx, [0.0, 1.0, 1.0, 1.0, 1.0, 0.0]);
    let terms = [-2.0, -0.2, -0.4, -0.4, 0.4, 1.0];
    let scale = 1.0 / 6f32.sqrt();
    approx::assert_abs_diff_eq!(scale, 0.40825, epsilon = 1e-5);
    for (i, term) in terms.iter().enumerate() {
        let mut dy = [0.0; 6];
        dy[i] = 1.0;
        assert_close(&run(&*of, &x, &[0.5], &dy).dl, &[term * scale]);
    }
    assert_close(&found.dl, &[terms.iter().sum::<f32>() * scale]);
    // The first step, 2 mean|x| / √q_max.
    assert_close(&first(&*of, &x), &[2.0 * 4.0 / 6.0]);
}

/// Invariant 19: the worked vector of DoReFa's weights (section 3.4), and its single bit.
#[test]
fn invariant_19_dorefa_by_hand() {
    let w = [-0.8, -0.1, 0.05, 0.6];
    let of = |bits: u8| {
        estimator(&format!(r#"{{"type": "dorefa_weight", "bits": {bits}, "rescale": false}}"#))
    };
    let third = 1.0 / 3.0;
    assert_close(&values(&*of(2), &w, &[]), &[-1.0, -third, third, 1.0]);
    let one = run(&*of(1), &w, &[], &[1.0, 2.0, 3.0, 4.0]);
    assert_close(&one.y, &[-0.3875, -0.3875, 0.3875, 0.3875]);
    assert_eq!(one.dx, [1.0, 2.0, 3.0, 4.0]);
    let activations = estimator(r#"{"type": "dorefa_activation", "bits": 2, "signed": false}"#);
    let found = run(&*activations, &[-0.5, 0.1, 0.6, 1.5], &[], &[1.0; 4]);
    assert_close(&found.y, &[0.0, 0.0, 2.0 * third, 1.0]);
    assert_eq!(found.dx, [0.0, 1.0, 1.0, 0.0]);
}

/// Invariant 20: LSQ of `c v` with a step `c s` is `c` times that of `v`, and gradients of the
/// values are the same.
#[test]
fn invariant_20_lsq_scales() {
    let x = normals(62, 500);
    let scaled = |c: f32, x: &[f32]| -> Vec<f32> { x.iter().map(|v| c * v).collect() };
    for settings in [
        r#"{"type": "lsq", "bits": 3}"#,
        r#"{"type": "lsq", "bits": 3, "raise_zero": false}"#,
        r#"{"type": "lsq_plus_weight", "bits": 2}"#,
        r#"{"type": "lsq_plus_activation", "bits": 4}"#,
    ] {
        let of = estimator(settings);
        let learned = first(&*of, &x);
        let found = run(&*of, &x, &learned, &[1.0; 500]);
        // Powers of two do not round.
        for c in [0.25, 2.0, 1024.0] {
            let other = run(&*of, &scaled(c, &x), &scaled(c, &learned), &[1.0; 500]);
            assert_eq!(other.y, scaled(c, &found.y), "{settings} {c}");
            assert_eq!((other.dx, other.dl), (found.dx.clone(), found.dl.clone()));
        }
    }
}

/// Invariant 20: what is clamped passes nothing to itself, but moves the step; PACT's clip gets the
/// gradients of what is clamped, with their signs.
#[test]
fn invariant_20_clamped_values() {
    let x = [-9.0, 0.1, 7.0, 8.0];
    for settings in [r#"{"type": "lsq", "bits": 2}"#, r#"{"type": "lsq_plus_weight", "bits": 2}"#] {
        let found = run(&*estimator(settings), &x, &[0.5], &[0.0, 0.0, 1.0, 2.0]);
        assert_eq!(found.dx, [0.0; 4], "{settings}");
        // Both at the highest level, 1.5 steps: 1.5 · 3 / √(4 · 1).
        assert_close(&found.dl, &[2.25]);
    }
    let activation = estimator(r#"{"type": "lsq_plus_activation", "bits": 2}"#);
    let found = run(&*activation, &x, &[0.5, 0.0], &[1.0, 0.0, 1.0, 0.0]);
    assert_eq!(found.dx, [0.0; 4]);
    // (−2 + 1)/√4 for the step, (1 + 1)/√4 for the offset.
    assert_close(&found.dl, &[-0.5, 1.0]);
    let pact = estimator(r#"{"type": "pact", "bits": 4}"#);
    let dy = [1.0, 10.0, 100.0, 1000.0];
    let found = run(&*pact, &[0.5, 2.0, 3.0, 1.9], &[2.0], &dy);
    assert_eq!((found.dx, found.dl), (vec![1.0, 0.0, 0.0, 1000.0], vec![110.0]));
    // The count of the clamped, for equal gradients; a negative one counts against.
    let count = run(&*pact, &[3.0, 2.0, 1.0, 4.0], &[2.0], &[1.0; 4]).dl;
    assert_eq!(count, [3.0]);
    assert_eq!(run(&*pact, &[3.0, -2.0, 1.0, -4.0], &[2.0], &[1.0; 4]).dl, [-1.0]);
}

/// Invariant 22: a step that is pushed below zero for a thousand steps counts as the least one, with
/// finite values and gradients, and keeps a gradient that brings it back.
#[test]
fn invariant_22_steps_stay_above_zero() {
    let x = normals(63, 256);
    // Under these gradients every clamped value wants to be smaller.
    let outward: Vec<f32> = x.iter().map(|v| v.signum()).collect();
    let inward: Vec<f32> = outward.iter().map(|g| -g).collect();
    for settings in [
        r#"{"type": "lsq", "bits": 4}"#,
        r#"{"type": "lsq", "bits": 1}"#,
        r#"{"type": "lsq_plus_weight", "bits": 3}"#,
        r#"{"type": "lsq_plus_activation", "bits": 4}"#,
        r#"{"type": "pact", "bits": 4}"#,
    ] {
        let of = estimator(settings);
        let mut learned = first(&*of, &x);
        // Beside an offset the least step would be lost in rounding.
        learned.iter_mut().skip(1).for_each(|offset| *offset = 0.0);
        for _ in 0..1000 {
            let found = run(&*of, &x, &learned, &outward);
            assert!(found.y.iter().chain(&found.dx).chain(&found.dl).all(|v| v.is_finite()));
            let span = found.y.iter().fold(0f32, |most, y| most.max((y - found.y[0]).abs()));
            assert!(span >= 0.5 * EPSILON, "{settings}: all values are one");
            learned[0] -= 0.1 * found.dl[0].abs().max(1e-3);
        }
        assert!(learned[0] < 0.0, "{settings}: {}", learned[0]);
        let pulled = run(&*of, &x, &learned, &inward).dl[0];
        assert!(pulled < 0.0, "{settings}: {pulled}");
    }
}

/// Invariant 22: rows of zeros and of one value give numbers, in values and in gradients.
#[test]
fn invariant_22_rows_without_a_scale() {
    let mut all: Vec<String> = Vec::new();
    for bits in [1, 2, 8] {
        for kind in [
            "quest",
            "ste",
            "clip",
            "absmax",
            "gaussian",
            "lsq",
            "lsq_plus_weight",
            "lsq_plus_activation",
            "pact",
            "dorefa_weight",
            "dorefa_activation",
        ] {
            let more = if kind == "quest" { r#", "hadamard": 16"# } else { "" };
            all.push(format!(r#"{{"type": "{kind}", "bits": {bits}{more}}}"#));
        }
        all.push(format!(r#"{{"type": "dorefa_weight", "bits": {bits}, "rescale": false}}"#));
    }
    let others = [
        r#"{"type": "ternary", "hadamard": 16}"#,
        FP4,
        r#"{"type": "sparse_pairs", "hadamard": 16}"#,
    ];
    all.extend(others.map(String::from));
    for settings in &all {
        let of = estimator(settings);
        for value in [0.0, 3.0, -1e-20, 1e15] {
            let x = [value; 16];
            let learned = first(&*of, &x);
            let found = run(&*of, &x, &learned, &[1.0; 16]);
            let mut numbers = found.y.iter().chain(&found.dx).chain(&found.dl).chain(&learned);
            assert!(numbers.all(|v| !v.is_nan()), "{settings} of {value}");
            assert!(learned.first().is_none_or(|l| *l >= EPSILON), "{settings} of {value}");
        }
    }
}
