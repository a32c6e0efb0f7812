//! Values and gradients equal PyTorch's: every operation, the optimizer and its schedule, and the
//! gradients of whole models. `tests/fixtures/make_grad_golden.py` writes the file.

mod common;

use std::sync::Arc;

use anybit_grad::{
    AdamW, AdamWOptions, AttentionSpec, IGNORE, OneCycle, Rope, Tape, Tensor, TrainDecoder, Update,
    Var,
};
use common::{assert_near, checkpoint, expected, floats, gradients};
use serde_json::Value;

fn golden() -> Value {
    serde_json::from_str(include_str!("data/ops.json")).unwrap()
}

fn tensor(value: &Value) -> Tensor {
    Tensor::new(numbers(&value["shape"]), floats(&value["data"]))
}

fn numbers(value: &Value) -> Vec<usize> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as usize).collect()
}

fn number(case: &Value, key: &str) -> usize {
    case[key].as_u64().unwrap() as usize
}

/// Token ids, null for one that does not count.
fn targets(case: &Value) -> Vec<u32> {
    let all = case["targets"].as_array().unwrap();
    all.iter().map(|t| t.as_u64().map_or(IGNORE, |t| t as u32)).collect()
}

/// Records `name` on its inputs, in the order of `inputs`, and compares value and gradients.
fn check(name: &str, inputs: &[&str], build: impl FnOnce(&mut Tape, &[Var], &Value) -> Var) {
    let golden = golden();
    let case = &golden["ops"][name];
    let mut tape = Tape::default();
    let vars: Vec<Var> =
        inputs.iter().map(|key| tape.leaf(tensor(&case["inputs"][key]), true)).collect();
    let y = build(&mut tape, &vars, case);
    assert_near(tape.data(y), &floats(&case["output"]["data"]), 3e-6, name);
    tape.backward_from(y, &floats(&case["cotangent"]["data"]));
    for (key, var) in inputs.iter().zip(&vars) {
        let want = floats(&case["gradients"][key]["data"]);
        assert_near(tape.grad(*var).unwrap(), &want, 5e-6, &format!("{name}, gradient of {key}"));
    }
}

#[test]
fn products() {
    check("linear", &["x", "weight", "bias"], |t, v, _| t.linear(v[0], v[1], Some(v[2])));
    check("matmul", &["a", "b"], |t, v, _| t.matmul(v[0], v[1]));
}

#[test]
fn embedding() {
    check("embedding", &["weight"], |t, v, case| {
        let tokens: Vec<u32> = numbers(&case["tokens"]).into_iter().map(|t| t as u32).collect();
        t.embedding(v[0], &tokens)
    });
}

#[test]
fn rms_norm() {
    for name in ["rms_norm", "rms_norm_heads"] {
        check(name, &["x", "weight"], |t, v, case| {
            t.rms_norm(v[0], v[1], case["eps"].as_f64().unwrap() as f32)
        });
    }
}

#[test]
fn rope() {
    check("rope", &["x"], |t, v, case| {
        let frequencies = case["frequencies"].as_array().unwrap();
        let frequencies = frequencies.iter().map(|f| f.as_f64().unwrap()).collect();
        let seqlen = number(case, "seqlen");
        t.rope(v[0], &Arc::new(Rope::new(frequencies, seqlen)), seqlen)
    });
}

#[test]
fn attention() {
    for name in ["attention", "attention_window"] {
        check(name, &["q", "k", "v"], |t, v, case| {
            let spec = AttentionSpec {
                heads: number(case, "heads"),
                kv_heads: number(case, "kv_heads"),
                head_dim: number(case, "head_dim"),
                seqlen: number(case, "seqlen"),
                window: case["window"].as_u64().map(|w| w as usize),
            };
            t.attention(v[0], v[1], v[2], spec)
        });
    }
}

#[test]
fn swiglu() {
    check("swiglu", &["gate", "up"], |t, v, _| t.swiglu(v[0], v[1]));
}

#[test]
fn losses() {
    check("cross_entropy", &["logits"], |t, v, case| t.cross_entropy(v[0], &targets(case)));
    check("linear_cross_entropy", &["x", "weight"], |t, v, case| {
        t.linear_cross_entropy(v[0], v[1], &targets(case))
    });
    check("mse", &["a", "b"], |t, v, _| t.mse(v[0], v[1]));
    check("mean", &["a"], |t, v, _| t.mean(v[0]));
}

#[test]
fn adamw() {
    let golden = golden();
    let case = &golden["adamw"];
    let options = &case["options"];
    let option = |value: &Value| value.as_f64().unwrap();
    let mut adam = AdamW::new(AdamWOptions {
        beta1: option(&options["betas"][0]),
        beta2: option(&options["betas"][1]),
        eps: option(&options["eps"]),
        weight_decay: option(&options["weight_decay"]),
    });
    let mut value = floats(&case["value"]);
    let steps = case["grads"].as_array().unwrap().iter().zip(case["values"].as_array().unwrap());
    for (grad, want) in steps {
        let grad = floats(grad);
        let lr = option(&options["lr"]);
        adam.step(&mut [Update { value: &mut value, grad: &grad, lr, decay: true }], 1.0);
        assert_near(&value, &floats(want), 2e-6, "adamw");
    }
}

#[test]
fn one_cycle() {
    for case in golden()["one_cycle"].as_array().unwrap() {
        let schedule = OneCycle::new(case["max"].as_f64().unwrap(), number(case, "steps"));
        for (step, want) in case["lr"].as_array().unwrap().iter().enumerate() {
            let want = want.as_f64().unwrap();
            approx::assert_relative_eq!(schedule.lr(step), want, max_relative = 1e-6);
        }
    }
}

#[test]
fn gradients_of_whole_models() {
    let golden = golden();
    for (family, case) in golden["families"].as_object().unwrap() {
        let decoder = TrainDecoder::load(&checkpoint(family), 32).unwrap();
        let (tokens, _) = expected(family);
        let (loss, grads) = gradients(&decoder, &tokens, tokens.len());
        approx::assert_relative_eq!(
            loss as f64,
            case["loss"].as_f64().unwrap(),
            max_relative = 1e-5
        );
        assert_eq!(grads.len(), case["gradients"].as_object().unwrap().len(), "{family}");
        for (name, grad) in &grads {
            let want = &case["gradients"][name];
            let norm = want["norm"].as_f64().unwrap();
            let got_norm = grad.iter().map(|g| (*g as f64).powi(2)).sum::<f64>().sqrt();
            let got_sum = grad.iter().map(|g| *g as f64).sum::<f64>();
            let near = |got: f64, want: f64, tolerance: f64, what: &str| {
                let bound = tolerance * norm + 1e-6;
                assert!((got - want).abs() <= bound, "{family}, {name}, {what}: {got}, not {want}");
            };
            near(got_norm, norm, 1e-4, "norm");
            // The errors of n elements add up to about √n of one's.
            let spread = (grad.len() as f64).sqrt();
            near(got_sum, want["sum"].as_f64().unwrap(), 1e-4 * spread, "sum");
            for entry in want["entries"].as_array().unwrap() {
                let index = entry[0].as_u64().unwrap() as usize;
                near(grad[index] as f64, entry[1].as_f64().unwrap(), 1e-4, "entry");
            }
        }
    }
}
