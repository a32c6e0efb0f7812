//! Golden values of the SKIM specification on one synthetic layer (T8), computed by independent
//! f64 code, and of the Fisher form of sensitivities (T11).
//!
//! The yardstick is the relative output error `tr(R H Rᵀ) / tr(W H Wᵀ)`. What is isolated is the
//! method: every column of the table quantizes the same weights under the same statistics, in
//! sample, so that the order of methods is the point and the numbers guard against drift. The
//! traps met: `G` is the per-token form here, GPTQ's grid has f16 scales where the reference has
//! f64 (1.5 % at 3 bits), and codebook feedback means activation order.

use anybit_core::allocate::{AllocationStart, greedy, target};
use anybit_core::column_scale::{CentroidWeights, ColumnScaleOptions, train};
use anybit_core::kmeans::Exact1d;
use anybit_core::lnq::{Lnq, LnqInit, LnqOptions, RowGrid, Table, feedback, lnq};
use anybit_core::rng::SplitMix64;
use anybit_core::rounding::{GptqFactor, GptqOptions, gptq, nearest};
use anybit_core::{Gram, GridSpec, Matrix, QuantizedMatrix, ScaleFit};

const N: usize = 48;
const M: usize = 96;
const TOKENS: usize = 384;

struct Layer {
    w: Matrix,
    /// Sensitivities, per-token form.
    g: Matrix,
    /// `X Xᵀ / tokens`, f64 for measuring and f32 for quantizing.
    h: Vec<f64>,
    gram: Gram,
    /// Mixing matrix of the inputs, to draw further tokens.
    mixing: Vec<f64>,
    /// Inputs, `[M, TOKENS]`, and output gradients, `[N, TOKENS]`.
    x: Vec<f64>,
    gy: Vec<f64>,
}

fn normals(rng: &mut SplitMix64, count: usize, scale: f64) -> Vec<f64> {
    (0..count).map(|_| scale * rng.normal()).collect()
}

/// `A Z + N` with three channels that stand out.
fn inputs(rng: &mut SplitMix64, mixing: &[f64]) -> Vec<f64> {
    let z = normals(rng, 12 * TOKENS, 1.0);
    let mut x = normals(rng, M * TOKENS, 0.7);
    for (channel, x) in x.chunks_mut(TOKENS).enumerate() {
        let outlier = match channel {
            5 => 8.0,
            40 => 5.0,
            77 => 3.0,
            _ => 1.0,
        };
        for (t, x) in x.iter_mut().enumerate() {
            *x += (0..12).map(|k| mixing[channel * 12 + k] * z[k * TOKENS + t]).sum::<f64>();
            *x *= outlier;
        }
    }
    x
}

fn second_moments(x: &[f64]) -> Vec<f64> {
    let mut h = vec![0.0; M * M];
    for (at, h) in h.iter_mut().enumerate() {
        let row = |i: usize| &x[i * TOKENS..(i + 1) * TOKENS];
        let dot: f64 = row(at / M).iter().zip(row(at % M)).map(|(a, b)| a * b).sum();
        *h = dot / TOKENS as f64;
    }
    h
}

fn to_matrix(rows: usize, cols: usize, data: &[f64]) -> Matrix {
    Matrix::from_vec(rows, cols, data.iter().map(|v| *v as f32).collect()).unwrap()
}

fn assert_close(got: f64, want: f64, relative: f64) {
    assert!((got - want).abs() <= relative * want.abs(), "{got} for {want}");
}

