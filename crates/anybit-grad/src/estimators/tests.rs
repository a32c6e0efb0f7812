//! What QuEST's specification lists as testable, for grids that follow from the row; the letters
//! are its section 8's.

use anybit_core::{GridSpec, GroupGrid};

use super::levels::LevelGrid;
use super::rotation::Rotation;
use super::uniform::UniformGrid;
use super::*;
use crate::testing::normals;

/// The estimator that a recipe's settings name.
fn estimator(settings: &str) -> Box<dyn Estimator> {
    serde_json::from_str::<EstimatorSpec>(settings).unwrap().build().unwrap()
}

fn quest(bits: u8, hadamard: usize, form: &str) -> Box<dyn Estimator> {
    estimator(&format!(
        r#"{{"type": "quest", "bits": {bits}, "hadamard": {hadamard}, "form": "{form}"}}"#
    ))
}

/// The recorded value of `x`, rows of `cols`, and the gradient of `Σ dy·y`.
fn run(of: &dyn Estimator, x: &[f32], cols: usize, dy: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let mut tape = Tape::default();
    let v = tape.leaf(Tensor::new([x.len() / cols, cols], x.to_vec()), true);
    let y = of.record(&mut tape, v, &[]);
    tape.backward_from(y, dy);
    (tape.data(y).to_vec(), tape.grad(v).unwrap().to_vec())
}

fn values(of: &dyn Estimator, x: &[f32], cols: usize) -> Vec<f32> {
    run(of, x, cols, &vec![1.0; x.len()]).0
}

/// Who passes, of an estimator without a rotation.
fn mask(of: &dyn Estimator, x: &[f32], cols: usize) -> Vec<f32> {
    run(of, x, cols, &vec![1.0; x.len()]).1
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| *a as f64 * *b as f64).sum()
}

/// `Σ (y − x)² / Σ x²`.
fn error(x: &[f32], y: &[f32]) -> f64 {
    let difference: Vec<f32> = x.iter().zip(y).map(|(x, y)| x - y).collect();
    dot(&difference, &difference) / dot(x, x)
}

fn assert_close(found: &[f32], want: &[f32], epsilon: f32) {
    assert_eq!(found.len(), want.len());
    for (found, want) in found.iter().zip(want) {
        approx::assert_abs_diff_eq!(*found, *want, epsilon = epsilon);
    }
}

