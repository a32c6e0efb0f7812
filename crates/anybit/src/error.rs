//! One error for everything that a command can do, and its exit code.

/// Result with [`enum@Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// What a command can fail with.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Reading or writing files.
    #[error(transparent)]
    Io(#[from] anybit_io::IoError),
    /// Running a model.
    #[error(transparent)]
    Runtime(#[from] anybit_runtime::RuntimeError),
    /// Measuring a model.
    #[error(transparent)]
    Eval(#[from] anybit_eval::EvalError),
    /// Quantizing a model.
    #[error(transparent)]
    Ptq(#[from] anybit_ptq::PtqError),
    /// Training a model.
    #[error(transparent)]
    Train(#[from] anybit_grad::train::TrainError),
    /// Training a network for images.
    #[error(transparent)]
    Vision(#[from] anybit_grad::vision::VisionError),
    /// Options that do not go together.
    #[error("{0}")]
    Usage(String),
    /// A checkpoint that is not what it claims to be.
    #[error("{0} of its tensors are not as the manifest says")]
    Verification(usize),
}

impl Error {
    /// The exit code: 2 usage, 3 input that cannot be used, 4 output that cannot be written,
    /// 5 failed verification, 1 everything else.
    pub fn exit_code(&self) -> u8 {
        use anybit_eval::EvalError;
        use anybit_grad::distill::DistillError;
        use anybit_grad::train::TrainError;
        use anybit_grad::vision::VisionError;
        use anybit_ptq::PtqError;
        use anybit_runtime::RuntimeError;
        match self {
            Self::Usage(_) => 2,
            Self::Verification(_) => 5,
            Self::Io(e)
            | Self::Runtime(RuntimeError::Io(e))
            | Self::Eval(EvalError::Io(e) | EvalError::Runtime(RuntimeError::Io(e)))
            | Self::Ptq(PtqError::Io(e) | PtqError::Runtime(RuntimeError::Io(e)))
            | Self::Train(TrainError::Io(e) | TrainError::Distill(DistillError::Io(e)))
            | Self::Vision(VisionError::Io(e)) => io_code(e),
            Self::Vision(VisionError::NotFinite { .. }) => 1,
            Self::Train(
                TrainError::Diverged { .. }
                | TrainError::Communication(_)
                | TrainError::Distill(DistillError::Communication(_)),
            ) => 1,
            Self::Runtime(_) | Self::Eval(_) | Self::Ptq(_) | Self::Train(_) | Self::Vision(_) => 3,
        }
    }
}

fn io_code(error: &anybit_io::IoError) -> u8 {
    use anybit_io::IoError;
    match error {
        IoError::Exists { .. } | IoError::NoSpace { .. } | IoError::Busy { .. } => 4,
        IoError::File { action: "create" | "write" | "remove", .. } => 4,
        _ => 3,
    }
}
