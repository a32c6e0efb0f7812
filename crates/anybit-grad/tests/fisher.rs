//! Sensitivities block by block equal those from one tape over the whole model, whether hidden
//! states are held in memory or in a file.

mod common;

use std::collections::BTreeMap;

use anybit_core::Matrix;
use anybit_grad::{
    BlockSensitivity, GRADIENT_SCALE, GradError, HeadSensitivity, Labels, Receiver, Result,
    SensitivityOptions, Tape, TrainDecoder, sensitivities,
};
use anybit_io::Checkpoint;
use common::{checkpoint, expected};

const GROUPS: usize = 3;

/// Sequences of different lengths from a family's tokens.
fn sequences(name: &str) -> Vec<Vec<u32>> {
    let (tokens, _) = expected(name);
    vec![tokens[..9].to_vec(), tokens[3..].to_vec(), tokens[..2].to_vec()]
}

/// Everything that was handed out.
#[derive(Default)]
struct Collected {
    layers: usize,
    head: Option<HeadSensitivity>,
    blocks: Vec<BlockSensitivity>,
    lookups: Option<Matrix>,
    steps: Vec<(u64, u64)>,
    /// Fails when this many blocks are left.
    fail_at: Option<usize>,
}

impl Receiver for Collected {
    type Error = GradError;

    fn head(&mut self, head: HeadSensitivity) -> Result<()> {
        self.head = Some(head);
        Ok(())
    }

    fn block(&mut self, layer: usize, block: BlockSensitivity) -> Result<()> {
        if self.fail_at == Some(layer) {
            return Err(GradError::NoSequences);
        }
        self.blocks.push(block);
        assert_eq!(layer + self.blocks.len(), self.layers, "last layer first");
        Ok(())
    }

    fn lookups(&mut self, fisher: Matrix) -> Result<()> {
        self.lookups = Some(fisher);
        Ok(())
    }

    fn step(&mut self, done: u64, total: u64) {
        self.steps.push((done, total));
    }
}

/// All blocks by layer.
fn run(
    checkpoint: &Checkpoint,
    sequences: &[Vec<u32>],
    options: SensitivityOptions<'_>,
) -> Result<Collected> {
    let layers = checkpoint.config.num_layers;
    let mut done = Collected { layers, ..Default::default() };
    sensitivities(checkpoint, sequences, options, &mut done)?;
    let total = ((2 * layers + 1) * sequences.len()) as u64;
    assert!(done.steps.iter().copied().eq((1..=total).map(|done| (done, total))));
    done.blocks.reverse();
    Ok(done)
}

/// The same from the whole model on one tape per sequence.
struct Reference {
    fisher: BTreeMap<String, Matrix>,
    tokens: BTreeMap<String, Matrix>,
    lookups: Matrix,
    rows: Vec<f32>,
    loss: f64,
}

