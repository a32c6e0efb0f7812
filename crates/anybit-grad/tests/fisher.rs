//! Sensitivities block by block equal those from one tape over the whole model, whether hidden
//! states are held in memory or in a file.

mod common;

use std::collections::BTreeMap;

use anybit_core::{Gram, Matrix};
use anybit_grad::{
    BlockSensitivity, GRADIENT_SCALE, GradError, Result, SensitivityOptions, Tape, TrainDecoder,
    sensitivities,
};
use anybit_io::Checkpoint;
use common::{checkpoint, expected};

const GROUPS: usize = 3;

/// Sequences of different lengths from a family's tokens.
fn sequences(name: &str) -> Vec<Vec<u32>> {
    let (tokens, _) = expected(name);
    vec![tokens[..9].to_vec(), tokens[3..].to_vec(), tokens[..2].to_vec()]
}

/// All blocks by layer, and the loss.
fn run(
    checkpoint: &Checkpoint,
    sequences: &[Vec<u32>],
    options: SensitivityOptions<'_>,
) -> Result<(Vec<BlockSensitivity>, f64)> {
    let mut blocks = Vec::new();
    let mut on_block = |layer: usize, block: BlockSensitivity| -> Result<()> {
        assert_eq!(layer + blocks.len() + 1, checkpoint.config.num_layers, "last layer first");
        blocks.push(block);
        Ok(())
    };
    let mut steps = Vec::new();
    let mut progress = |done, total| steps.push((done, total));
    let loss =
        sensitivities::<GradError>(checkpoint, sequences, options, &mut on_block, &mut progress)?;
    let total = ((2 * checkpoint.config.num_layers + 1) * sequences.len()) as u64;
    assert!(steps.iter().copied().eq((1..=total).map(|done| (done, total))));
    blocks.reverse();
    Ok((blocks, loss))
}

/// The same from the whole model on one tape per sequence.
struct Reference {
    fisher: BTreeMap<String, Matrix>,
    guided: BTreeMap<String, Vec<Gram>>,
    loss: f64,
}

fn reference(checkpoint: &Checkpoint, sequences: &[Vec<u32>]) -> Reference {
    let decoder = TrainDecoder::load(checkpoint, 32).unwrap();
    let (mut fisher, mut guided) = (BTreeMap::new(), BTreeMap::new());
    let mut sum = 0.0;
    for tokens in sequences {
        let mut tape = Tape::default();
        let vars = decoder.vars(&mut tape, &|_| true);
        let out = decoder.forward(&mut tape, &vars, tokens, tokens.len()).unwrap();
        let logits = decoder.logits(&mut tape, &vars, out.hidden);
        let targets = anybit_grad::next_tokens(tokens, tokens.len());
        let loss = tape.cross_entropy(logits, &targets);
        out.blocks.iter().flat_map(|b| &b.linears).for_each(|site| tape.keep_grad(site.output));
        sum += tape.data(loss)[0] as f64;
        let loss = tape.scale(loss, GRADIENT_SCALE);
        tape.backward(loss);
        for (layer, (params, block)) in vars.blocks.iter().zip(&out.blocks).enumerate() {
            for site in &block.linears {
                let key = format!("{layer}.{}", site.name);
                let weight = params.get(&format!("{}.weight", site.name)).unwrap();
                let (rows, cols) = tape.dims(weight);
                let sums: &mut Matrix =
                    fisher.entry(key.clone()).or_insert_with(|| Matrix::zeros(rows, cols));
                for (sum, g) in sums.data.iter_mut().zip(tape.grad(weight).unwrap()) {
                    *sum += g * g / sequences.len() as f32;
                }
                let grams: &mut Vec<Gram> =
                    guided.entry(key).or_insert_with(|| vec![Gram::new(cols); GROUPS]);
                let dy = tape.grad(site.output).unwrap();
                for (x, dy) in tape.data(site.input).chunks(cols).zip(dy.chunks(rows)) {
                    for (k, gram) in grams.iter_mut().enumerate() {
                        let group = &dy[k * rows / GROUPS..(k + 1) * rows / GROUPS];
                        let mean = group.iter().map(|g| g * g).sum::<f32>() / group.len() as f32;
                        let scaled: Vec<f32> = x.iter().map(|x| x * mean.sqrt()).collect();
                        gram.add(&scaled);
                    }
                }
            }
        }
    }
    Reference { fisher, guided, loss: sum / sequences.len() as f64 }
}

