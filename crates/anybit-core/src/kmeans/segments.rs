//! Costs of intervals of sorted points, from prefix sums `S0 = Σ w`, `S1 = Σ w x`, `S2 = Σ w x²`:
//!
//! ```text
//! cost(a, b) = S2[a..b] − S1[a..b]² / S0[a..b]
//! ```
//!
//! [`Plain`] is the fast one: f64 sums of centred values, exact to a few ulps of the *total*
//! scatter. [`Precise`] keeps every sum as an unevaluated pair of f64 (106 bits), for rows whose
//! clusters are so tight that those ulps matter. [`super::exact`] chooses.

/// What the dynamic program asks about intervals of points.
pub(super) trait Segments {
    /// Cost of points `0..b` as one cluster.
    fn whole(&self, b: usize) -> f64;

    /// Brings a finished layer into the form that [`Segments::best`] reads.
    fn prepare(&self, layer: &mut [f64]);

    /// The `a` in `low..=high`, the least in a tie, where the layer's cost at `a` plus
    /// `cost(a, b)` is smallest, and that sum.
    fn best(&self, layer: &[f64], b: usize, low: usize, high: usize) -> (usize, f64);
}

/// Candidates that are compared side by side: two vectors of SSE2, one of AVX2. Most searches are
/// short, so more would only lengthen their scalar tails.
const LANES: usize = 4;

/// Prefix sums in f64.
pub(super) struct Plain {
    mass: Vec<f64>,
    moment: Vec<f64>,
    square: Vec<f64>,
    /// Masses below this are rounding errors of the prefix sums; dividing by them would turn an
    /// error of an ulp into one of any size.
    floor: f64,
}

impl Plain {
    pub(super) fn new(points: &[f64], masses: &[f64]) -> Self {
        let total: f64 = masses.iter().sum();
        let mean = points.iter().zip(masses).map(|(x, m)| x * m).sum::<f64>() / total;
        let empty = || Vec::<f64>::with_capacity(points.len() + 1);
        let (mut mass, mut moment, mut square) = (empty(), empty(), empty());
        let mut sums = [0f64; 3];
        for (x, m) in points.iter().map(|x| x - mean).zip(masses) {
            mass.push(sums[0]);
            moment.push(sums[1]);
            square.push(sums[2]);
            sums = [sums[0] + m, sums[1] + m * x, sums[2] + m * x * x];
        }
        mass.push(sums[0]);
        moment.push(sums[1]);
        square.push(sums[2]);
        Self { mass, moment, square, floor: f64::EPSILON * total }
    }
}

impl Segments for Plain {
    fn whole(&self, b: usize) -> f64 {
        let between = self.moment[b] * self.moment[b] / self.mass[b].max(self.floor);
        (self.square[b] - between).max(0.0)
    }

    /// `S2` of an interval is a difference whose halves depend on `a` alone and on `b` alone:
    /// taking the first half off here leaves one subtraction less for every candidate.
    fn prepare(&self, layer: &mut [f64]) {
        for (cost, square) in layer.iter_mut().zip(&self.square) {
            *cost -= square;
        }
    }

    fn best(&self, layer: &[f64], b: usize, low: usize, high: usize) -> (usize, f64) {
        let (mass, moment) = (self.mass[b], self.moment[b]);
        let value = |cost: f64, m: f64, x: f64| {
            let (m, x) = (mass - m, moment - x);
            // Not `max`: this form is one instruction, since it need not care about NaN.
            let m = if m > self.floor { m } else { self.floor };
            cost - x * x / m
        };
        let (costs, costs_tail) = layer[low..=high].as_chunks::<LANES>();
        let (masses, masses_tail) = self.mass[low..=high].as_chunks::<LANES>();
        let (moments, moments_tail) = self.moment[low..=high].as_chunks::<LANES>();
        let mut least = [f64::INFINITY; LANES];
        let mut chunk_of = [0u64; LANES];
        let chunks = costs.iter().zip(masses).zip(moments);
        for (chunk, ((costs, masses), moments)) in (0u64..).zip(chunks) {
            for lane in 0..LANES {
                let v = value(costs[lane], masses[lane], moments[lane]);
                let better = v < least[lane];
                least[lane] = if better { v } else { least[lane] };
                chunk_of[lane] = if better { chunk } else { chunk_of[lane] };
            }
        }
        let mut best = (low, f64::INFINITY);
        for (lane, (v, chunk)) in least.into_iter().zip(chunk_of).enumerate() {
            let a = low + chunk as usize * LANES + lane;
            if v < best.1 || (v == best.1 && a < best.0) {
                best = (a, v);
            }
        }
        let tail = costs_tail.iter().zip(masses_tail).zip(moments_tail);
        for (a, ((cost, m), x)) in (low + costs.len() * LANES..).zip(tail) {
            let v = value(*cost, *m, *x);
            if v < best.1 {
                best = (a, v);
            }
        }
        (best.0, (best.1 + self.square[b]).max(0.0))
    }
}

