//! Trained column scales: the vector `α` of SKIM (Bai, Liu, Liu, PMLR 267:2520-2534, 2025, section
//! on scaled k-means), one factor per input channel. Labels `l` are fixed and `α` is trained:
//!
//! ```text
//! c_iq = Σ_{j in q} p_ij (W_ij / α_j) / S_iq      S_iq = Σ_{j in q} p_ij      Q_ij = α_j c_{i,l_ij}
//! loss = Σ_i r_i H r_iᵀ      r = W − Q      D = ∂loss/∂Q = −2 R H
//! ∂loss/∂α_j = Σ_i [ D_ij c_iq − p_ij W_ij / (α_j² S_iq) · Σ_{j' in q} D_ij' α_j' ],   q = l_ij
//! ```
//!
//! `p` is the sensitivity `G`, so that `α = 1` starts from the centroids of k-means, or all ones.
//! Adam takes the steps; the best `α` that was seen is returned. Only the product `R·H` costs more
//! than a pass over the weights, and it runs in f32; everything else is f64.

use half::f16;
use rayon::prelude::*;

use crate::error::check_len;
use crate::linalg::{View, matmul};
use crate::{CoreError, Gram, Matrix, Result};

/// Rows that one task evaluates; fixed, so that sums do not depend on the number of threads.
const ROWS: usize = 64;

/// Steps over which it is judged whether training has settled.
const PATIENCE: usize = 10;

/// What a weight counts in the mean that is its centroid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CentroidWeights {
    /// Its sensitivity.
    #[default]
    Sensitivity,
    /// One.
    Plain,
}

/// Settings of [`train`]; the defaults are the paper's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ColumnScaleOptions {
    /// Steps of Adam at most.
    pub steps: usize,
    /// It ends before when [`PATIENCE`] steps brought less than this share of what was gained so
    /// far; 0 for never. The paper says "at most" and no more: the rule is ours.
    pub settled: f64,
    /// First learning rate.
    pub rate: f64,
    /// Steps after which the rate is halved, again and again.
    pub halve_every: usize,
    /// Least value of a scale.
    pub floor: f64,
    /// Weights of centroids.
    pub weights: CentroidWeights,
}

impl Default for ColumnScaleOptions {
    fn default() -> Self {
        let weights = CentroidWeights::default();
        Self { steps: 120, settled: 0.005, rate: 0.01, halve_every: 40, floor: 0.05, weights }
    }
}

/// Scales and the codebooks that go with them.
#[derive(Debug, Clone, PartialEq)]
pub struct ColumnScale {
    /// Factor of each column; every value is one that an f16 holds.
    pub alpha: Vec<f32>,
    /// Per row `2^bits` centroids of `W/α`, by label; zero where a label is not used.
    pub centroids: Vec<Vec<f32>>,
    /// `Σ r H rᵀ` with all scales at one.
    pub loss_before: f64,
    /// The same with `alpha`; never larger.
    pub loss_after: f64,
}

/// Trains the column scales of `weights` for fixed `labels`, `[n, m]`, of `bits[i]` bits in row `i`.
///
/// # Errors
/// Shapes that differ, values that are not finite, negative sensitivities, and labels of `2^bits`
/// or more.
pub fn train(
    weights: &Matrix,
    labels: &[u8],
    bits: &[u8],
    sensitivity: &Matrix,
    gram: &Gram,
    options: ColumnScaleOptions,
) -> Result<ColumnScale> {
    let layer = Layer::new(weights, labels, bits, sensitivity, options.weights)?;
    check_len("Gram matrix of the inputs", weights.cols, gram.size())?;
    let metric = Dense(gram.to_full());
    let ones = vec![1.0; weights.cols];
    let (loss_before, alpha) = descend(&layer, &metric, options);
    // What is stored is f16, so that is what is judged.
    let alpha: Vec<f64> = alpha.into_iter().map(|a| f16::from_f64(a).to_f64()).collect();
    let loss = layer.evaluate(&alpha, &metric).0;
    let (alpha, loss_after) = if loss <= loss_before { (alpha, loss) } else { (ones, loss_before) };
    let centroids = layer.centroids(&alpha);
    let alpha = alpha.into_iter().map(|a| a as f32).collect();
    Ok(ColumnScale { alpha, centroids, loss_before, loss_after })
}