fn layer() -> Layer {
    let mut rng = SplitMix64::new(2024);
    let mixing = normals(&mut rng, M * 12, 0.6);
    let x = inputs(&mut rng, &mixing);
    let mut w = normals(&mut rng, N * M, 0.05);
    for (row, scale) in w.chunks_mut(M).zip(normals(&mut rng, N, 0.7)) {
        row.iter_mut().for_each(|w| *w *= scale.exp());
    }
    for (i, j) in [(3, 7), (10, 50), (22, 90), (31, 5)] {
        w[i * M + j] *= 9.0;
    }
    let scales = normals(&mut rng, N, 0.8);
    let mut gy = normals(&mut rng, N * TOKENS, 1.0);
    for (row, scale) in gy.chunks_mut(TOKENS).zip(scales) {
        row.iter_mut().for_each(|g| *g *= scale.exp());
    }
    let h = second_moments(&x);
    let mut g = vec![0.0; N * M];
    for (at, g) in g.iter_mut().enumerate() {
        let (i, j) = (at / M, at % M);
        let pairs = gy[i * TOKENS..].iter().zip(&x[j * TOKENS..]).take(TOKENS);
        *g = pairs.map(|(g, x)| g * g * x * x).sum::<f64>() / TOKENS as f64;
    }
    assert_close(w.iter().sum(), 4.873994512833, 1e-11);
    assert_close((0..M).map(|i| h[i * M + i]).sum(), 1248.302440235, 1e-11);
    assert_close(g.iter().sum(), 147365.538348, 1e-11);
    let mut gram = Gram::new(M);
    for (at, h) in h.iter().enumerate() {
        gram.set(at / M, at % M, *h as f32);
    }
    let (w, g) = (to_matrix(N, M, &w), to_matrix(N, M, &g));
    Layer { w, g, h, gram, mixing, x, gy }
}

fn quad(h: &[f64], r: &[f64]) -> f64 {
    let product = h.chunks(M).map(|h| h.iter().zip(r).map(|(h, r)| h * r).sum::<f64>());
    product.zip(r).map(|(p, r)| p * r).sum()
}

fn residual(w: &[f32], q: &[f32]) -> Vec<f64> {
    w.iter().zip(q).map(|(w, q)| *w as f64 - *q as f64).collect()
}

impl Layer {
    /// Relative output error of `q` under `h`.
    fn error_under(&self, h: &[f64], q: &Matrix) -> f64 {
        let zeros = [0f32; M];
        let (mut error, mut all) = (0.0, 0.0);
        for i in 0..N {
            error += quad(h, &residual(self.w.row(i), q.row(i)));
            all += quad(h, &residual(self.w.row(i), &zeros));
        }
        error / all
    }

    fn error(&self, q: &Matrix) -> f64 {
        self.error_under(&self.h, q)
    }

    fn rtn(&self, bits: u8) -> Matrix {
        let spec = GridSpec::affine(bits, false, None);
        QuantizedMatrix::single(nearest(&self.w, spec, ScaleFit::MinMax).unwrap()).dequantize()
    }

    fn gptq(&self, bits: u8, act_order: bool) -> Matrix {
        let spec = GridSpec::affine(bits, false, None);
        let options = GptqOptions { damp: 0.01, act_order, fit: ScaleFit::MinMax };
        let plane = gptq(&self.w, &self.gram, spec, options).unwrap().plane;
        QuantizedMatrix::single(plane).dequantize()
    }

    /// Every row's optimal clusterings under weights `G`-like.
    fn cluster(&self, weights: &Matrix) -> Vec<Exact1d> {
        (0..N).map(|i| Exact1d::new(self.w.row(i), weights.row(i), 16).unwrap()).collect()
    }

    /// Scales for the codes, as decoded weights.
    fn scaled(&self, codes: &Codes, bits: &[u8], weights: CentroidWeights) -> (Matrix, [f64; 2]) {
        let options = ColumnScaleOptions { weights, settled: 0.0, ..Default::default() };
        let done = train(&self.w, &codes.labels, bits, &self.g, &self.gram, options).unwrap();
        assert!(done.loss_after <= done.loss_before);
        let scaled = Codes { labels: codes.labels.clone(), codebooks: done.centroids };
        let mut q = scaled.decode();
        for row in q.data.chunks_mut(M) {
            row.iter_mut().zip(&done.alpha).for_each(|(q, alpha)| *q *= alpha);
        }
        (q, [done.loss_before, done.loss_after])
    }