fn reference(checkpoint: &Checkpoint, sequences: &[Vec<u32>]) -> Reference {
    let decoder = TrainDecoder::load(checkpoint, 32).unwrap();
    let (mut fisher, mut all_tokens) = (BTreeMap::new(), BTreeMap::new());
    let (vocab, hidden) = (checkpoint.config.vocab_size, checkpoint.config.hidden_size);
    let (mut lookups, mut head_rows) = (Matrix::zeros(vocab, hidden), vec![0f32; vocab]);
    let total: usize = sequences.iter().map(Vec::len).sum();
    let (mut sum, mut first) = (0.0, 0);
    for tokens in sequences {
        let mut tape = Tape::default();
        let vars = decoder.vars(&mut tape, &|_| true);
        let out = decoder.forward(&mut tape, &vars, tokens, tokens.len()).unwrap();
        let logits = decoder.logits(&mut tape, &vars, out.hidden);
        let targets = anybit_grad::next_tokens(tokens, tokens.len());
        let loss = tape.cross_entropy(logits, &targets);
        out.blocks.iter().flat_map(|b| &b.linears).for_each(|site| tape.keep_grad(site.output));
        tape.keep_grad(logits);
        sum += tape.data(loss)[0] as f64;
        let loss = tape.scale(loss, GRADIENT_SCALE);
        tape.backward(loss);
        let count = sequences.len() as f32;
        for dz in tape.grad(logits).unwrap().chunks(vocab) {
            head_rows.iter_mut().zip(dz).for_each(|(row, g)| *row += g * g / count);
        }
        if vars.head != vars.embedding {
            let grads = tape.grad(vars.embedding).unwrap();
            lookups.data.iter_mut().zip(grads).for_each(|(sum, g)| *sum += g * g / count);
        }
        for (layer, (params, block)) in vars.blocks.iter().zip(&out.blocks).enumerate() {
            for site in &block.linears {
                let key = format!("{layer}.{}", site.name);
                let weight = params.get(&format!("{}.weight", site.name)).unwrap();
                let (rows, cols) = tape.dims(weight);
                let sums: &mut Matrix =
                    fisher.entry(key.clone()).or_insert_with(|| Matrix::zeros(rows, cols));
                for (sum, g) in sums.data.iter_mut().zip(tape.grad(weight).unwrap()) {
                    *sum += g * g / count;
                }
                let weights: &mut Matrix =
                    all_tokens.entry(key).or_insert_with(|| Matrix::zeros(GROUPS, total));
                for (t, dy) in tape.grad(site.output).unwrap().chunks(rows).enumerate() {
                    for k in 0..GROUPS {
                        let group = &dy[k * rows / GROUPS..(k + 1) * rows / GROUPS];
                        weights.row_mut(k)[first + t] =
                            group.iter().map(|g| g * g).sum::<f32>() / group.len() as f32;
                    }
                }
            }
        }
        first += tokens.len();
    }
    let loss = sum / sequences.len() as f64;
    Reference { fisher, tokens: all_tokens, lookups, rows: head_rows, loss }
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
        let options = SensitivityOptions {
            guided_groups: Some(GROUPS),
            vocab_groups: Some(2),
            ..Default::default()
        };
        let Collected { head, blocks, lookups, .. } =
            run(&checkpoint, &sequences, options).unwrap();
        let want = reference(&checkpoint, &sequences);
        let head = head.unwrap();
        approx::assert_relative_eq!(head.loss, want.loss, max_relative = 1e-5);
        let embedding = head.rows.unwrap();
        assert_alike(&embedding.rows, &want.rows, &format!("{name}, rows of the head"));
        if !checkpoint.config.tie_embeddings {
            let what = format!("{name}, lookups");
            assert_alike(&lookups.unwrap().data, &want.lookups.data, &what);
        }
        // Token weights are means over the rows of a group, row weights sums over tokens.
        let half = embedding.rows.len() / 2;
        for (group, rows) in [&embedding.rows[..half], &embedding.rows[half..]].iter().enumerate() {
            let by_rows = rows.iter().sum::<f32>() * sequences.len() as f32 / rows.len() as f32;
            let by_tokens: f32 = embedding.tokens.row(group).iter().sum();
            approx::assert_relative_eq!(by_rows, by_tokens, max_relative = 1e-4);
        }
        assert_eq!(blocks.len(), checkpoint.config.num_layers);
        for (layer, block) in blocks.iter().enumerate() {
            assert_eq!(block.fisher.len(), 7);
            let tokens = block.tokens.as_ref().unwrap();
            for (linear, fisher) in &block.fisher {
                let key = format!("{layer}.{linear}");
                assert_alike(&fisher.data, &want.fisher[&key].data, &format!("{name} {key}"));
                let what = format!("{name} {key}, token weights");
                assert_alike(&tokens[linear].data, &want.tokens[&key].data, &what);
            }
        }
    }
}

