//! Tests of the divergences of logits: finite differences, and the invariants of the specification.

use super::*;
use crate::testing::{check_gradients, random};

const TARGETS: [u32; 6] = [3, 0, IGNORE, 10, 3, 7];

fn all_losses() -> Vec<DistillLoss> {
    let temperature = 2.0;
    vec![
        DistillLoss::ForwardKl { temperature },
        DistillLoss::ReverseKl { temperature },
        DistillLoss::Jsd { beta: 0.3, temperature, form: JsdForm::Continuous },
        DistillLoss::Jsd { beta: 0.3, temperature, form: JsdForm::Paper },
        DistillLoss::Cakld { gamma: Gamma::Const(0.4) },
        DistillLoss::Cakld { gamma: Gamma::MaxProb },
        DistillLoss::Cakld { gamma: Gamma::LabelProb },
        DistillLoss::TokenScaled { scale: 2.0 },
    ]
}

fn distillation<'a>(
    loss: &'a DistillLoss,
    teacher: Teacher<'a>,
    targets: &'a [u32],
) -> Distillation<'a> {
    Distillation { loss, teacher, targets, seqlen: 3 }
}

/// Loss and gradient of logits.
fn run(logits: &Tensor, distillation: &Distillation<'_>) -> (f32, Vec<f32>) {
    let mut tape = Tape::default();
    let z = tape.leaf(logits.clone(), true);
    let loss = tape.distill(z, distillation).unwrap();
    tape.backward(loss);
    (tape.data(loss)[0], tape.grad(z).unwrap().to_vec())
}

fn forward(temperature: f64) -> DistillLoss {
    DistillLoss::ForwardKl { temperature }
}

/// Invariant 14, first part: gradients against finite differences, of every loss and teacher.
#[test]
fn invariant_14_gradients() {
    let (teacher, hidden, head) = (random(1, [6, 11]), random(2, [6, 4]), random(3, [11, 4]));
    for loss in all_losses() {
        let top = TopK::from_logits(&teacher, 4, loss.temperature());
        let teachers = [
            Teacher::Logits(&teacher),
            Teacher::Hidden { x: &hidden, head: &head },
            Teacher::TopK(&top),
        ];
        for teacher in teachers {
            let given = distillation(&loss, teacher, &TARGETS);
            check_gradients(&[random(4, [6, 11])], |t, v| t.distill(v[0], &given).unwrap());
            let inputs = [random(5, [6, 5]), random(6, [11, 5])];
            check_gradients(&inputs, |t, v| t.linear_distill(v[0], v[1], &given).unwrap());
            check_gradients(&inputs, |t, v| {
                let joint = t.linear_distill_joint(v[0], v[1], &given).unwrap();
                t.weighted_sum(&[(0.7, joint.task), (-0.4, joint.teacher)])
            });
        }
    }
}

/// Invariant 14, second part: `T (softmax(z/T) − softmax(z_t/T))` tends to `(z − z_t)/C` for
/// centred logits.
#[test]
fn invariant_14_large_temperatures() {
    let center = |seed| {
        let mut z = random(seed, [1, 10]);
        let mean = z.data().iter().sum::<f32>() / 10.0;
        z.data_mut().iter_mut().for_each(|v| *v -= mean);
        z
    };
    let (student, teacher) = (center(1), center(2));
    for (temperature, bound) in [(50.0, 0.01), (200.0, 0.003)] {
        let loss = forward(temperature);
        let (_, gradient) = run(&student, &distillation(&loss, Teacher::Logits(&teacher), &[0]));
        for (g, (s, t)) in gradient.iter().zip(student.data().iter().zip(teacher.data())) {
            assert!((g - (s - t) / 10.0).abs() < bound, "T {temperature}: {g}");
        }
    }
}

