//! Helpers of the unit tests: random tensors and the comparison of gradients with central finite
//! differences.

use anybit_core::rng::SplitMix64;

use crate::{Tape, Tensor, Var};

/// Half the distance between the two points of a finite difference.
const STEP: f32 = 3e-3;

/// `n` standard normals.
pub(crate) fn normals(seed: u64, n: usize) -> Vec<f32> {
    let mut rng = SplitMix64::new(seed);
    (0..n).map(|_| rng.normal() as f32).collect()
}

/// A tensor of standard normals.
pub(crate) fn random<const N: usize>(seed: u64, shape: [usize; N]) -> Tensor {
    Tensor::new(shape, normals(seed, shape.iter().product()))
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| *a as f64 * *b as f64).sum()
}

/// Checks the gradient of `Σ c·y` for a random `c` and `y = build(inputs)`: along random
/// directions it must agree with a central difference to 1% of the gradient's norm, which is the
/// size that a directional derivative typically has.
pub(crate) fn check_gradients(inputs: &[Tensor], build: impl Fn(&mut Tape, &[Var]) -> Var) {
    let record = |inputs: &[Tensor]| {
        let mut tape = Tape::default();
        let vars: Vec<Var> = inputs.iter().map(|t| tape.leaf(t.clone(), true)).collect();
        let y = build(&mut tape, &vars);
        (tape, vars, y)
    };
    let (mut tape, vars, y) = record(inputs);
    let cotangent = normals(99, tape.value(y).len());
    tape.backward_from(y, &cotangent);
    for (input, var) in vars.iter().enumerate() {
        let gradient = tape.grad(*var).expect("an input has no gradient").to_vec();
        let norm = dot(&gradient, &gradient).sqrt();
        for direction in 0..3 {
            let v = normals(1000 + 10 * input as u64 + direction, gradient.len());
            let moved = |step: f32| {
                let mut moved = inputs.to_vec();
                moved[input].data_mut().iter_mut().zip(&v).for_each(|(x, v)| *x += step * v);
                let (tape, _, y) = record(&moved);
                dot(tape.data(y), &cotangent)
            };
            let numeric = (moved(STEP) - moved(-STEP)) / (2.0 * STEP as f64);
            let analytic = dot(&gradient, &v);
            assert!(
                (numeric - analytic).abs() <= 1e-2 * norm + 1e-5,
                "input {input}: finite difference {numeric}, gradient {analytic}, norm {norm}"
            );
        }
    }
}