    fn feedback(&self, codes: &Codes) -> Codes {
        let grid = |values: &Vec<f32>| RowGrid::own(Table::sorted(values).0);
        let grids: Vec<RowGrid> = codes.codebooks.iter().map(grid).collect();
        let factor = GptqFactor::new(&self.gram, GptqOptions::default()).unwrap();
        let labels = feedback(&self.w, &grids, &factor).0;
        Codes { labels, codebooks: codes.codebooks.clone() }
    }

    fn lnq(&self, codes: &Codes, init: LnqInit) -> Matrix {
        // The golden values are of unrounded codebooks.
        let options = LnqOptions { init, half: false, ..Default::default() };
        let done = lnq(&self.w, &codes.labels, &codes.codebooks, &self.gram, options).unwrap();
        let Lnq { codebooks, labels, trace, .. } = done;
        assert!(trace.windows(2).all(|t| t[1] <= t[0]), "{trace:?}");
        Codes { labels, codebooks }.decode()
    }

    /// Output error of every row at 2, 3 and 4 bits: the table that widths are allocated by.
    fn error_table(&self, problems: &[Exact1d], error: impl Fn(usize, &[f64]) -> f64) -> Vec<f64> {
        let mut table = Vec::with_capacity(3 * N);
        for i in 0..N {
            for bits in 2..=4u8 {
                let codes = Codes::of(&problems[i..=i], &[bits]);
                table.push(error(i, &residual(self.w.row(i), codes.decode().row(0))));
            }
        }
        table
    }
}

/// Codebooks and labels of all rows.
struct Codes {
    labels: Vec<u8>,
    codebooks: Vec<Vec<f32>>,
}

impl Codes {
    fn of(problems: &[Exact1d], bits: &[u8]) -> Self {
        let (mut labels, mut codebooks) = (Vec::new(), Vec::new());
        for (problem, bits) in problems.iter().zip(bits) {
            let solution = problem.solution(1usize << bits);
            labels.extend(solution.labels);
            codebooks.push(solution.centroids);
        }
        Self { labels, codebooks }
    }

    fn decode(&self) -> Matrix {
        let rows = self.labels.chunks(M).zip(&self.codebooks);
        let data: Vec<f32> =
            rows.flat_map(|(labels, book)| labels.iter().map(move |l| book[*l as usize])).collect();
        Matrix::from_vec(self.codebooks.len(), M, data).unwrap()
    }
}

/// Agrees with a number of the table: its printed digits, and `relative` for methods whose path
/// depends on the last bits.
fn assert_table(name: &str, got: f64, want: f64, relative: f64) {
    let allowed = 0.55e-5 + relative * want;
    assert!((got - want).abs() <= allowed, "{name}: {got:.7} for {want}");
}