/// Invariant 9, the loss's part: a student equal to its teacher has no loss and no gradient.
#[test]
fn invariant_9_equal_logits() {
    let logits = random(3, [6, 11]);
    for loss in all_losses() {
        let given = distillation(&loss, Teacher::Logits(&logits), &TARGETS);
        let (value, gradient) = run(&logits, &given);
        assert!(value.abs() < 1e-5, "{} {value}", loss.name());
        assert!(gradient.iter().all(|g| g.abs() < 1e-6), "{}", loss.name());
    }
}

/// Invariant 12, the reduction's part: a mean over tokens with a target, not over the vocabulary,
/// with the factor T².
#[test]
fn invariant_12_reduction() {
    let (student, teacher) = (random(4, [6, 11]), random(5, [6, 11]));
    for temperature in [1.0, 4.0] {
        let loss = forward(temperature);
        let given = distillation(&loss, Teacher::Logits(&teacher), &TARGETS);
        let (mut want, mut count) = (0f64, 0.0);
        for token in (0..6).filter(|t| TARGETS[*t] != IGNORE) {
            let log = |z: &Tensor| -> Vec<f64> {
                let row: Vec<f64> =
                    z.data()[token * 11..][..11].iter().map(|v| *v as f64 / temperature).collect();
                let sum: f64 = row.iter().map(|v| v.exp()).sum();
                row.iter().map(|v| v - sum.ln()).collect()
            };
            let (lp, lq) = (log(&teacher), log(&student));
            want += lp.iter().zip(&lq).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
            count += 1.0;
        }
        let want = temperature * temperature * want / count;
        approx::assert_relative_eq!(run(&student, &given).0 as f64, want, max_relative = 1e-5);
    }
}

/// Invariant 15: CAKLD is forward KL at γ = 0 and reverse KL at γ = 1.
#[test]
fn invariant_15_ends_of_cakld() {
    let (student, teacher) = (random(6, [6, 11]), random(7, [6, 11]));
    let given = |loss: &DistillLoss| {
        run(&student, &distillation(loss, Teacher::Logits(&teacher), &TARGETS))
    };
    let cakld = |gamma| DistillLoss::Cakld { gamma: Gamma::Const(gamma) };
    assert_eq!(given(&cakld(0.0)), given(&forward(1.0)));
    assert_eq!(given(&cakld(1.0)), given(&DistillLoss::ReverseKl { temperature: 1.0 }));
    let (a, b) = (given(&cakld(0.0)).0, given(&cakld(1.0)).0);
    approx::assert_relative_eq!(given(&cakld(0.25)).0, 0.75 * a + 0.25 * b, max_relative = 1e-5);
}

/// Invariant 16: masked tokens change nothing, and a batch may be split.
#[test]
fn invariant_16_padding_and_splitting() {
    let (student, teacher) = (random(8, [6, 11]), random(9, [6, 11]));
    let cut = |z: &Tensor, rows: Range<usize>| {
        let data = z.data()[rows.start * 11..rows.end * 11].to_vec();
        Tensor::new([rows.len(), 11], data)
    };
    let targets = [3, 0, 5, IGNORE, IGNORE, IGNORE];
    for loss in all_losses() {
        let whole = run(&student, &distillation(&loss, Teacher::Logits(&teacher), &targets));
        let (s, t) = (cut(&student, 0..3), cut(&teacher, 0..3));
        let part = run(&s, &distillation(&loss, Teacher::Logits(&t), &targets[..3]));
        approx::assert_relative_eq!(whole.0, part.0, max_relative = 1e-6);
        assert!(whole.1[33..].iter().all(|g| *g == 0.0));
    }
    let loss = forward(1.0);
    let whole = run(&student, &distillation(&loss, Teacher::Logits(&teacher), &[1; 6])).0;
    let split = [0..2, 2..6].map(|rows| {
        let (s, t) = (cut(&student, rows.clone()), cut(&teacher, rows.clone()));
        let targets = vec![1; rows.len()];
        let loss = run(&s, &distillation(&loss, Teacher::Logits(&t), &targets)).0;
        loss * rows.len() as f32 / 6.0
    });
    approx::assert_relative_eq!(split[0] + split[1], whole, max_relative = 1e-5);
}