/// Labels drawn from the model: the same for the same seed, and in expectation the squares of
/// `dz` that the rows of the head are credited with.
#[test]
fn labels_of_the_model_are_drawn_from_its_distribution() {
    let checkpoint = checkpoint("llama");
    let sequences = sequences("llama");
    let fisher = |seed: u64| {
        let labels = Labels::Model { seed };
        let options = SensitivityOptions { labels, vocab_groups: Some(1), ..Default::default() };
        let done = run(&checkpoint, &sequences, options).unwrap();
        (done.blocks[0].fisher.clone(), done.head.unwrap().rows.unwrap().rows)
    };
    let (first, rows) = fisher(1);
    assert!(first == fisher(1).0 && first != fisher(2).0);
    // p (1 − p), summed over the vocabulary, is at most 1 per token.
    let per_token: Vec<f32> = sequences.iter().map(|s| 1.0 / (s.len() - 1) as f32).collect();
    let bound = GRADIENT_SCALE.powi(2) * per_token.iter().sum::<f32>() / sequences.len() as f32;
    let total: f32 = rows.iter().sum();
    assert!(total > 0.5 * bound && total <= bound, "{total} of {bound}");
}

#[test]
fn memory_file_and_threads_give_the_same_bits() {
    let checkpoint = checkpoint("mistral");
    let sequences = sequences("mistral");
    let folder = tempfile::tempdir().unwrap();
    let result = |threads: usize, spill| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let options = SensitivityOptions {
            guided_groups: Some(1),
            vocab_groups: Some(3),
            spill,
            labels: Labels::Model { seed: 5 },
        };
        let done = pool.install(|| run(&checkpoint, &sequences, options)).unwrap();
        let blocks: Vec<_> = done.blocks.into_iter().map(|b| (b.fisher, b.tokens)).collect();
        (blocks, done.head, done.lookups)
    };
    let memory = result(1, None);
    assert!(memory == result(1, Some(folder.path())));
    assert!(memory == result(3, None));
}

/// A run that ends in the middle goes on from its last finished block, and hands out the same.
#[test]
fn interrupted_and_resumed() {
    let checkpoint = checkpoint("mistral");
    let sequences = sequences("mistral");
    let layers = checkpoint.config.num_layers;
    assert!(layers > 1);
    let folder = tempfile::tempdir().unwrap();
    let options = SensitivityOptions { vocab_groups: Some(3), ..Default::default() };
    let want = run(&checkpoint, &sequences, options).unwrap();
    let options = SensitivityOptions { spill: Some(folder.path()), ..options };
    let mut collected = Collected { layers, fail_at: Some(0), ..Default::default() };
    assert!(sensitivities(&checkpoint, &sequences, options, &mut collected).is_err());
    assert_eq!(collected.blocks.len(), layers - 1);
    collected.fail_at = None;
    sensitivities(&checkpoint, &sequences, options, &mut collected).unwrap();
    collected.blocks.reverse();
    let fisher = |c: &Collected| -> Vec<_> { c.blocks.iter().map(|b| b.fisher.clone()).collect() };
    assert!(fisher(&collected) == fisher(&want));
    assert!(collected.head == want.head && collected.lookups == want.lookups);
    let (done, total) = *collected.steps.last().unwrap();
    assert_eq!(done, total);
}

#[test]
fn what_cannot_be_used_is_named() {
    let checkpoint = checkpoint("llama");
    let none = SensitivityOptions::default();
    let error =
        |sequences: &[Vec<u32>], options| run(&checkpoint, sequences, options).err().unwrap();
    assert!(matches!(error(&[], none), GradError::NoSequences));
    assert!(matches!(
        error(&[vec![1, 2], vec![3]], none),
        GradError::ShortSequence { sequence: 1, tokens: 1 }
    ));
    assert!(matches!(error(&[vec![1, 99]], none), GradError::Token { token: 99, .. }));
    let groups = SensitivityOptions { guided_groups: Some(17), ..Default::default() };
    let error = error(&[vec![1, 2]], groups).to_string();
    assert!(error.contains("self_attn.k_proj with 16 rows"), "{error}");
}