/// `E f(ξ)` for `ξ ~ N(0, 1)`, by the midpoint rule.
fn expectation(f: impl Fn(f64) -> f64) -> f64 {
    const POINTS: usize = 1 << 19;
    let h = 18.0 / POINTS as f64;
    let density = |x: f64| (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
    let points = (0..POINTS).map(|i| (i as f64 + 0.5) * h - 9.0);
    points.map(|x| density(x) * f(x)).sum::<f64>() * h
}

fn indicator(holds: bool) -> f64 {
    if holds { 1.0 } else { 0.0 }
}

const GOLDEN: [f32; 8] = [0.1, -0.2, 0.3, -0.4, 0.5, -0.6, 0.7, 3.0];

#[test]
fn golden_row() {
    let rows: [([i32; 8], [f32; 8], f32, f64); 4] = [
        ([0, -1, 0, -1, 0, -1, 0, 0], [0.909_728; 8], 0.0, 0.808_500),
        ([0, -1, 0, -1, 0, -1, 0, 1], set([0.567_630; 8], &[(7, 1.702_891)]), 0.0, 0.269_899),
        (
            [0, -1, 0, -1, 0, -1, 1, 3],
            set([0.334_083; 8], &[(6, 1.002_248), (7, 2.338_578)]),
            0.0,
            0.088_169_2,
        ),
        (
            [0, -1, 0, -2, 1, -2, 1, 7],
            set([0.573_264; 8], &[(0, 0.191_088), (1, 0.191_088), (2, 0.191_088), (7, 2.866_322)]),
            1.0,
            0.011_284_1,
        ),
    ];
    for (bits, (q, magnitudes, last, mse)) in (1u8..).zip(rows) {
        let (codes, _) = half_integer_codes(&GOLDEN, bits, 0).unwrap();
        assert_eq!(signed(&codes, bits), q, "{bits} bits");
        let of = quest(bits, 0, "half");
        let y = values(&*of, &GOLDEN, 8);
        let want: Vec<f32> =
            magnitudes.iter().zip(q).map(|(m, q)| if q < 0 { -m } else { *m }).collect();
        assert_close(&y, &want, 2e-6);
        approx::assert_relative_eq!(error_mean(&GOLDEN, &y), mse, max_relative = 1e-5);
        assert_eq!(mask(&*of, &GOLDEN, 8), set([1.0; 8], &[(7, last)]), "{bits} bits");
        approx::assert_relative_eq!(of.trusted_share(&GOLDEN, 8, &[]), (7.0 + last as f64) / 8.0);
    }
    // One bit with default trust, and with s = 1.3: the same mask.
    for scale in [2.0, 1.3] {
        let of = estimator(&format!(
            r#"{{"type": "quest", "bits": 1, "hadamard": 0, "clip_scale": {scale}}}"#
        ));
        assert_eq!(mask(&*of, &GOLDEN, 8), set([1.0; 8], &[(7, 0.0)]));
    }
}

fn set(mut row: [f32; 8], entries: &[(usize, f32)]) -> [f32; 8] {
    entries.iter().for_each(|(i, v)| row[*i] = *v);
    row
}

/// Mean squared error.
fn error_mean(x: &[f32], y: &[f32]) -> f64 {
    error(x, y) * dot(x, x) / x.len() as f64
}

/// The kernels' signed codes of `bits`.
fn signed(codes: &[u8], bits: u8) -> Vec<i32> {
    codes.iter().map(|u| *u as i32 - (1 << (bits - 1))).collect()
}

#[test]
fn golden_row_rotated() {
    let mut rotated = GOLDEN;
    Rotation::new(8, Form::Half).unwrap().rotate(&mut rotated);
    let want =
        [1.202_082, -0.070_711, -1.343_503, 1.060_66, -1.343_503, 0.777_817, 1.343_503, -1.343_503];
    assert_close(&rotated, &want, 1e-6);
    let rows: [([i32; 8], f64); 4] = [
        ([0, -1, -1, 0, -1, 0, 0, -1], 0.197_780),
        ([1, -1, -2, 0, -2, 0, 1, -2], 0.162_705),
        ([1, -1, -3, 1, -3, 1, 2, -3], 0.073_819_9),
        ([3, -1, -4, 2, -4, 2, 3, -4], 0.009_452_54),
    ];
    for (bits, (q, mse)) in (1u8..).zip(rows) {
        let (codes, step) = half_integer_codes(&GOLDEN, bits, 8).unwrap();
        assert_eq!(signed(&codes, bits), q, "{bits} bits");
        // The half form is the codes' values to the bit, the full form stands for the row itself.
        let y = values(&*quest(bits, 8, "half"), &GOLDEN, 8);
        let zero = GridSpec::HalfInteger { bits, group_size: None, exact: true }.implied_zero();
        let grid = GroupGrid { scale: step, zero, max_code: level_count(bits) - 1.0 };
        let decoded: Vec<f32> = codes.iter().map(|u| grid.decode(*u)).collect();
        assert_eq!(decoded, y);
        approx::assert_relative_eq!(error_mean(&rotated, &y), mse, max_relative = 2e-5);
        let full = values(&*quest(bits, 8, "full"), &GOLDEN, 8);
        approx::assert_relative_eq!(error_mean(&GOLDEN, &full), mse, max_relative = 2e-5);
    }
    // s = 2 trusts all, s = 1.3 the mask 0 1 0 1 0 1 0 0: ones, which rotate to √8 e₀, are stopped.
    let scaled = |scale: f32| {
        estimator(&format!(
            r#"{{"type": "quest", "bits": 1, "hadamard": 8, "form": "full", "clip_scale": {scale}}}"#
        ))
    };
    assert_eq!(scaled(2.0).trusted_share(&GOLDEN, 8, &[]), 1.0);
    assert_eq!(scaled(1.3).trusted_share(&GOLDEN, 8, &[]), 3.0 / 8.0);
    assert_close(&mask(&*scaled(2.0), &GOLDEN, 8), &[1.0; 8], 1e-6);
    assert_close(&mask(&*scaled(1.3), &GOLDEN, 8), &[0.0; 8], 1e-6);
    for (i, passes) in [0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0].into_iter().enumerate() {
        // In the half form the gradient of one rotated entry is that row of H, or nothing.
        let dy = set([0.0; 8], &[(i, 1.0)]);
        let of = r#"{"type": "quest", "bits": 1, "hadamard": 8, "clip_scale": 1.3}"#;
        let (_, dx) = run(&*estimator(of), &GOLDEN, 8, &dy);
        approx::assert_abs_diff_eq!(dot(&dx, &dx), passes, epsilon = 1e-6);
    }
}

/// Section 1.3: constants, errors, clipped and masked fractions, G5 and G6.
#[test]
fn table_of_the_uniform_grid() {
    let table = [
        (3.633802e-1, 0.42494, 0.11054),
        (1.188461e-1, 0.13530, 4.6439e-2),
        (3.743966e-2, 4.0260e-2, 1.9074e-2),
        (1.154288e-2, 1.1939e-2, 7.3287e-3),
        (3.495211e-3, 3.5444e-3, 2.6111e-3),
        (1.040048e-3, 1.0507e-3, 8.7282e-4),
        (3.043660e-4, 3.1694e-4, 2.8408e-4),
        (8.782161e-5, 1.0236e-4, 9.6124e-5),
    ];
    for (bits, (mse, clipped, masked)) in (1u8..).zip(table) {
        let grid = UniformGrid::gaussian(bits, uniform::trust(bits));
        let alpha = ALPHA[bits as usize - 1];
        let value = |x: f64, end: f64| grid.value(x as f32, grid.step(end as f32)) as f64;
        let error_at = |end: f64| expectation(|x| (value(x, end) - x).powi(2));
        let found = error_at(alpha);
        approx::assert_relative_eq!(found, mse, max_relative = 2e-4);
        assert!(error_at(0.9 * alpha) > found && error_at(1.1 * alpha) > found, "{bits} bits");
        let beyond = |limit: f64| expectation(|x| indicator(x.abs() > limit));
        approx::assert_relative_eq!(beyond(alpha), clipped, max_relative = 5e-4);
        let limit = grid.limit(alpha as f32) as f64;
        approx::assert_relative_eq!(beyond(limit), masked, max_relative = 5e-4);
        // E[ξ Q] = E[Q²] = 1 − MSE where the error is least.
        let product = expectation(|x| x * value(x, alpha));
        let square = expectation(|x| value(x, alpha).powi(2));
        approx::assert_abs_diff_eq!(product, 1.0 - mse, epsilon = 4e-5);
        approx::assert_abs_diff_eq!(square, 1.0 - mse, epsilon = 8e-5);
    }
    for (scale, masked) in [(1.3, 0.29962), (1.25, 0.31859)] {
        let limit = UniformGrid::gaussian(1, scale).limit(ALPHA[0] as f32) as f64;
        let found = expectation(|x| indicator(x.abs() > limit));
        approx::assert_relative_eq!(found, masked, max_relative = 5e-4);
    }
}

/// Error and masked fraction of a table of levels.
fn measured(grid: &LevelGrid) -> (f64, f64) {
    let mse = expectation(|x| (grid.nearest(x as f32) as f64 - x).powi(2));
    (mse, expectation(|x| indicator(!grid.passes(x as f32))))
}

#[test]
fn tables_of_levels() {
    let (mse, masked) = measured(&ternary::grid(ternary::TRUST));
    approx::assert_relative_eq!(mse, 1.901740e-1, max_relative = 2e-4);
    approx::assert_relative_eq!(masked, 0.06636, max_relative = 5e-4);
    // F1, and both masks.
    let fp4 = fp4::grid(Fp4Trust::HalfGap);
    assert_eq!(fp4.levels().len(), 15);
    let (mse, masked) = measured(&fp4);
    approx::assert_relative_eq!(mse, 1.26849e-2, max_relative = 2e-4);
    approx::assert_relative_eq!(masked, 0.00065, max_relative = 1e-2);
    let released = fp4::grid(Fp4Trust::Released);
    approx::assert_relative_eq!(measured(&released).1, 0.0154, max_relative = 1e-2);
    for (x, both) in [(2.2, true), (2.3, false), (2.59, false), (2.62, true), (3.23, true)] {
        assert!(fp4.passes(x) && released.passes(-x) == both, "{x}");
    }
    assert!(fp4.passes(3.40) && !fp4.passes(3.42) && !released.passes(3.25));
    for (bits, want) in [(1, 0.36338), (2, 0.11748), (3, 0.03455), (4, 0.00950), (8, 4.1185e-5)] {
        let [ste, clip, trust] =
            [GaussianGradient::Ste, GaussianGradient::Clip, GaussianGradient::Trust]
                .map(|gradient| measured(&gaussian::grid(bits, gradient)));
        approx::assert_relative_eq!(ste.0, want, max_relative = 1e-3);
        assert!(ste.1 == 0.0 && clip.1 > trust.1 && trust.1 > 0.0, "{bits} bits");
    }
}

/// G4: through the estimator, on one long row and on rows of 1024.
#[test]
fn errors_on_gaussian_rows() {
    let x = normals(11, 1 << 20);
    let table = [
        (1, 3.633802e-1, 0.3636),
        (2, 1.188461e-1, 0.1189),
        (3, 3.743966e-2, 0.0375),
        (4, 1.154288e-2, 0.01155),
        (8, 8.782161e-5, 9e-5),
    ];
    for (bits, long, short) in table {
        let of = quest(bits, 0, "half");
        let tolerance = if bits == 8 { 0.06 } else { 0.01 };
        let found = error(&x, &values(&*of, &x, x.len()));
        approx::assert_relative_eq!(found, long, max_relative = tolerance);
        let found = error(&x, &values(&*of, &x, 1024));
        approx::assert_relative_eq!(found, short, max_relative = 2.0 * tolerance);
    }
    for (bits, want) in [(1, 7.5), (2, 0.4617), (3, 0.0817), (4, 0.01777), (8, 6.16e-5)] {
        let of = estimator(&format!(r#"{{"type": "absmax", "bits": {bits}}}"#));
        let found = error(&x, &values(&*of, &x, 1024));
        approx::assert_relative_eq!(found, want, max_relative = 0.05);
    }
}

/// G1 to G3.
#[test]
fn the_grid_is_odd_and_scales() {
    let x: Vec<f32> = normals(3, 512).iter().map(|v| 3.0 * v).collect();
    let negated: Vec<f32> = x.iter().map(|v| -v).collect();
    let larger: Vec<f32> = x.iter().map(|v| 4.0 * v).collect();
    for bits in 1..=8u8 {
        let of = quest(bits, 0, "half");
        let y = values(&*of, &x, 512);
        let mut levels = y.clone();
        levels.sort_by(f32::total_cmp);
        levels.dedup();
        assert!(levels.len() <= 1 << bits && (bits > 4 || levels.len() == 1 << bits));
        let grid = UniformGrid::gaussian(bits, 1.0);
        let (end, step) = (grid.end(&x), grid.step(grid.end(&x)));
        assert!(y.iter().all(|y| y.abs() <= end * 1.000_001));
        if bits < 5 {
            approx::assert_relative_eq!(*levels.last().unwrap(), end, max_relative = 1e-6);
        }
        assert!(y.iter().all(|y| grid.value(*y, step) == *y));
        for (y, minus) in y.iter().zip(values(&*of, &negated, 512)) {
            assert_eq!(*y, -minus);
        }
        for (y, four) in y.iter().zip(values(&*of, &larger, 512)) {
            approx::assert_relative_eq!(4.0 * y, four, max_relative = 1e-6);
        }
    }
}

/// S1 to S3.
#[test]
fn half_of_the_pairs_stay() {
    let x = normals(5, 512 * 1024);
    let of = estimator(r#"{"type": "sparse_pairs", "hadamard": 0}"#);
    let (y, passes) = run(&*of, &x, 1024, &vec![1.0; x.len()]);
    let (mut pruned, mut trusted) = (0.0, 0.0);
    let trust = ALPHA[3] as f32 / 15.0;
    for ((x, y), passes) in x.chunks(1024).zip(y.chunks(1024)).zip(passes.chunks(1024)) {
        let limit = trust * rows::rms(x);
        for (i, y) in y.chunks(8).enumerate() {
            let kept = y.chunks(2).filter(|pair| pair[0] != 0.0 && pair[1] != 0.0).count();
            let gone = y.chunks(2).filter(|pair| pair[0] == 0.0 && pair[1] == 0.0).count();
            assert_eq!((kept, gone), (2, 2));
            for (j, y) in y.iter().enumerate().filter(|(_, y)| **y == 0.0) {
                let (a, passes) = (x[8 * i + j].abs(), passes[8 * i + j]);
                // The bound differs in the last bit.
                assert!((a - limit).abs() < 1e-6 || passes == indicator(a <= limit) as f32, "{y}");
                pruned += 1.0;
                trusted += passes as f64;
            }
        }
    }
    approx::assert_relative_eq!(error(&x, &y), 0.2151, max_relative = 0.01);
    approx::assert_relative_eq!(trusted / pruned, 0.194, max_relative = 0.02);
    approx::assert_relative_eq!(1.0 - of.trusted_share(&x, 1024, &[]), 0.410, max_relative = 0.01);
}

/// An outlier alone in its row: with the rotation it keeps its direction and its gradient.
#[test]
fn one_hot_rows() {
    let mut x = vec![0.0; 128];
    x[37] = -5.0;
    let table = [
        (1, 0.797885, 0.0705),
        (2, 1.493535, 0.1320),
        (3, 0.879029, 0.1813),
        (4, 0.837977, 0.2222),
        (8, 0.990278, 0.3434),
    ];
    for (bits, rotated, plain) in table {
        let default = |hadamard: usize| {
            // At one bit the default masks; this is about trust of half a step.
            let trust = if bits == 1 { r#", "clip_scale": 2.0"# } else { "" };
            estimator(&format!(
                r#"{{"type": "quest", "bits": {bits}, "hadamard": {hadamard}, "form": "full"{trust}}}"#
            ))
        };
        let mut want = vec![0.0; 128];
        want[37] = -5.0 * rotated;
        assert_close(&values(&*default(128), &x, 128), &want, 5e-6);
        assert_eq!(default(128).trusted_share(&x, 128, &[]), 1.0);
        approx::assert_abs_diff_eq!(
            values(&*default(0), &x, 128)[37],
            -5.0 * plain,
            epsilon = 5e-4
        );
        assert_eq!(mask(&*default(0), &x, 128)[37], 0.0);
    }
}

/// Rotation makes rows Gaussian: outliers no longer set the scale.
#[test]
fn the_rotation_helps_heavy_tails() {
    let n = 256 * 1024;
    let uniform: Vec<f32> = {
        let mut rng = anybit_core::rng::SplitMix64::new(8);
        (0..n).map(|_| rng.uniform() as f32).collect()
    };
    let laplace: Vec<f32> = uniform
        .iter()
        .map(|u| (2.0 * u - 1.0).signum() * -(1.0 - (2.0 * u - 1.0).abs()).max(1e-7).ln())
        .collect();
    let flat: Vec<f32> = uniform.iter().map(|u| 2.0 * u - 1.0).collect();
    let mut channels = normals(9, n);
    for (i, v) in channels.iter_mut().enumerate() {
        *v *= if i % 1024 % 100 == 7 { 20.0 } else { 1.0 };
    }
    for (x, bits, plain, rotated) in [
        (&laplace, 4, 0.0372, 0.01157),
        (&laplace, 1, 0.508, 0.364),
        (&channels, 4, 0.496, 0.0113),
        (&channels, 8, 0.374, 8e-5),
        (&flat, 4, 0.00966, 0.01145),
    ] {
        for (hadamard, want) in [(0, plain), (128, rotated)] {
            let found = error(x, &values(&*quest(bits, hadamard, "full"), x, 1024));
            approx::assert_relative_eq!(found, want, max_relative = 0.1);
        }
    }
}

/// B3: the Jacobian is a projection whose trace counts who passes, in the full form.
#[test]
fn the_jacobian_is_a_projection() {
    for bits in [1, 2, 4] {
        let of = quest(bits, 64, "full");
        let x: Vec<f32> = normals(20, 128).iter().map(|v| v * v * v).collect();
        let apply = |g: &[f32]| run(&*of, &x, 128, g).1;
        let (u, v) = (normals(21, 128), normals(22, 128));
        let (ju, jv) = (apply(&u), apply(&v));
        assert_close(&apply(&ju), &ju, 5e-6);
        approx::assert_abs_diff_eq!(dot(&ju, &v), dot(&u, &jv), epsilon = 1e-5);
        let unit = |i: usize| -> Vec<f32> { (0..128).map(|j| indicator(i == j) as f32).collect() };
        let trace: f64 = (0..128).map(|i| apply(&unit(i))[i] as f64).sum();
        let trusted = of.trusted_share(&x, 128, &[]) * 128.0;
        approx::assert_abs_diff_eq!(trace, trusted, epsilon = 1e-4);
        assert!(bits > 1 || trusted < 128.0);
    }
    // ‖Jg‖²/‖g‖² on Gaussian rows; B5.
    let (x, g) = (normals(23, 256 * 1024), normals(24, 256 * 1024));
    let two = estimator(r#"{"type": "quest", "bits": 1, "form": "full", "clip_scale": 2}"#);
    for (of, want) in [
        (two, 0.889),
        (quest(1, 128, "full"), 0.700),
        (quest(2, 128, "full"), 0.953),
        (quest(3, 128, "full"), 0.981),
        (quest(4, 128, "full"), 0.9927),
        (quest(8, 128, "full"), 0.99992),
    ] {
        let jg = run(&*of, &x, 1024, &g).1;
        approx::assert_relative_eq!(dot(&jg, &jg) / dot(&g, &g), want, max_relative = 5e-3);
        approx::assert_relative_eq!(of.trusted_share(&x, 1024, &[]), want, max_relative = 5e-3);
    }
}

/// B6: the closed form is the comparison of errors, away from ties; B2: in the grid's range the
/// gradient is exactly 1, and entries do not see each other.
#[test]
fn trust_is_the_comparison_of_errors() {
    let x: Vec<f32> = normals(30, 4096).iter().map(|v| v * v * v).collect();
    for bits in 2..=8u8 {
        let of = quest(bits, 0, "half");
        let (y, passes) = run(&*of, &x, 4096, &vec![1.0; 4096]);
        let half_step = rows::rms(&x) * ALPHA[bits as usize - 1] as f32 / (level_count(bits) - 1.0);
        for ((x, y), passes) in x.iter().zip(&y).zip(&passes) {
            let excess = (y - x).abs() - half_step;
            assert!(excess.abs() < 1e-5 || *passes == indicator(excess < 0.0) as f32, "{x}");
        }
        let first: Vec<f32> = (0..4096).map(|i| indicator(i == 0) as f32).collect();
        let alone = run(&*of, &x, 4096, &first).1;
        assert!(alone[1..].iter().all(|g| *g == 0.0) && alone[0] == passes[0]);
    }
}

/// B7 and B8.
#[test]
fn far_weights_learn_only_with_the_rotation() {
    let mut x = normals(31, 256);
    x[9] = 10.0;
    let dy = normals(32, 256);
    let plain = run(&*quest(4, 0, "half"), &x, 256, &dy).1;
    assert_eq!(plain[9], 0.0);
    assert!(run(&*quest(4, 128, "full"), &x, 256, &dy).1[9] != 0.0);
    let ste = run(&*estimator(r#"{"type": "ste", "bits": 4}"#), &x, 256, &dy);
    let wide = r#"{"type": "quest", "bits": 4, "hadamard": 0, "clip_scale": 1e9}"#;
    assert_eq!(ste, run(&*estimator(wide), &x, 256, &dy));
    assert_eq!(ste.1, dy);
    let (y, dx) = run(&*estimator(r#"{"type": "clip", "bits": 4}"#), &x, 256, &dy);
    assert_eq!(y, ste.0);
    let end = UniformGrid::gaussian(4, 1.0).end(&x);
    for ((x, dx), dy) in x.iter().zip(&dx).zip(&dy) {
        assert_eq!(*dx, if x.abs() <= end { *dy } else { 0.0 });
    }
}

/// B1 and B4: both forms of both operands give the same product and the same gradients, those of
/// section 1.4.
#[test]
fn half_and_full_form_agree() {
    let (m, k, n) = (6, 256, 5);
    let cubes =
        |seed, n: usize| -> Vec<f32> { normals(seed, n).iter().map(|v| v * v * v).collect() };
    let (x, w, g) = (cubes(40, m * k), cubes(41, n * k), normals(42, m * n));
    for kind in [
        r#""type": "quest", "bits": 1"#,
        r#""type": "quest", "bits": 4"#,
        r#""type": "fp4", "trust": "released""#,
        r#""type": "sparse_pairs""#,
        r#""type": "absmax", "bits": 4, "hadamard": 64"#,
    ] {
        let layer = |form: &str| {
            let of = estimator(&format!(r#"{{{kind}, "form": "{form}"}}"#));
            let mut tape = Tape::default();
            let vx = tape.leaf(Tensor::new([m, k], x.clone()), true);
            let vw = tape.leaf(Tensor::new([n, k], w.clone()), true);
            let (qx, qw) = (of.record(&mut tape, vx, &[]), of.record(&mut tape, vw, &[]));
            tape.keep_grad(qx);
            tape.keep_grad(qw);
            let y = tape.linear(qx, qw, None);
            tape.backward_from(y, &g);
            let gradient = |v: Var| tape.grad(v).unwrap().to_vec();
            // What a quantized operand gets is passed on by the estimator alone.
            for (v, q, data) in [(vx, qx, &x), (vw, qw, &w)] {
                assert_eq!(run(&*of, data, k, &gradient(q)).1, gradient(v));
            }
            (tape.data(y).to_vec(), gradient(vx), gradient(vw))
        };
        let (half, full) = (layer("half"), layer("full"));
        for (half, full) in [(&half.0, &full.0), (&half.1, &full.1), (&half.2, &full.2)] {
            let scale = (dot(half, half) / half.len() as f64).sqrt() as f32;
            assert_close(half, full, 5e-5 * scale);
        }
    }
}

/// An operand that is quantized twice collects both gradients, on any number of threads.
#[test]
fn gradients_add_up_and_do_not_depend_on_threads() {
    let (rows, cols) = (70, 512);
    let (x, dy) = (normals(50, rows * cols), normals(51, rows * cols));
    let twice = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let of = quest(2, 128, "half");
            let mut tape = Tape::default();
            let v = tape.leaf(Tensor::new([rows, cols], x.clone()), true);
            let (a, b) = (of.record(&mut tape, v, &[]), of.record(&mut tape, v, &[]));
            let sum = tape.add(a, b);
            tape.backward_from(sum, &dy);
            (tape.data(sum).to_vec(), tape.grad(v).unwrap().to_vec())
        })
    };
    let found = twice(1);
    assert_eq!(found, twice(3));
    let (y, dx) = run(&*quest(2, 128, "half"), &x, cols, &dy);
    for (found, one) in [(&found.0, y), (&found.1, dx)] {
        let two: Vec<f32> = one.iter().map(|v| 2.0 * v).collect();
        assert_close(found, &two, 1e-5);
    }
}

/// Rows of zeros stay next to zero and keep their gradient.
#[test]
fn rows_of_zeros() {
    for settings in [
        r#"{"type": "quest", "bits": 4, "hadamard": 8, "form": "full"}"#,
        r#"{"type": "ternary", "hadamard": 8, "form": "full"}"#,
        r#"{"type": "fp4", "hadamard": 0}"#,
        r#"{"type": "sparse_pairs", "hadamard": 0}"#,
        r#"{"type": "absmax", "bits": 4}"#,
        r#"{"type": "gaussian", "bits": 4}"#,
    ] {
        let (y, dx) = run(&*estimator(settings), &[0.0; 16], 16, &[1.0; 16]);
        assert_close(&y, &[0.0; 16], 1e-7);
        assert_close(&dx, &[1.0; 16], 1e-6);
    }
}

#[test]
#[should_panic(expected = "K = 100")]
fn rows_that_are_not_whole_blocks_are_refused() {
    values(&*quest(4, 128, "half"), &[0.0; 200], 100);
}

#[test]
fn codes_name_what_does_not_fit() {
    assert!(
        half_integer_codes(&GOLDEN, 0, 0).is_err() && half_integer_codes(&GOLDEN, 9, 0).is_err()
    );
    assert!(half_integer_codes(&GOLDEN, 4, 16).unwrap_err().to_string().contains("K = 8"));
    assert_eq!(half_integer_codes(&GOLDEN, 4, 6).unwrap_err(), EstimatorError::Block { block: 6 });
}
