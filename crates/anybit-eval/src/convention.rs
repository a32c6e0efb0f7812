//! Which positions of a text are scored. Perplexities of two conventions are not comparable, so a
//! number never goes without its convention.
//!
//! | | windows | scored |
//! |---|---|---|
//! | `hf` | disjoint, `ctx` tokens, tail dropped | every prediction inside a window (`ctx − 1`) |
//! | `llamacpp` | the same; each starts with BOS in place of its first token when the model adds one | the second half: targets `ctx/2 + 1 ..` |
//!
//! `hf` is the loop of the GPTQ paper's code and those that followed; `llamacpp` is that of
//! llama.cpp's perplexity tool.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::{EvalError, Result};

/// A way to cut a text into windows and to choose the scored positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Convention {
    /// All predictions of disjoint windows.
    #[default]
    Hf,
    /// The second half of each window.
    LlamaCpp,
}

impl Convention {
    /// Its name on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Hf => "hf",
            Self::LlamaCpp => "llamacpp",
        }
    }

    /// Positions of a window whose prediction (of the next token) is scored.
    pub fn scored(self, ctx: usize) -> Range<usize> {
        match self {
            Self::Hf => 0..ctx - 1,
            Self::LlamaCpp => ctx / 2..ctx - 1,
        }
    }

    /// Whether windows start with BOS.
    pub fn places_bos(self) -> bool {
        self == Self::LlamaCpp
    }

    /// Cuts `tokens` into windows of `ctx`, at most `limit` tokens in all.
    ///
    /// # Errors
    /// A window too short to score anything, or a text too short for one window.
    pub fn windows(
        self,
        tokens: &[u32],
        ctx: usize,
        limit: Option<usize>,
        bos: Option<u32>,
    ) -> Result<Vec<Vec<u32>>> {
        let min = match self {
            Self::Hf => 2,
            Self::LlamaCpp => 4,
        };
        if ctx < min {
            return Err(EvalError::Context { ctx, convention: self.name(), min });
        }
        let count = limit.unwrap_or(usize::MAX).min(tokens.len());
        if count < ctx {
            return Err(EvalError::TooShort { tokens: count, ctx });
        }
        let cut = |window: &[u32]| {
            let mut window = window.to_vec();
            if let (true, Some(bos)) = (self.places_bos(), bos) {
                window[0] = bos;
            }
            window
        };
        Ok(tokens[..count].chunks_exact(ctx).map(cut).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_and_scored_positions() {
        let tokens: Vec<u32> = (10..31).collect();
        let hf = Convention::Hf.windows(&tokens, 8, None, Some(1)).unwrap();
        assert_eq!((hf.len(), hf[1][0]), (2, 18));
        let cpp = Convention::LlamaCpp.windows(&tokens, 8, Some(15), Some(1)).unwrap();
        assert_eq!((cpp.len(), cpp[0][0], cpp[0][1]), (1, 1, 11));
        // llama.cpp scores n_ctx − n_ctx/2 − 1 tokens of a chunk.
        assert_eq!(Convention::LlamaCpp.scored(512).len(), 255);
        assert_eq!(Convention::Hf.scored(512).len(), 511);
        assert!(Convention::Hf.windows(&tokens, 22, None, None).is_err());
        assert!(Convention::LlamaCpp.windows(&tokens, 3, None, None).is_err());
    }
}
