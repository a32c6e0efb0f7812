//! LNQ as a whole, its kernels against their definitions, and golden values (T7).

use super::*;
use crate::kmeans::Exact1d;
use crate::rng::SplitMix64;
use approx::assert_relative_eq;

struct Case {
    w: Matrix,
    labels: Vec<u8>,
    codebooks: Vec<Vec<f32>>,
    gram: Gram,
}

/// Correlated inputs, and codebooks of k-means with 2 to 4 bits; several blocks, tiles and tasks.
fn case() -> Case {
    let mut rng = SplitMix64::new(31);
    let (n, m, k) = (40, 300, 75);
    let mut normals =
        |count: usize| -> Vec<f32> { (0..count).map(|_| rng.normal() as f32).collect() };
    let w = Matrix::from_vec(n, m, normals(n * m)).unwrap();
    let basis = normals(k * m);
    let mut inputs = Vec::new();
    for _ in 0..600 {
        let (z, mut x) = (normals(k), normals(m));
        for (j, x) in x.iter_mut().enumerate() {
            *x = 0.3 * *x + (0..k).map(|i| z[i] * basis[i * m + j]).sum::<f32>();
        }
        inputs.extend(x);
    }
    let mut gram = Gram::new(m);
    gram.add(&inputs);
    let (mut labels, mut codebooks) = (Vec::new(), Vec::new());
    for i in 0..n {
        let problem = Exact1d::new(w.row(i), &vec![1.0; m], 16).unwrap();
        let solution = problem.solution(4 << (i % 3));
        labels.extend(solution.labels);
        codebooks.push(solution.centroids);
    }
    Case { w, labels, codebooks, gram }
}

fn solver<'a>(case: &'a Case, h: &'a Matrix) -> Solver<'a> {
    let inverse = case.gram.diagonal().iter().map(|h| 1.0 / *h).collect();
    let options = LnqOptions { sweeps: 1, ..Default::default() };
    Solver { weights: &case.w, h, inverse, options }
}

/// Grids and codes of some rows, sorted.
fn start(case: &Case, rows: Range<usize>) -> (Vec<RowGrid>, Vec<u8>) {
    let m = case.w.cols;
    let codes = &case.labels[rows.start * m..rows.end * m];
    sorted(m, &case.codebooks[rows], codes).unwrap()
}

#[test]
fn losses_fall_from_both_starts() {
    let case = case();
    let run = |threads, init| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let options = LnqOptions { init, ..Default::default() };
        let run = || lnq(&case.w, &case.labels, &case.codebooks, &case.gram, options).unwrap();
        pool.install(run)
    };
    for init in [LnqInit::Labels, LnqOptions::default().init] {
        let result = run(1, init);
        assert_eq!(result, run(3, init));
        assert_eq!(result.trace.len(), 8);
        assert!(result.trace.windows(2).all(|t| t[1] <= t[0]), "{:?}", result.trace);
        assert!(result.trace[7] < 0.2 * result.trace[0], "{:?}", result.trace);
        assert_relative_eq!(
            result.row_losses.iter().sum::<f64>(),
            result.trace[7],
            max_relative = 1e-12
        );
        for (i, loss) in result.row_losses.iter().enumerate() {
            let book = &result.codebooks[i];
            assert_eq!(book.len(), case.codebooks[i].len());
            assert!(book.is_sorted());
            let labels = &result.labels[i * case.w.cols..(i + 1) * case.w.cols];
            let values = labels.iter().map(|label| book[*label as usize]);
            let r: Vec<f32> = case.w.row(i).iter().zip(values).map(|(w, q)| w - q).collect();
            assert_relative_eq!(case.gram.quad(&r), *loss, max_relative = 1e-3);
        }
    }
}

