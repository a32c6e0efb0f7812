use super::*;
use crate::testing::{normals, random};
use anybit_core::{ActivationQuantizer, GridSpec, GroupGrid, ScaleFit, Segment};

fn spec(segments: &[(usize, u8)], symmetric: bool, weight: bool) -> FakeQuant {
    FakeQuant { segments: segments.to_vec(), symmetric, weight }
}

/// Value, `dx` and gradient of the logits of `Σ dy·y`.
fn run(
    spec: &FakeQuant,
    x: &Tensor,
    clip: Option<&Tensor>,
    dy: &[f32],
) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let mut tape = Tape::default();
    let x = tape.leaf(x.clone(), true);
    let clip = clip.map(|c| tape.leaf(c.clone(), true));
    let y = tape.fake_quant(x, clip, spec);
    tape.backward_from(y, dy);
    let dclip = clip.map_or_else(Vec::new, |c| tape.grad(c).unwrap().to_vec());
    (tape.data(y).to_vec(), tape.grad(x).unwrap().to_vec(), dclip)
}

/// One segment of one row, written out in f64.
fn reference(
    spec: &FakeQuant,
    bits: u8,
    x: &[f32],
    dy: &[f32],
    logits: Option<[f32; 2]>,
) -> (Vec<f64>, Vec<f64>, [f64; 2]) {
    let factor = |i: usize| logits.map_or(1.0, |l| 1.0 / (1.0 + (-l[i] as f64).exp()));
    let (up, down) = (factor(0), factor(1));
    let x: Vec<f64> = x.iter().map(|v| *v as f64).collect();
    let top = x.iter().copied().fold(0.0, f64::max);
    let bottom = x.iter().copied().fold(0.0, f64::min);
    let (hi, lo) = (top * up, bottom * down);
    let levels = 2f64.powi(bits as i32) - 1.0;
    let middle = 2f64.powi(bits as i32 - 1);
    // The scale, and what one unit of `hi` and of `lo` adds to it.
    let (mut scale, by_hi, by_lo) = if spec.symmetric {
        let units = if spec.weight { levels / 2.0 } else { middle - 1.0 };
        match hi >= -lo {
            true => (hi / units, 1.0 / units, 0.0),
            false => (-lo / units, 0.0, -1.0 / units),
        }
    } else {
        ((hi - lo) / levels, 1.0 / levels, -1.0 / levels)
    };
    if spec.weight {
        scale = round_scale(scale as f32).unwrap() as f64;
    }
    let (mut y, mut dx, mut ds) = (Vec::new(), Vec::new(), 0.0);
    for (x, g) in x.iter().zip(dy) {
        let g = *g as f64;
        let offset = (-lo / scale).round_ties_even().clamp(0.0, levels);
        let (code, zero, least, most) = match (spec.weight, spec.symmetric) {
            (false, true) => ((x / scale).round_ties_even(), 0.0, -middle, middle - 1.0),
            (false, false) => ((x / scale).round_ties_even() + offset, offset, 0.0, levels),
            (true, true) => ((x / scale + middle).round_ties_even(), middle, 0.0, levels),
            (true, false) => ((x / scale + offset).round_ties_even(), offset, 0.0, levels),
        };
        if code > most || code < least {
            let end = if code > most { most } else { least };
            y.push((end - zero) * scale);
            dx.push(0.0);
            ds += g * (end - zero);
        } else {
            y.push((code - zero) * scale);
            dx.push(g);
            ds += g * (code - zero - x / scale);
        }
    }
    if top > 0.0 {
        dx[x.iter().position(|v| *v == top).unwrap()] += ds * by_hi * up;
    }
    if bottom < 0.0 {
        dx[x.iter().position(|v| *v == bottom).unwrap()] += ds * by_lo * down;
    }
    let dl = [ds * by_hi * top * up * (1.0 - up), ds * by_lo * bottom * down * (1.0 - down)];
    (y, dx, dl)
}

fn close(got: &[f32], want: &[f64], what: &str) {
    assert_eq!(got.len(), want.len());
    let size = want.iter().fold(1.0, |m: f64, v| m.max(v.abs()));
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!((*got as f64 - want).abs() < 1e-4 * size, "{what} {i}: {got}, not {want}");
    }
}