#[test]
fn t8_every_column_of_the_table() {
    let layer = layer();
    let diagonal = layer.gram.diagonal();
    let unweighted = layer.cluster(&Matrix::from_vec(N, M, vec![1.0; N * M]).unwrap());
    let layerwise = layer.cluster(&Matrix::from_vec(N, M, diagonal.repeat(N)).unwrap());
    let sensitive = layer.cluster(&layer.g);
    // RTN, GPTQ, GPTQ in activation order, k-means without weights, L-diag, S-diag, scales with
    // plain and with weighted centroids, codebook with feedback, LNQ.
    let table = [
        (
            2,
            [
                0.1000, 0.01481, 0.01090, 0.05242, 0.01937, 0.01978, 0.01667, 0.01405, 0.00397,
                0.00392,
            ],
        ),
        (
            3,
            [
                0.01822, 0.00249, 0.00195, 0.00665, 0.00319, 0.00333, 0.00299, 0.00240, 0.00075,
                0.00074,
            ],
        ),
        (
            4,
            [
                0.00469, 0.00061, 0.00047, 0.00106, 0.00066, 0.00070, 0.00052, 0.00047, 0.00016,
                0.00013,
            ],
        ),
    ];
    for (bits, want) in table {
        let widths = [bits; N];
        let [rtn, plain_gptq, ordered_gptq, unw, l_diag, s_diag, plain, weighted, feedback, lnq] =
            want;
        let check = |name: &str, q: &Matrix, want: f64, relative: f64| {
            let got = layer.error(q);
            assert_table(&format!("{name} at {bits} bits"), got, want, relative);
            got
        };
        let codes = Codes::of(&sensitive, &widths);
        let got = [
            check("RTN", &layer.rtn(bits), rtn, 0.03),
            check("unweighted", &Codes::of(&unweighted, &widths).decode(), unw, 0.0),
            check("S-diag", &codes.decode(), s_diag, 0.0),
            check(
                "plain scales",
                &layer.scaled(&codes, &widths, CentroidWeights::Plain).0,
                plain,
                0.03,
            ),
            check(
                "weighted scales",
                &layer.scaled(&codes, &widths, CentroidWeights::Sensitivity).0,
                weighted,
                0.03,
            ),
            check("feedback", &layer.feedback(&codes).decode(), feedback, 0.03),
            check("LNQ", &layer.lnq(&codes, LnqInit::Labels), lnq, 0.03),
            layer.error(&layer.lnq(&codes, LnqOptions::default().init)),
        ];
        assert!(got.windows(2).all(|pair| pair[1] < pair[0]), "order at {bits} bits: {got:?}");
        check("L-diag", &Codes::of(&layerwise, &widths).decode(), l_diag, 0.0);
        let plain_gptq = check("GPTQ", &layer.gptq(bits, false), plain_gptq, 0.03);
        let ordered_gptq = check("ordered GPTQ", &layer.gptq(bits, true), ordered_gptq, 0.03);
        assert!(got[5] < ordered_gptq && ordered_gptq < plain_gptq && plain_gptq < got[0]);
    }
}

#[test]
fn t8_mixed_precision_at_three_bits() {
    let layer = layer();
    let problems = layer.cluster(&layer.g);
    let errors = layer.error_table(&problems, |_, r| quad(&layer.h, r));
    assert!(errors.iter().all(|e| *e >= 0.0));
    assert!(errors.chunks(3).all(|e| e[0] >= e[1] && e[1] >= e[2]));
    assert_eq!(errors.chunks(3).filter(|e| e[0] - e[1] < e[1] - e[2]).count(), 1);
    let bits = greedy(&errors, 2, 4, target(N, 3.0), AllocationStart::Min).unwrap();
    assert_eq!([2, 3, 4].map(|b| bits.iter().filter(|bits| **bits == b).count()), [13, 22, 13]);
    let codes = Codes::of(&problems, &bits);
    assert_table("k-means", layer.error(&codes.decode()), 0.00170, 0.0);
    let (q, [before, after]) = layer.scaled(&codes, &bits, CentroidWeights::Sensitivity);
    assert_table("scales", layer.error(&q), 0.00141, 0.03);
    assert_table("LNQ", layer.error(&layer.lnq(&codes, LnqInit::Labels)), 0.00039, 0.03);
    // Training starts from the errors that widths were allocated by.
    let chosen: f64 = bits.iter().enumerate().map(|(i, b)| errors[3 * i + *b as usize - 2]).sum();
    assert_close(before, chosen, 1e-4);
    assert!(after < before);
}

/// Which error the table holds matters more than the scales do: allocating by the error that
/// carries output gradients halves that error, at the price of the other.
#[test]
fn t8_allocation_by_gradients() {
    let layer = layer();
    let problems = layer.cluster(&layer.g);
    let full = |i: usize, r: &[f64]| -> f64 {
        let mut total = 0.0;
        for (t, g) in layer.gy[i * TOKENS..(i + 1) * TOKENS].iter().enumerate() {
            let y: f64 = (0..M).map(|j| r[j] * layer.x[j * TOKENS + t]).sum();
            total += g * g * y * y;
        }
        total
    };
    let plain_errors = layer.error_table(&problems, |_, r| quad(&layer.h, r));
    let full_errors = layer.error_table(&problems, full);
    let zeros = [0f32; M];
    let all: f64 = (0..N).map(|i| full(i, &residual(layer.w.row(i), &zeros))).sum();
    for (average, by_plain, by_full) in [(3.0, 0.00350, 0.00213), (2.5, 0.00942, 0.00443)] {
        for (table, want) in [(&plain_errors, by_plain), (&full_errors, by_full)] {
            let bits = greedy(table, 2, 4, target(N, average), AllocationStart::Min).unwrap();
            let error: f64 =
                bits.iter().enumerate().map(|(i, b)| full_errors[3 * i + *b as usize - 2]).sum();
            assert_table("S-full", error / all, want, 0.003);
        }
    }
}