/// Loss at `α = 1`, and the best `α` of a run of Adam.
fn descend(layer: &Layer<'_>, metric: &dyn Metric, options: ColumnScaleOptions) -> (f64, Vec<f64>) {
    let mut alpha = vec![1.0; layer.weights.cols];
    let mut adam = Adam::new(alpha.len());
    let mut best = (f64::INFINITY, alpha.clone());
    let (mut before, mut judged) = (0.0, 0.0);
    for step in 0..=options.steps {
        let (loss, mut gradient) = layer.evaluate(&alpha, metric);
        if step == 0 {
            (before, judged) = (loss, loss);
        }
        if loss < best.0 {
            best = (loss, alpha.clone());
        }
        let settled = step > PATIENCE && judged - best.0 < options.settled * (before - best.0);
        if step % PATIENCE == 0 {
            judged = best.0;
            if settled {
                break;
            }
        }
        // Neither a layer without error nor a loss that has become NaN can be improved.
        let improvable = loss > 0.0 && before > 0.0;
        if step == options.steps || !improvable {
            break;
        }
        // Relative to the first loss, Adam's ε means the same for every scale of H.
        gradient.iter_mut().for_each(|g| *g /= before);
        let halvings = step / options.halve_every.max(1);
        adam.step(&mut alpha, &gradient, options.rate * 0.5f64.powi(halvings as i32));
        alpha.iter_mut().for_each(|a| *a = a.max(options.floor));
    }
    (before, best.1)
}

/// Adam (Kingma, Ba 2015) with the usual constants.
struct Adam {
    first: Vec<f64>,
    second: Vec<f64>,
    step: i32,
}

impl Adam {
    fn new(n: usize) -> Self {
        Self { first: vec![0.0; n], second: vec![0.0; n], step: 0 }
    }

    fn step(&mut self, x: &mut [f64], gradient: &[f64], rate: f64) {
        const BETAS: [f64; 2] = [0.9, 0.999];
        const EPSILON: f64 = 1e-8;
        self.step += 1;
        let bias = BETAS.map(|beta| 1.0 - beta.powi(self.step));
        let moments = self.first.iter_mut().zip(&mut self.second);
        for ((x, g), (first, second)) in x.iter_mut().zip(gradient).zip(moments) {
            *first = BETAS[0] * *first + (1.0 - BETAS[0]) * g;
            *second = BETAS[1] * *second + (1.0 - BETAS[1]) * g * g;
            *x -= rate * (*first / bias[0]) / ((*second / bias[1]).sqrt() + EPSILON);
        }
    }
}

/// Multiplication by `H`.
trait Metric: Sync {
    /// `R·H` for rows `r`.
    fn times(&self, r: &[f64]) -> Vec<f64>;
}

struct Dense(Matrix);

impl Metric for Dense {
    fn times(&self, r: &[f64]) -> Vec<f64> {
        let m = self.0.cols;
        let rows = r.len() / m.max(1);
        let r: Vec<f32> = r.iter().map(|r| *r as f32).collect();
        let mut product = vec![0f32; r.len()];
        let rhs = View::rows(&self.0.data, m, m, m);
        matmul(&mut product, m, false, 1.0, View::rows(&r, rows, m, m), rhs);
        product.into_iter().map(f64::from).collect()
    }
}

/// What stays fixed while `α` is trained.
struct Layer<'a> {
    weights: &'a Matrix,
    labels: &'a [u8],
    bits: &'a [u8],
    sensitivity: &'a Matrix,
    use_sensitivity: bool,
}

/// The codebook of a row at some `α`.
struct Book {
    centroids: Vec<f64>,
    /// `S_q`.
    mass: Vec<f64>,
    /// Whether the members of a cluster have any sensitivity; if not, its mean is a plain one.
    sensitive: Vec<bool>,
}

impl<'a> Layer<'a> {
    fn new(
        weights: &'a Matrix,
        labels: &'a [u8],
        bits: &'a [u8],
        sensitivity: &'a Matrix,
        use_weights: CentroidWeights,
    ) -> Result<Self> {
        weights.check_finite("weight")?;
        sensitivity.check_finite("sensitivity")?;
        check_len("rows of the sensitivity", weights.rows, sensitivity.rows)?;
        check_len("columns of the sensitivity", weights.cols, sensitivity.cols)?;
        check_len("labels", weights.data.len(), labels.len())?;
        check_len("widths of rows", weights.rows, bits.len())?;
        if let Some(at) = sensitivity.data.iter().position(|g| *g < 0.0) {
            let value = sensitivity.data[at].to_string();
            let (row, col) = (at / weights.cols, at % weights.cols);
            return Err(CoreError::NegativeWeight { what: "sensitivity", row, col, value });
        }
        for (row, (labels, &bits)) in labels.chunks(weights.cols.max(1)).zip(bits).enumerate() {
            if bits > 8 {
                return Err(CoreError::Bits { bits, grid: "codebook", min: 0, max: 8 });
            }
            if labels.iter().any(|l| (*l as usize) >> bits != 0) {
                return Err(CoreError::CodeRange { row });
            }
        }
        let use_sensitivity = use_weights == CentroidWeights::Sensitivity;
        Ok(Self { weights, labels, bits, sensitivity, use_sensitivity })
    }