/// Invariant 16: TSLD's weights sum to 1 per sequence, are even for even hardness, and larger for
/// tokens that the teacher finds harder.
#[test]
fn invariant_16_token_scales() {
    let facts: Vec<Option<Facts>> =
        [Some(-1.0), Some(-1.0), None, Some(-9.0), Some(-2.0), Some(-5.0)]
            .map(|label| label.map(|label| Facts { label, largest: -0.5 }))
            .to_vec();
    let weights = token_scales(&facts, 3, 10.0);
    for sequence in weights.chunks(3) {
        // Two sequences are averaged.
        approx::assert_relative_eq!(2.0 * sequence.iter().sum::<f64>(), 1.0, max_relative = 1e-12);
    }
    assert_eq!((weights[0], weights[2]), (weights[1], 0.0));
    assert!(weights[3] > weights[5] && weights[5] > weights[4]);
    assert_eq!(token_scales(&[None, None], 2, 10.0), [0.0, 0.0]);
}

/// Invariant 17: the likeliest tokens with their rest are the full KL for k = V and at most that
/// below it.
#[test]
fn invariant_17_top_k() {
    let (student, teacher) = (random(10, [6, 11]), random(11, [6, 11]));
    for loss in all_losses() {
        let given = |teacher: Teacher<'_>| run(&student, &distillation(&loss, teacher, &TARGETS));
        let full = given(Teacher::Logits(&teacher));
        let mut last = 0.0;
        for k in [1, 3, 6, 10, 11] {
            let top = TopK::from_logits(&teacher, k, loss.temperature());
            let some = given(Teacher::TopK(&top));
            // A sum of kernels whose weights do not depend on k: coarser outcomes lose divergence.
            if matches!(loss, DistillLoss::ForwardKl { .. } | DistillLoss::ReverseKl { .. }) {
                assert!(some.0 >= last - 1e-6 && some.0 <= full.0 + 1e-5, "{k}");
                last = some.0;
            }
            if k == 11 {
                approx::assert_relative_eq!(some.0, full.0, max_relative = 1e-5);
                for (a, b) in some.1.iter().zip(&full.1) {
                    approx::assert_abs_diff_eq!(*a, *b, epsilon = 1e-6);
                }
            }
        }
    }
}

#[test]
fn a_fused_head_equals_a_linear_and_its_loss() {
    // More tokens than a tile of 256.
    let (x, w, teacher) = (random(12, [600, 8]), random(13, [40, 8]), random(14, [600, 40]));
    let targets: Vec<u32> =
        (0..600).map(|i| if i % 7 == 0 { IGNORE } else { i * 13 % 40 }).collect();
    let loss = forward(2.0);
    let given = distillation(&loss, Teacher::Logits(&teacher), &targets);
    let go = |fused: u8| {
        let mut tape = Tape::default();
        let (x, w) = (tape.leaf(x.clone(), true), tape.leaf(w.clone(), true));
        let (task, kd) = if fused == 0 {
            let z = tape.linear(x, w, None);
            (tape.cross_entropy(z, &targets), tape.distill(z, &given).unwrap())
        } else if fused == 1 {
            let task = tape.linear_cross_entropy(x, w, &targets);
            (task, tape.linear_distill(x, w, &given).unwrap())
        } else {
            let joint = tape.linear_distill_joint(x, w, &given).unwrap();
            (joint.task, joint.teacher)
        };
        let sum = tape.weighted_sum(&[(1.0, task), (1.0, kd)]);
        tape.backward(sum);
        let grads = [tape.grad(x).unwrap(), tape.grad(w).unwrap()].concat();
        (tape.data(task)[0], tape.data(kd)[0], grads)
    };
    let want = go(0);
    for fused in [1, 2] {
        let (task, kd, grads) = go(fused);
        approx::assert_relative_eq!(task, want.0, max_relative = 1e-5);
        approx::assert_relative_eq!(kd, want.1, max_relative = 1e-5);
        for (a, b) in grads.iter().zip(&want.2) {
            approx::assert_abs_diff_eq!(*a, *b, epsilon = 1e-6);
        }
    }
}

