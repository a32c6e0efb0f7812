//! The differentiable decoder: equal to transformers and to the runtime on every family, the same
//! bits on any number of threads, independent of how sequences are batched, and trainable.

mod common;

use anybit_grad::{
    AdamW, AdamWOptions, GradError, Tape, TrainDecoder, Update, clip_factor, global_norm,
};
use anybit_runtime::{Buffers, Decoder, Session};
use common::{FAMILIES, assert_near, checkpoint, expected, gradients};

/// Tokens of a family, repeated to `len`.
fn repeated(name: &str, len: usize) -> Vec<u32> {
    expected(name).0.into_iter().cycle().take(len).collect()
}

fn logits(decoder: &TrainDecoder, tokens: &[u32]) -> Vec<f32> {
    let mut tape = Tape::default();
    let vars = decoder.vars(&mut tape, &|_| false);
    let hidden = decoder.forward(&mut tape, &vars, tokens, tokens.len()).unwrap().hidden;
    let logits = decoder.logits(&mut tape, &vars, hidden);
    tape.data(logits).to_vec()
}

#[test]
fn logits_equal_those_of_transformers_and_of_the_runtime() {
    for name in FAMILIES {
        let checkpoint = checkpoint(name);
        let decoder = TrainDecoder::load(&checkpoint, 200).unwrap();
        let (tokens, want) = expected(name);
        assert_near(&logits(&decoder, &tokens), &want, 2e-3, name);

        // Longer than a block of queries, so that blocks and windows meet.
        let tokens = repeated(name, 200);
        let runtime = Decoder::load(&checkpoint, tokens.len()).unwrap();
        let mut session = Session::new(&runtime, tokens.len());
        let hidden = session.hidden(&tokens).unwrap().to_vec();
        let mut want = vec![0.0; tokens.len() * runtime.config.vocab_size];
        runtime.logits(&hidden, &mut Buffers::default(), &mut want);
        assert_near(&logits(&decoder, &tokens), &want, 1e-4, name);
    }
}

#[test]
fn same_bits_on_any_number_of_threads() {
    for name in ["llama_scaled3", "qwen2_window", "qwen3"] {
        let decoder = TrainDecoder::load(&checkpoint(name), 150).unwrap();
        let tokens = repeated(name, 300);
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| gradients(&decoder, &tokens, 150))
        };
        assert!(run(1) == run(3), "{name}");
    }
}

#[test]
fn a_batch_is_the_mean_of_its_sequences() {
    for name in ["llama", "mistral"] {
        let decoder = TrainDecoder::load(&checkpoint(name), 16).unwrap();
        let tokens = repeated(name, 22);
        let (loss, grads) = gradients(&decoder, &tokens, 11);
        let (loss_a, grads_a) = gradients(&decoder, &tokens[..11], 11);
        let (loss_b, grads_b) = gradients(&decoder, &tokens[11..], 11);
        assert_near(&[loss], &[0.5 * (loss_a + loss_b)], 1e-6, name);
        for (((parameter, grad), (_, a)), (_, b)) in grads.iter().zip(&grads_a).zip(&grads_b) {
            let mean: Vec<f32> = a.iter().zip(b).map(|(a, b)| 0.5 * (a + b)).collect();
            assert_near(grad, &mean, 1e-5, parameter);
        }
    }
}

#[test]
fn training_lowers_the_loss() {
    let mut decoder = TrainDecoder::load(&checkpoint("qwen3"), 16).unwrap();
    let (tokens, _) = expected("qwen3");
    let (first, _) = gradients(&decoder, &tokens, 16);
    let mut adam = AdamW::new(AdamWOptions::default());
    let mut tape = Tape::default();
    for _ in 0..20 {
        let vars = decoder.vars(&mut tape, &|_| true);
        let loss = decoder.loss(&mut tape, &vars, &tokens, 16).unwrap();
        tape.backward(loss);
        let take = |(_, var)| tape.take_grad(var).unwrap();
        let grads: Vec<Vec<f32>> = vars.named().into_iter().map(take).collect();
        tape.reset();
        let factor = clip_factor(global_norm(grads.iter().map(|g| &g[..])), 1.0);
        let mut parameters = decoder.parameters_mut();
        let updates = parameters.iter_mut().zip(&grads).map(|((name, value), grad)| {
            let decay = !name.contains("norm");
            Update { value: value.data_mut(), grad, lr: 0.01, decay }
        });
        adam.step(&mut updates.collect::<Vec<_>>(), factor);
        grads.into_iter().for_each(|g| tape.recycle(g));
    }
    let (last, _) = gradients(&decoder, &tokens, 16);
    assert!(last < 0.6 * first, "{first} to {last}");
}

#[test]
fn names_and_handles_go_together() {
    for name in ["llama", "qwen2"] {
        let checkpoint = checkpoint(name);
        let mut decoder = TrainDecoder::load(&checkpoint, 8).unwrap();
        let mut tape = Tape::default();
        let vars = decoder.vars(&mut tape, &|name| name.contains("layers.1."));
        let named = vars.named();
        for (full, var) in &named {
            assert_eq!(tape.wants(*var), full.contains("layers.1."), "{full}");
        }
        let mut handles: Vec<String> = named.into_iter().map(|(name, _)| name).collect();
        let parameters = decoder.parameters_mut();
        assert!(parameters.iter().map(|(name, _)| name).eq(&handles));
        let mut all: Vec<String> =
            checkpoint.config.tensors().into_iter().map(|(name, _)| name).collect();
        handles.sort();
        all.sort();
        assert_eq!(handles, all);
    }
}

#[test]
fn wrong_tokens_and_lengths_are_named() {
    let decoder = TrainDecoder::load(&checkpoint("llama"), 8).unwrap();
    let mut tape = Tape::default();
    let vars = decoder.vars(&mut tape, &|_| false);
    let error = decoder.loss(&mut tape, &vars, &[1, 64], 2).unwrap_err();
    assert!(matches!(error, GradError::Token { token: 64, vocab: 64 }), "{error}");
    for (tokens, seqlen) in [(9, 9), (7, 2), (4, 0)] {
        let error = decoder.loss(&mut tape, &vars, &vec![1; tokens], seqlen).unwrap_err();
        assert!(matches!(error, GradError::Sequences { .. }), "{error}");
    }
}