    /// Weights, sensitivities and labels of a row.
    fn row(&self, row: usize) -> (&[f32], &[f32], &[u8]) {
        let m = self.weights.cols;
        let labels = &self.labels[row * m..(row + 1) * m];
        (self.weights.row(row), self.sensitivity.row(row), labels)
    }

    fn book(&self, row: usize, alpha: &[f64]) -> Book {
        let (w, g, labels) = self.row(row);
        let k = 1usize << self.bits[row];
        let mut mass = vec![0f64; k];
        if self.use_sensitivity {
            for (g, l) in g.iter().zip(labels) {
                mass[*l as usize] += *g as f64;
            }
        }
        let sensitive: Vec<bool> = mass.iter().map(|s| *s > 0.0).collect();
        mass.fill(0.0);
        let mut centroids = vec![0f64; k];
        for (((w, g), l), alpha) in w.iter().zip(g).zip(labels).zip(alpha) {
            let q = *l as usize;
            let p = if sensitive[q] { *g as f64 } else { 1.0 };
            mass[q] += p;
            centroids[q] += p * *w as f64 / alpha;
        }
        for (c, mass) in centroids.iter_mut().zip(&mass) {
            *c = if *mass > 0.0 { *c / mass } else { 0.0 };
        }
        Book { centroids, mass, sensitive }
    }

    /// Loss and gradient.
    fn evaluate(&self, alpha: &[f64], metric: &dyn Metric) -> (f64, Vec<f64>) {
        let chunks = self.weights.rows.div_ceil(ROWS);
        let parts: Vec<(f64, Vec<f64>)> = (0..chunks)
            .into_par_iter()
            .map(|chunk| self.evaluate_rows(chunk * ROWS, alpha, metric))
            .collect();
        let mut total = (0.0, vec![0f64; alpha.len()]);
        for (loss, gradient) in parts {
            total.0 += loss;
            total.1.iter_mut().zip(gradient).for_each(|(total, g)| *total += g);
        }
        total
    }

    /// The part that a chunk of rows adds to loss and gradient.
    fn evaluate_rows(&self, first: usize, alpha: &[f64], metric: &dyn Metric) -> (f64, Vec<f64>) {
        let m = self.weights.cols;
        let rows = first..(first + ROWS).min(self.weights.rows);
        let books: Vec<Book> = rows.clone().map(|row| self.book(row, alpha)).collect();
        let mut residual = Vec::with_capacity(rows.len() * m);
        for (row, book) in rows.clone().zip(&books) {
            let (w, _, labels) = self.row(row);
            residual.extend(
                w.iter()
                    .zip(labels)
                    .zip(alpha)
                    .map(|((w, l), alpha)| *w as f64 - alpha * book.centroids[*l as usize]),
            );
        }
        let product = metric.times(&residual);
        let loss = residual.iter().zip(&product).map(|(r, p)| r * p).sum();
        let mut gradient = vec![0f64; m];
        for ((row, book), product) in rows.zip(&books).zip(product.chunks_exact(m.max(1))) {
            self.add_gradient(row, book, product, alpha, &mut gradient);
        }
        (loss, gradient)
    }

    /// Adds a row's part of the gradient; `product` is its row of `R·H`.
    fn add_gradient(
        &self,
        row: usize,
        book: &Book,
        product: &[f64],
        alpha: &[f64],
        gradient: &mut [f64],
    ) {
        let (w, g, labels) = self.row(row);
        let mut pull = vec![0f64; book.mass.len()];
        for ((l, product), alpha) in labels.iter().zip(product).zip(alpha) {
            pull[*l as usize] -= 2.0 * product * alpha;
        }
        for (pull, mass) in pull.iter_mut().zip(&book.mass) {
            *pull = if *mass > 0.0 { *pull / mass } else { 0.0 };
        }
        let weights = w.iter().zip(g).zip(labels);
        let columns = product.iter().zip(alpha).zip(gradient);
        for (((w, g), l), ((product, alpha), out)) in weights.zip(columns) {
            let q = *l as usize;
            let p = if book.sensitive[q] { *g as f64 } else { 1.0 };
            let through_centroid = p * *w as f64 / (alpha * alpha) * pull[q];
            *out += -2.0 * product * book.centroids[q] - through_centroid;
        }
    }