#[test]
fn equals_the_reference() {
    // Two segments, the first no multiple of a vector's lanes, and one that stays as it is.
    let rows = 30;
    for (bits, high) in [(4u8, 6u8), (2, 16), (3, 5), (5, 4)] {
        let segments = [(43, bits), (16, high)];
        let cols = 59;
        let x = random(bits as u64, [rows, cols]);
        let dy = normals(7, rows * cols);
        for (symmetric, weight, clipped) in (0..8).map(|i| (i & 1 == 1, i & 2 == 2, i & 4 == 4)) {
            let spec = spec(&segments, symmetric, weight);
            let clip = clipped.then(|| match weight {
                true => random(3, [rows, 2]),
                false => Tensor::new([2], vec![1.1, 0.7]),
            });
            let (y, dx, dclip) = run(&spec, &x, clip.as_ref(), &dy);
            let (mut want_y, mut want_dx, mut want_rows) = (vec![], vec![], vec![]);
            for row in 0..rows {
                let logits = clip.as_ref().map(|c| {
                    let at = if weight { 2 * row } else { 0 };
                    [c.data()[at], c.data()[at + 1]]
                });
                let mut sums = [0.0; 2];
                for (start, len, bits) in [(0, 43, bits), (43, 16, high)] {
                    let part = row * cols + start..row * cols + start + len;
                    let (x, dy) = (&x.data()[part.clone()], &dy[part]);
                    if bits == 16 {
                        want_y.extend(x.iter().map(|v| *v as f64));
                        want_dx.extend(dy.iter().map(|v| *v as f64));
                        continue;
                    }
                    let (y, dx, dl) = reference(&spec, bits, x, dy, logits);
                    want_y.extend(y);
                    want_dx.extend(dx);
                    sums[0] += dl[0];
                    sums[1] += dl[1];
                }
                want_rows.extend(sums);
            }
            close(&y, &want_y, "y");
            close(&dx, &want_dx, "dx");
            if clipped && weight {
                close(&dclip, &want_rows, "logits");
            } else if clipped {
                let sum = |i: usize| -> f64 { want_rows.iter().skip(i).step_by(2).sum() };
                close(&dclip, &[sum(0), sum(1)], "logits");
            }
        }
    }
}

/// What is trained is what runs: the quantizers of activations and of weights, bit for bit.
#[test]
fn equals_the_quantizers() {
    let (rows, cols) = (20, 70);
    let x = random(1, [rows, cols]);
    let dy = vec![0.0; rows * cols];
    for symmetric in [true, false] {
        for bits in 2..=8u8 {
            let clip = Tensor::new([2], vec![1.5, 2.5]);
            let segments = [(54, bits), (16, 8)];
            let (y, ..) = run(&spec(&segments, symmetric, false), &x, Some(&clip), &dy);
            let mut want = x.data().to_vec();
            let segments = segments.map(|(cols, bits)| Segment { cols, bits }).to_vec();
            let clip = (sigmoid(1.5), sigmoid(2.5));
            let (half, row_scale) = (false, None);
            ActivationQuantizer { segments, symmetric, clip, half, row_scale }.fake(&mut want);
            assert_eq!(y, want, "{bits} bits");
        }
        for bits in 1..=8u8 {
            let (y, ..) = run(&spec(&[(cols, bits)], symmetric, true), &x, None, &dy);
            let grid = GridSpec::affine(bits, symmetric, None);
            for (x, y) in x.data().chunks(cols).zip(y.chunks(cols)) {
                let grid = GroupGrid::fit(grid, x, ScaleFit::MinMax).unwrap();
                let want: Vec<f32> = x.iter().map(|x| grid.decode(grid.encode(*x))).collect();
                assert_eq!(y, want, "{bits} bits");
            }
        }
    }
}

/// T1 and T2 of ResQ's specification.
#[test]
fn golden_rows() {
    let golden = |x: &[f32], symmetric: bool, scale: f32, codes: &[f32]| {
        let row = Tensor::new([x.len()], x.to_vec());
        let (y, ..) =
            run(&spec(&[(x.len(), 4)], symmetric, false), &row, None, &vec![0.0; x.len()]);
        for (y, code) in y.iter().zip(codes) {
            approx::assert_abs_diff_eq!(*y, code * scale, epsilon = 1e-6);
        }
    };
    let x = [-1.0, -0.42, 0.0, 0.33, 0.77, 2.0];
    golden(&x, false, 0.2, &[-5.0, -2.0, 0.0, 2.0, 4.0, 10.0]);
    // Without what is half-way between two codes up to the rounding of f32: −1 here, 2 below.
    golden(&x[1..], true, 2.0 / 7.0, &[-1.0, 0.0, 1.0, 3.0, 7.0]);
    golden(&[1.0, 3.0, 4.0], false, 4.0 / 15.0, &[4.0, 11.0, 15.0]);
}

