//! What the commands that train by a recipe have in common.

use std::path::PathBuf;

/// Which recipe, and where its run goes.
#[derive(clap::Args)]
pub struct RunArgs {
    /// The recipe.
    #[arg(value_name = "RECIPE")]
    pub recipe: PathBuf,

    /// Set a key of the recipe, such as train.lr=1e-3; may be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,

    /// Folder of the run, instead of the recipe's.
    #[arg(long, short, value_name = "DIR")]
    pub out: Option<PathBuf>,

    /// Begin anew where there is a run already.
    #[arg(long)]
    pub force: bool,

    /// Write the report as JSON to this file too (- for standard output).
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}