#[test]
fn norms_and_angle_are_those_of_the_logit_gradients() {
    let (x, w, teacher) = (random(15, [6, 5]), random(16, [11, 5]), random(17, [6, 11]));
    let loss = forward(1.0);
    let given = distillation(&loss, Teacher::Logits(&teacher), &TARGETS);
    let mut tape = Tape::default();
    let (x, w) = (tape.leaf(x, true), tape.leaf(w, true));
    let joint = tape.linear_distill_joint(x, w, &given).unwrap();
    let z = tape.linear(x, w, None);
    let logits = tape.value(z).clone();
    let kd = run(&logits, &given).1;
    let mut tape = Tape::default();
    let z = tape.leaf(logits, true);
    let loss = tape.cross_entropy(z, &TARGETS);
    tape.backward(loss);
    let task = tape.grad(z).unwrap();
    let dot = |a: &[f32], b: &[f32]| -> f64 { a.iter().zip(b).map(|(a, b)| (a * b) as f64).sum() };
    let norms = [dot(task, task).sqrt(), dot(&kd, &kd).sqrt()];
    approx::assert_relative_eq!(joint.norms[0], norms[0], max_relative = 1e-4);
    approx::assert_relative_eq!(joint.norms[1], norms[1], max_relative = 1e-4);
    approx::assert_abs_diff_eq!(
        joint.cosine,
        dot(task, &kd) / (norms[0] * norms[1]),
        epsilon = 1e-4
    );
}

#[test]
fn no_target_is_no_loss() {
    let (student, teacher) = (random(18, [3, 5]), random(19, [3, 5]));
    for loss in all_losses() {
        let given = distillation(&loss, Teacher::Logits(&teacher), &[IGNORE; 3]);
        assert_eq!(run(&student, &given), (0.0, vec![0.0; 15]));
    }
}

/// Invariant 24: losses and gradients do not depend on the number of threads.
#[test]
fn invariant_24_any_number_of_threads() {
    let (x, w, teacher) = (random(20, [300, 8]), random(21, [40, 8]), random(22, [300, 40]));
    let targets = vec![5; 300];
    let loss = DistillLoss::Cakld { gamma: Gamma::MaxProb };
    let given = distillation(&loss, Teacher::Logits(&teacher), &targets);
    let go = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut tape = Tape::default();
            let (x, w) = (tape.leaf(x.clone(), true), tape.leaf(w.clone(), true));
            let joint = tape.linear_distill_joint(x, w, &given).unwrap();
            tape.backward(joint.teacher);
            (tape.data(joint.teacher)[0], joint.norms, tape.grad(w).unwrap().to_vec())
        })
    };
    assert_eq!(go(1), go(3));
}

#[test]
fn what_does_not_fit_is_an_error() {
    let (student, teacher) = (random(23, [6, 11]), random(24, [6, 12]));
    let mut tape = Tape::default();
    let z = tape.leaf(student.clone(), true);
    let mut says = |loss: DistillLoss, teacher: &Tensor, targets: &[u32], part: &str| {
        let given = distillation(&loss, Teacher::Logits(teacher), targets);
        let error = tape.distill(z, &given).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    };
    says(forward(1.0), &teacher, &TARGETS, "12 tokens");
    says(forward(1.0), &student, &TARGETS[..5], "5 rows");
    says(forward(1.0), &student, &[99; 6], "99");
    says(forward(0.0), &student, &TARGETS, "temperature");
    says(DistillLoss::FeatureMse { normalise: false }, &student, &TARGETS, "hidden states");
    let scaled = DistillLoss::TokenScaled { scale: 1.0 };
    let given =
        Distillation { seqlen: 4, ..distillation(&scaled, Teacher::Logits(&student), &TARGETS) };
    let error = tape.distill(z, &given).unwrap_err().to_string();
    assert!(error.contains("sequences of 4"), "{error}");
}