#[test]
fn clamped_values_pass_nothing_on() {
    // hi = 3.5, s = ½: the first value is clamped to 7 steps, the others are inside.
    let x = Tensor::new([4], vec![7.0, 1.0, -1.0, 0.3]);
    let clip = Tensor::new([2], vec![0.0, 0.0]);
    let (y, dx, dclip) = run(&spec(&[(4, 4)], true, false), &x, Some(&clip), &[1.0; 4]);
    assert_eq!(y, [3.5, 1.0, -1.0, 0.5]);
    // ds = 7 + 0 + 0 + (1 − 0.6)
    let dhi = 7.4 / 7.0;
    close(&dx, &[dhi * 0.5, 1.0, 1.0, 1.0], "dx");
    close(&dclip, &[dhi * 7.0 * 0.25, 0.0], "logits");
    // Off the end of the range nothing is left of the gradient of a clamped value.
    let x = Tensor::new([4], vec![7.0, 6.0, -1.0, 0.3]);
    let (y, dx, _) = run(&spec(&[(4, 4)], true, false), &x, Some(&clip), &[0.0, 1.0, 0.0, 1.0]);
    assert_eq!(y[..2], [3.5, 3.5]);
    assert_eq!(dx[1..], [0.0, 0.0, 1.0]);
}

#[test]
fn one_symmetric_bit_of_a_weight() {
    // mean|x| = 1.25, s = 2.5; the second value is clamped.
    let x = Tensor::new([1, 4], vec![1.0, -3.0, 0.5, -0.5]);
    let dy = [1.0, 2.0, 3.0, 4.0];
    let (y, dx, dclip) =
        run(&spec(&[(4, 1)], true, true), &x, Some(&Tensor::new([1, 2], vec![0.0; 2])), &dy);
    assert_eq!(y, [1.25, -1.25, 1.25, -1.25]);
    // ds = 1·0.1 − 2·0.5 + 3·0.3 − 4·0.3 = −1.2; every |x| adds ½ of its change to s.
    close(&dx, &[1.0 - 0.6, 0.6, 3.0 - 0.6, 4.0 + 0.6], "dx");
    assert_eq!(dclip, [0.0, 0.0]);
}

#[test]
fn zeros_stay_zero() {
    for (symmetric, weight) in [(true, false), (false, false), (true, true), (false, true)] {
        for bits in [if weight { 1 } else { 2 }, 4, 8] {
            let x = Tensor::new([2, 20], vec![0.0; 40]);
            let dy = normals(1, 40);
            let (y, dx, _) = run(&spec(&[(20, bits)], symmetric, weight), &x, None, &dy);
            assert_eq!(y, [0.0; 40]);
            assert_eq!(dx, dy, "a row of zeros cannot be left");
        }
    }
}

#[test]
fn gradients_add_to_what_is_there() {
    let (x, dy) = (random(1, [3, 32]), normals(2, 96));
    let clip = Tensor::new([2], vec![1.0, 1.0]);
    let spec = spec(&[(32, 4)], false, false);
    let (_, once, logits) = run(&spec, &x, Some(&clip), &dy);
    let mut tape = Tape::default();
    let (x, clip) = (tape.leaf(x, true), tape.leaf(clip, true));
    let a = tape.fake_quant(x, Some(clip), &spec);
    let b = tape.fake_quant(x, Some(clip), &spec);
    let sum = tape.add(a, b);
    tape.backward_from(sum, &dy);
    let twice = |v: &[f32]| -> Vec<f64> { v.iter().map(|v| 2.0 * *v as f64).collect() };
    close(tape.grad(x).unwrap(), &twice(&once), "dx");
    close(tape.grad(clip).unwrap(), &twice(&logits), "logits");
}

#[test]
fn the_number_of_threads_changes_nothing() {
    let (x, dy) = (random(1, [700, 64]), normals(2, 700 * 64));
    let clip = Tensor::new([2], vec![1.0, 2.0]);
    let on = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| run(&spec(&[(64, 4)], true, false), &x, Some(&clip), &dy))
    };
    assert_eq!(on(1), on(3));
}
