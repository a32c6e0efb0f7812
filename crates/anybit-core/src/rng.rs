//! SplitMix64: the one source of randomness, so that a seed means the same bytes everywhere.

/// SplitMix64 (Steele, Lea, Flood 2014).
#[derive(Debug, Clone)]
pub struct SplitMix64 {
    state: u64,
}

impl SplitMix64 {
    /// Starts the stream of `seed`.
    pub fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// Next 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in `[0, 1)` with 53 random bits.
    pub fn uniform(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Standard normal by Box–Muller; takes two draws and keeps one value.
    pub fn normal(&mut self) -> f64 {
        let (u1, u2) = (self.uniform(), self.uniform());
        (-2.0 * (1.0 - u1).ln()).sqrt() * (2.0 * std::f64::consts::PI * u2).cos()
    }

    /// Uniform integer in `[0, n)`; the bias for `n` far below 2^64 is negligible.
    pub fn below(&mut self, n: usize) -> usize {
        ((self.next_u64() as u128 * n as u128) >> 64) as usize
    }
}

/// The seed of a stream of its own for `name`.
pub fn stream(seed: u64, name: &str) -> u64 {
    name.bytes().fold(seed, |h, b| SplitMix64::new(h ^ b as u64).next_u64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_stream_of_seed_one() {
        let mut r = SplitMix64::new(1);
        assert_eq!(r.next_u64(), 0x910a2dec89025cc1);
        assert_eq!(r.next_u64(), 0xbeeb8da1658eec67);
        assert_eq!(r.next_u64(), 0xf893a2eefb32555e);
        assert_eq!(SplitMix64::new(1).uniform(), 0.5665615751722809);
        let mut r = SplitMix64::new(1);
        let normals = [-0.034267321791851144, -2.5000674933698677, 0.08772246831488635];
        for want in normals {
            approx::assert_relative_eq!(r.normal(), want, max_relative = 1e-14);
        }
    }
}