/// Prefix sums as pairs of f64.
pub(super) struct Precise {
    sums: Vec<[Pair; 3]>,
}

impl Precise {
    pub(super) fn new(points: &[f64], masses: &[f64]) -> Self {
        let mut sum = [Pair::from(0.0); 3];
        let mut sums = vec![sum];
        for (x, m) in points.iter().zip(masses) {
            let (x, m) = (Pair::from(*x), Pair::from(*m));
            let moment = m.times(x);
            sum = [sum[0].plus(m), sum[1].plus(moment), sum[2].plus(moment.times(x))];
            sums.push(sum);
        }
        Self { sums }
    }

    fn cost(&self, a: usize, b: usize) -> f64 {
        let (from, to) = (&self.sums[a], &self.sums[b]);
        let mass = to[0].minus(from[0]);
        if mass.high <= 0.0 {
            return 0.0;
        }
        let moment = to[1].minus(from[1]);
        let square = to[2].minus(from[2]);
        square.minus(moment.times(moment).over(mass)).high.max(0.0)
    }
}

impl Segments for Precise {
    fn whole(&self, b: usize) -> f64 {
        self.cost(0, b)
    }

    fn prepare(&self, _layer: &mut [f64]) {}

    fn best(&self, layer: &[f64], b: usize, low: usize, high: usize) -> (usize, f64) {
        let mut best = (low, f64::INFINITY);
        for (a, cost) in (low..).zip(&layer[low..=high]) {
            let v = cost + self.cost(a, b);
            if v < best.1 {
                best = (a, v);
            }
        }
        best
    }
}

/// The sum of two f64 of which the second is below half an ulp of the first (Dekker 1971).
#[derive(Clone, Copy)]
struct Pair {
    high: f64,
    low: f64,
}

impl From<f64> for Pair {
    fn from(high: f64) -> Self {
        Self { high, low: 0.0 }
    }
}

impl Pair {
    fn normal(high: f64, low: f64) -> Self {
        let sum = high + low;
        Self { high: sum, low: low - (sum - high) }
    }

    fn plus(self, other: Self) -> Self {
        let sum = self.high + other.high;
        let part = sum - self.high;
        let error = (self.high - (sum - part)) + (other.high - part);
        Self::normal(sum, error + (self.low + other.low))
    }

    fn minus(self, other: Self) -> Self {
        self.plus(Self { high: -other.high, low: -other.low })
    }

    fn times(self, other: Self) -> Self {
        let product = self.high * other.high;
        let error = self.high.mul_add(other.high, -product);
        Self::normal(product, error + (self.high * other.low + self.low * other.high))
    }

    fn over(self, other: Self) -> Self {
        let quotient = self.high / other.high;
        let rest = self.minus(other.times(Self::from(quotient)));
        Self::normal(quotient, rest.high / other.high)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::SplitMix64;

    /// Both agree with the definition, and both searches with each other.
    #[test]
    fn costs_and_searches_agree() {
        let mut rng = SplitMix64::new(21);
        let mut points: Vec<f64> = (0..100).map(|_| rng.normal()).collect();
        points.sort_by(f64::total_cmp);
        let masses: Vec<f64> = (0..100).map(|_| rng.normal().exp()).collect();
        let (plain, precise) = (Plain::new(&points, &masses), Precise::new(&points, &masses));
        for (a, b) in [(0, 1), (0, 100), (17, 60), (98, 100)] {
            let mass: f64 = masses[a..b].iter().sum();
            let part = || points[a..b].iter().zip(&masses[a..b]);
            let mean = part().map(|(x, m)| x * m).sum::<f64>() / mass;
            let want: f64 = part().map(|(x, m)| m * (x - mean) * (x - mean)).sum();
            approx::assert_relative_eq!(
                precise.cost(a, b),
                want,
                max_relative = 1e-12,
                epsilon = 1e-28
            );
            if a == 0 {
                approx::assert_abs_diff_eq!(plain.whole(b), want, epsilon = 1e-12);
            }
        }
        let layer: Vec<f64> = (0..=100).map(|b| plain.whole(b)).collect();
        let mut prepared = layer.clone();
        plain.prepare(&mut prepared);
        for (b, low, high) in [(1, 0, 0), (9, 2, 8), (60, 5, 59), (100, 30, 99), (100, 1, 64)] {
            let (fast, slow) =
                (plain.best(&prepared, b, low, high), precise.best(&layer, b, low, high));
            assert_eq!(fast.0, slow.0);
            approx::assert_relative_eq!(fast.1, slow.1, max_relative = 1e-11, epsilon = 1e-11);
        }
    }

    #[test]
    fn pairs_hold_what_f64_drops() {
        let (one, tiny) = (Pair::from(1.0), Pair::from(1e-25));
        assert_eq!(one.plus(tiny).minus(one).high, 1e-25);
        let third = one.over(Pair::from(3.0));
        let back = third.times(Pair::from(3.0)).minus(one);
        assert!(back.high.abs() < 1e-30);
    }
}