/// Fails unless the values agree to 1e-3 of the largest.
fn assert_alike(got: &[f32], want: &[f32], what: &str) {
    let largest = want.iter().fold(0f32, |m, v| m.max(v.abs()));
    assert!(largest > 0.0, "{what} is zero");
    for (a, b) in got.iter().zip(want) {
        assert!((a - b).abs() <= 1e-3 * largest, "{what}: {a}, expected {b}");
    }
}

#[test]
fn equal_to_the_whole_model_on_one_tape() {
    for name in ["llama", "llama_scaled3", "qwen2_window", "qwen3"] {
        let checkpoint = checkpoint(name);
        let sequences = sequences(name);
        let options = SensitivityOptions { guided_groups: Some(GROUPS), spill: None };
        let (blocks, loss) = run(&checkpoint, &sequences, options).unwrap();
        let want = reference(&checkpoint, &sequences);
        approx::assert_relative_eq!(loss, want.loss, max_relative = 1e-5);
        assert_eq!(blocks.len(), checkpoint.config.num_layers);
        for (layer, block) in blocks.iter().enumerate() {
            assert_eq!(block.fisher.len(), 7);
            let guided = block.guided.as_ref().unwrap();
            for (linear, fisher) in &block.fisher {
                let key = format!("{layer}.{linear}");
                assert_alike(&fisher.data, &want.fisher[&key].data, &format!("{name} {key}"));
                for (gram, want) in guided[linear].iter().zip(&want.guided[&key]) {
                    assert_eq!(gram.tokens(), want.tokens());
                    let all = |g: &Gram| -> Vec<f32> {
                        let n = g.size();
                        (0..n * n).map(|i| g.at(i / n, i % n)).collect()
                    };
                    assert_alike(&all(gram), &all(want), &format!("{name} {key}, guided"));
                }
            }
        }
    }
}

#[test]
fn memory_file_and_threads_give_the_same_bits() {
    let checkpoint = checkpoint("mistral");
    let sequences = sequences("mistral");
    let folder = tempfile::tempdir().unwrap();
    let result = |threads: usize, spill| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let options = SensitivityOptions { guided_groups: Some(1), spill };
        let (blocks, loss) = pool.install(|| run(&checkpoint, &sequences, options)).unwrap();
        let blocks: Vec<_> = blocks.into_iter().map(|b| (b.fisher, b.guided)).collect();
        (blocks, loss)
    };
    let memory = result(1, None);
    assert!(memory == result(1, Some(folder.path())));
    assert!(memory == result(3, None));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn what_cannot_be_used_is_named() {
    let checkpoint = checkpoint("llama");
    let none = SensitivityOptions::default();
    let error = |sequences: &[Vec<u32>], options| run(&checkpoint, sequences, options).unwrap_err();
    assert!(matches!(error(&[], none), GradError::NoSequences));
    assert!(matches!(
        error(&[vec![1, 2], vec![3]], none),
        GradError::ShortSequence { sequence: 1, tokens: 1 }
    ));
    assert!(matches!(error(&[vec![1, 99]], none), GradError::Token { token: 99, .. }));
    let groups = SensitivityOptions { guided_groups: Some(17), spill: None };
    let error = error(&[vec![1, 2]], groups).to_string();
    assert!(error.contains("self_attn.k_proj with 16 rows"), "{error}");
}

#[test]
fn an_error_of_the_receiver_ends_the_run() {
    #[derive(Debug)]
    enum Mine {
        Full,
        Grad,
    }
    impl From<GradError> for Mine {
        fn from(_: GradError) -> Self {
            Self::Grad
        }
    }
    let checkpoint = checkpoint("llama");
    let sequences = sequences("llama");
    let options = SensitivityOptions::default();
    let mut calls = 0;
    let mut on_block = |_: usize, _: BlockSensitivity| -> std::result::Result<(), Mine> {
        calls += 1;
        Err(Mine::Full)
    };
    let result = sensitivities(&checkpoint, &sequences, options, &mut on_block, &mut |_, _| {});
    assert!(matches!(result, Err(Mine::Full)));
    assert_eq!(calls, 1);
}