/// The tiled sums are `PᵀHP`, and a sweep leaves the product that the codes imply.
#[test]
fn kernels_agree_with_their_definitions() {
    let case = case();
    let h = case.gram.to_full();
    let (solver, m) = (solver(&case, &h), case.w.cols);
    let mut state = {
        let (grids, codes) = start(&case, 3..8);
        solver.state(3, grids, codes)
    };
    let matrices = solver.normal_matrices(&state, &solver.features(&state));
    let scale = case.gram.diagonal().iter().fold(0f32, |a, h| a.max(*h)) as f64;
    for (r, matrix) in matrices.iter().enumerate() {
        let labels = &state.codes[r * m..(r + 1) * m];
        let k = state.grids[r].parameters();
        let mut want = vec![0f64; k * k];
        for i in 0..m {
            for j in 0..m {
                want[labels[i] as usize * k + labels[j] as usize] += case.gram.at(i, j) as f64;
            }
        }
        for (got, want) in matrix.iter().zip(&want) {
            assert_relative_eq!(*got, *want, max_relative = 1e-5, epsilon = 1e-4 * scale);
        }
    }
    let before = state.loss();
    solver.sweep(&mut state);
    let kept = state.product.clone();
    solver.refresh(&mut state);
    assert!(state.loss() < before);
    let size = kept.iter().fold(0f32, |a, p| a.max(p.abs()));
    for (kept, fresh) in kept.iter().zip(&state.product) {
        assert!((kept - fresh).abs() < 1e-4 * size, "{kept} for {fresh}");
    }
}

/// T7 of the SKIM specification: one sweep from the codebook in closed form.
#[test]
fn t7_one_sweep() {
    let h =
        [[2.0, 0.5, 0.0, 0.0], [0.5, 1.0, 0.25, 0.0], [0.0, 0.25, 3.0, 1.0], [0.0, 0.0, 1.0, 4.0]];
    let mut gram = Gram::new(4);
    for (i, row) in h.iter().enumerate() {
        row.iter().enumerate().for_each(|(j, h)| gram.set(i, j, *h as f32));
    }
    let w = [-1.0f64, 0.5, 2.0, 4.0];
    let codebook = [305.0 / 132.0, 35.0 / 22.0];
    let case = Case {
        w: Matrix::from_vec(1, 4, w.map(|w| w as f32).to_vec()).unwrap(),
        labels: vec![0, 1, 1, 0],
        codebooks: vec![codebook.map(|c| c as f32).to_vec()],
        gram,
    };
    let full = case.gram.to_full();
    let solver = solver(&case, &full);
    let (grids, codes) = start(&case, 0..1);
    let mut state = solver.state(0, grids, codes);
    assert_relative_eq!(state.loss(), 39.7992424242, max_relative = 1e-6);
    solver.sweep(&mut state);
    // The codebook was given in falling order.
    let labels = [0, 1, 2, 3].map(|j: usize| 1 - state.codes[j] as usize);
    assert_eq!(labels, [1, 1, 0, 0]);
    let r = [0, 1, 2, 3].map(|j: usize| w[j] - codebook[labels[j]]);
    let mut loss = 0.0;
    for (i, row) in h.iter().enumerate() {
        loss += r[i] * row.iter().zip(r).map(|(h, r)| h * r).sum::<f64>();
    }
    assert_relative_eq!(loss, 28.2677341598, max_relative = 1e-9);
}

#[test]
fn dead_inputs_and_bad_input() {
    let mut case = case();
    for i in 0..300 {
        case.gram.set(i, 5, 0.0);
    }
    let run = |labels: &[u8], codebooks: &[Vec<f32>]| {
        lnq(&case.w, labels, codebooks, &case.gram, LnqOptions::default())
    };
    let result = run(&case.labels, &case.codebooks).unwrap();
    assert!(result.trace.iter().all(|loss| loss.is_finite()));
    let mut labels = case.labels.clone();
    labels[300] = 200;
    assert_eq!(run(&labels, &case.codebooks), Err(CoreError::CodeRange { row: 1 }));
    assert!(matches!(
        run(&case.labels[1..], &case.codebooks),
        Err(CoreError::Shape { what: "labels", .. })
    ));
    assert!(matches!(
        run(&case.labels, &case.codebooks[1..]),
        Err(CoreError::Shape { what: "codebooks", .. })
    ));
    let mut codebooks = case.codebooks.clone();
    codebooks[2][1] = f32::NAN;
    assert!(matches!(
        run(&case.labels, &codebooks),
        Err(CoreError::NotFinite { what: "codebook", row: 2, col: 1, .. })
    ));
    codebooks[2].clear();
    assert!(run(&case.labels, &codebooks).is_err());
}