/// On tokens that no method has seen, the order stays.
#[test]
fn t8_held_out_tokens() {
    let layer = layer();
    let h = second_moments(&inputs(&mut SplitMix64::new(99), &layer.mixing));
    let codes = Codes::of(&layer.cluster(&layer.g), &[3; N]);
    let scaled = layer.scaled(&codes, &[3; N], CentroidWeights::Sensitivity).0;
    let columns = [
        ("k-means", codes.decode(), 0.00335),
        ("ordered GPTQ", layer.gptq(3, true), 0.00258),
        ("scales", scaled, 0.00253),
        ("feedback", layer.feedback(&codes).decode(), 0.00089),
        ("LNQ", layer.lnq(&codes, LnqInit::Labels), 0.00082),
    ];
    for (name, q, want) in columns {
        assert_table(name, layer.error_under(&h, &q), want, 0.03);
    }
}

/// T11: for a loss of `Y = W X`, squared gradients of weights are `(x_j g_{y_i}ᵀ)²`.
#[test]
fn t11_fisher() {
    let (n, m, tokens) = (3, 4, 5);
    let mut rng = SplitMix64::new(41);
    let w = normals(&mut rng, n * m, 1.0);
    let x = normals(&mut rng, m * tokens, 1.0);
    let output = |w: &[f64], i: usize, t: usize| -> f64 {
        (0..m).map(|j| w[i * m + j] * x[j * tokens + t]).sum()
    };
    // Cross-entropy of class t mod n, summed over tokens.
    let loss = |w: &[f64]| -> f64 {
        let token = |t: usize| {
            let all: f64 = (0..n).map(|i| output(w, i, t).exp()).sum();
            all.ln() - output(w, t % n, t)
        };
        (0..tokens).map(token).sum()
    };
    for i in 0..n {
        for j in 0..m {
            let along = |step: f64| {
                let mut moved = w.clone();
                moved[i * m + j] += step;
                loss(&moved)
            };
            let difference = (along(1e-5) - along(-1e-5)) / 2e-5;
            let through_outputs: f64 = (0..tokens)
                .map(|t| {
                    let all: f64 = (0..n).map(|i| output(&w, i, t).exp()).sum();
                    let target = if t % n == i { 1.0 } else { 0.0 };
                    x[j * tokens + t] * (output(&w, i, t).exp() / all - target)
                })
                .sum();
            let (got, want) = (through_outputs.powi(2), difference.powi(2));
            assert!((got - want).abs() < 1e-7 * (1.0 + want), "{got} for {want}");
        }
    }
    // With unit gradients and one token per sample, the sum of squares is the diagonal of H; with
    // all tokens in one sample it is not, since they add up before they are squared.
    let mut gram = Gram::new(m);
    let by_token: Vec<f32> = (0..tokens * m).map(|at| x[at % m * tokens + at / m] as f32).collect();
    gram.add(&by_token);
    for (j, h) in gram.diagonal().into_iter().enumerate() {
        let channel = &x[j * tokens..(j + 1) * tokens];
        let samples: f64 = channel.iter().map(|x| x * x).sum();
        assert_close(h as f64, samples, 1e-5);
        assert!((channel.iter().sum::<f64>().powi(2) - samples).abs() > 1e-3);
    }
    let (tokens, g) = ([1.0, 2.0], [3.0, -1.0]);
    let products = [0, 1].map(|t: usize| tokens[t] * g[t]);
    assert_eq!((products[0] + products[1]) * (products[0] + products[1]), 1.0);
    assert_eq!(products[0] * products[0] + products[1] * products[1], 13.0);
}