    fn centroids(&self, alpha: &[f64]) -> Vec<Vec<f32>> {
        (0..self.weights.rows)
            .into_par_iter()
            .map(|row| -> Vec<f32> {
                self.book(row, alpha).centroids.into_iter().map(|c| c as f32).collect()
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::SplitMix64;
    use approx::{assert_abs_diff_eq, assert_relative_eq};

    /// `H` in f64, to see the gradient's own digits.
    struct Exact([[f64; 4]; 4]);

    impl Metric for Exact {
        fn times(&self, r: &[f64]) -> Vec<f64> {
            let column = |r: &[f64], j: usize| -> f64 { (0..4).map(|i| r[i] * self.0[i][j]).sum() };
            r.chunks(4).flat_map(|r| [0, 1, 2, 3].map(|j| column(r, j))).collect()
        }
    }

    const H: Exact = Exact([
        [2.0, 0.5, 0.0, 0.0],
        [0.5, 1.0, 0.25, 0.0],
        [0.0, 0.25, 3.0, 1.0],
        [0.0, 0.0, 1.0, 4.0],
    ]);
    const LABELS: [u8; 8] = [0, 0, 1, 1, 0, 1, 1, 0];

    fn golden_weights() -> (Matrix, Matrix) {
        let w = vec![1.0, 2.0, 3.0, 5.0, -1.0, 0.5, 2.0, 4.0];
        let p = vec![1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 3.0, 4.0];
        (Matrix::from_vec(2, 4, w).unwrap(), Matrix::from_vec(2, 4, p).unwrap())
    }

    fn golden_gram() -> Gram {
        let mut gram = Gram::new(4);
        for i in 0..4 {
            for j in i..4 {
                gram.set(i, j, H.0[i][j] as f32);
            }
        }
        gram
    }

    #[test]
    fn t7_loss_and_gradient() {
        let (w, p) = golden_weights();
        let (ones, other) = ([1.0; 4], [1.0, 2.0, 0.5, 1.5]);
        let golden = [
            (CentroidWeights::Plain, ones, 50.34375, [12.25, 4.40625, 12.46875, -29.125]),
            (CentroidWeights::Sensitivity, ones, 47.67, [53.74, 6.13, 10.745, -70.615]),
            (
                CentroidWeights::Plain,
                other,
                78.6115451389,
                [-2.7951388889, 17.8515625, -204.0729166667, 46.0856481481],
            ),
            (
                CentroidWeights::Sensitivity,
                other,
                71.8155555556,
                [31.8744444444, 27.6845833333, -243.405, 22.9725925926],
            ),
        ];
        for (kind, alpha, loss, gradient) in golden {
            let layer = Layer::new(&w, &LABELS, &[1, 1], &p, kind).unwrap();
            let (got_loss, got) = layer.evaluate(&alpha, &H);
            assert_relative_eq!(got_loss, loss, max_relative = 1e-9);
            for (got, want) in got.iter().zip(gradient) {
                assert_abs_diff_eq!(*got, want, epsilon = 1e-9);
            }
            // A common factor of all scales changes nothing.
            let along: f64 = alpha.iter().zip(&got).map(|(a, g)| a * g).sum();
            assert_abs_diff_eq!(along, 0.0, epsilon = 1e-9);
            let tripled = alpha.map(|a| 3.0 * a);
            assert_relative_eq!(layer.evaluate(&tripled, &H).0, got_loss, max_relative = 1e-12);
            // The f32 product agrees.
            let dense = Dense(golden_gram().to_full());
            assert_relative_eq!(layer.evaluate(&alpha, &dense).0, loss, max_relative = 1e-5);
        }
        let layer = Layer::new(&w, &LABELS, &[1, 1], &p, CentroidWeights::Sensitivity).unwrap();
        assert_eq!(layer.centroids(&ones), [[1.5, 4.0], [3.0, 1.4]]);
        let one_step = ColumnScaleOptions { steps: 1, ..Default::default() };
        let (before, alpha) = descend(&layer, &H, one_step);
        assert_relative_eq!(before, 47.67, max_relative = 1e-9);
        for (got, want) in alpha.iter().zip([0.99, 0.99, 0.99, 1.01]) {
            assert_abs_diff_eq!(*got, want, epsilon = 1e-8);
        }
    }

    /// A layer that is long enough for several chunks.
    fn case() -> (Matrix, Vec<u8>, Vec<u8>, Matrix, Gram) {
        let mut rng = SplitMix64::new(17);
        let (n, m) = (150, 40);
        let w = (0..n * m).map(|_| rng.normal() as f32).collect();
        let g = (0..n * m).map(|_| rng.normal().exp() as f32).collect();
        let mut gram = Gram::new(m);
        let mut x: Vec<f32> = (0..100 * m).map(|_| rng.normal() as f32).collect();
        for token in x.chunks_mut(m) {
            // Channels that stand out, as they do in real layers, are what scales are for.
            token[7] *= 10.0;
            token[20] *= 6.0;
        }
        gram.add(&x);
        let bits: Vec<u8> = (0..n).map(|i| 2 + (i % 3) as u8).collect();
        let (w, g) = (Matrix::from_vec(n, m, w).unwrap(), Matrix::from_vec(n, m, g).unwrap());
        let mut labels = Vec::new();
        for (i, bits) in bits.iter().enumerate() {
            let problem = crate::kmeans::Exact1d::new(w.row(i), g.row(i), 16).unwrap();
            labels.extend(problem.solution(1usize << bits).labels);
        }
        (w, labels, bits, g, gram)
    }

    #[test]
    fn training_lowers_the_loss_on_any_number_of_threads() {
        let (w, labels, bits, g, gram) = case();
        let run = |threads, options| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| train(&w, &labels, &bits, &g, &gram, options).unwrap())
        };
        let result = run(1, ColumnScaleOptions::default());
        assert_eq!(result, run(3, ColumnScaleOptions::default()));
        assert!(result.loss_after < 0.95 * result.loss_before);
        assert!(result.alpha.iter().all(|a| f16::from_f32(*a).to_f32() == *a && *a > 0.05));
        // The result decodes to the loss that it claims.
        let mut loss = 0.0;
        for i in 0..w.rows {
            let residual: Vec<f32> = (0..w.cols)
                .map(|j| {
                    let c = result.centroids[i][labels[i * w.cols + j] as usize];
                    w.row(i)[j] - result.alpha[j] * c
                })
                .collect();
            loss += gram.quad(&residual);
        }
        assert_relative_eq!(loss, result.loss_after, max_relative = 1e-4);
        let none = run(1, ColumnScaleOptions { steps: 0, ..Default::default() });
        assert_eq!(none.alpha, [1.0; 40]);
        assert_eq!(none.loss_after, none.loss_before);
    }

    #[test]
    fn exact_layers_stay_and_bad_input_is_an_error() {
        let w = Matrix::from_vec(1, 4, vec![1.0, 2.0, 1.0, 2.0]).unwrap();
        let g = Matrix::from_vec(1, 4, vec![0.0; 4]).unwrap();
        let (gram, options) = (golden_gram(), ColumnScaleOptions::default());
        let labels = [0, 1, 0, 1];
        let done = train(&w, &labels, &[1], &g, &gram, options).unwrap();
        assert_eq!((done.loss_after, done.alpha), (0.0, vec![1.0; 4]));
        assert_eq!(done.centroids, [[1.0, 2.0]]);

        let fails = |labels: &[u8], bits: &[u8], g: &Matrix| {
            train(&w, labels, bits, g, &gram, options).err()
        };
        assert_eq!(fails(&labels, &[0], &g), Some(CoreError::CodeRange { row: 0 }));
        assert!(matches!(fails(&labels, &[9], &g), Some(CoreError::Bits { .. })));
        assert!(matches!(fails(&labels[1..], &[1], &g), Some(CoreError::Shape { .. })));
        let negative = Matrix::from_vec(1, 4, vec![0.0, 1.0, -1.0, 0.0]).unwrap();
        assert!(matches!(
            fails(&labels, &[1], &negative),
            Some(CoreError::NegativeWeight { row: 0, col: 2, .. })
        ));
        assert!(train(&w, &labels, &[1], &g, &Gram::new(3), options).is_err());
    }
}
