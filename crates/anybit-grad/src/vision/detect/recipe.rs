//! What `anybit distill-detector` reads. Sections mean what they mean in
//! [`crate::vision::recipe`]; images have boxes, and there is one teacher at most.
//!
//! ```toml
//! out = "runs/shapes"
//! data = { folder = ".cache/shapes" }                       # anybit synth shapes
//! model = { family = "plain", width = 8 }
//! full_precision = { epochs = 40, batch = 32, lr = 5e-3 }   # of teacher and student
//! train = { epochs = 20, batch = 32, lr = 2e-3 }            # of the quantized student
//! [quantizer]
//! weights = { type = "lsq", bits = 3 }
//! activations = { type = "lsq_plus_activation", bits = 3 }
//! [distill]
//! teachers = [{ family = "plain", width = 16 }]
//! ```

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::scenes::ScenesSpec;
use crate::vision::model::ModelSpec;
use crate::vision::quantize::QuantizerSpec;
use crate::vision::recipe::DistillSpec;
use crate::vision::train::Settings;
use crate::vision::{Result, VisionError};

/// A run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DetectorRecipe {
    /// Folder of the run.
    pub out: PathBuf,
    /// Seed of everything random.
    #[serde(default)]
    pub seed: u64,
    /// Images with boxes.
    pub data: ScenesSpec,
    /// The student.
    pub model: ModelSpec,
    /// How the teacher, and the student before it is quantized, are trained.
    pub full_precision: Settings,
    /// The student's grids.
    pub quantizer: QuantizerSpec,
    /// How the quantized student is trained.
    pub train: Settings,
    /// The teacher; none for training on the boxes alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distill: Option<DistillSpec>,
}

impl DetectorRecipe {
    /// Checks what needs no file.
    ///
    /// # Errors
    /// Settings that are out of range or contradict each other.
    pub fn check(&self) -> Result<()> {
        self.full_precision.check("full_precision")?;
        self.train.check("train")?;
        self.quantizer.check()?;
        let Some(distill) = &self.distill else { return Ok(()) };
        if distill.teachers.len() > 1 {
            let what = format!(
                "{} teachers; a detector learns from one, since boxes of several cannot be mixed",
                distill.teachers.len()
            );
            return Err(VisionError::recipe("distill.teachers", what));
        }
        distill.check()
    }
}
