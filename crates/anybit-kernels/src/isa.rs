//! Which vector instructions kernels use, decided once at run time.
//!
//! `ANYBIT_ISA=scalar|avx2|avx512` asks for less than the machine has, for tests and comparisons.

use std::sync::OnceLock;

/// Levels of instructions; each includes those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Plain Rust: what any machine runs, and the twin that the others are tested against.
    Scalar,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, VL and VNNI.
    Avx512,
}

impl Isa {
    /// All levels, the least first.
    pub const ALL: [Self; 3] = [Self::Scalar, Self::Avx2, Self::Avx512];

    /// Its name, as `ANYBIT_ISA` takes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }

    /// Whether this machine has it.
    pub fn detected(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = || {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            };
            let avx512 = || {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
            };
            match self {
                Self::Scalar => true,
                Self::Avx2 => avx2(),
                Self::Avx512 => avx2() && avx512(),
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            self == Self::Scalar
        }
    }

    /// The levels that this machine has.
    pub fn available() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|isa| isa.detected())
    }
}

/// What `ANYBIT_ISA` asks for: an error names what it could have said.
///
/// # Errors
/// A name that is none, or a level that this machine does not have.
pub fn requested() -> Result<Option<Isa>, String> {
    let Some(name) = std::env::var_os("ANYBIT_ISA") else { return Ok(None) };
    let found = Isa::ALL.into_iter().find(|isa| name == isa.name());
    match found {
        Some(isa) if isa.detected() => Ok(Some(isa)),
        Some(isa) => Err(format!("ANYBIT_ISA={}: this machine does not have it", isa.name())),
        None => {
            let name = name.to_string_lossy();
            Err(format!("ANYBIT_ISA={name}: expected scalar, avx2 or avx512"))
        }
    }
}

/// The level in use: the one that `ANYBIT_ISA` names, else the best that this machine has.
///
/// # Panics
/// Where [`requested`] is an error, which a program checks when it starts.
pub fn isa() -> Isa {
    static ISA: OnceLock<Isa> = OnceLock::new();
    *ISA.get_or_init(|| match requested() {
        Ok(Some(isa)) => isa,
        Ok(None) => Isa::available().last().unwrap_or(Isa::Scalar),
        Err(error) => panic!("{error}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scalar_is_everywhere_and_levels_are_ordered() {
        let available: Vec<Isa> = Isa::available().collect();
        assert_eq!(available[0], Isa::Scalar);
        assert!(available.is_sorted());
        assert!(available.contains(&isa()));
    }
}
