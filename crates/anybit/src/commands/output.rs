//! What all commands print with: progress bars, tables, JSON files.

use std::path::Path;
use std::time::Duration;

use anybit::Result;
use anybit::io::atomic::write_bytes;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

/// Where progress and remarks go: standard error, or nowhere with `--quiet`.
pub struct Terminal {
    quiet: bool,
}

impl Terminal {
    /// A terminal, silent when `quiet`.
    pub fn new(quiet: bool) -> Self {
        Self { quiet }
    }

    /// A bar of `len` steps with the time that is left. Not drawn when standard error is no
    /// terminal.
    pub fn bar(&self, label: &str, len: u64) -> ProgressBar {
        let bar = ProgressBar::with_draw_target(Some(len), self.target());
        let style = "{msg:>12} [{bar:30}] {pos}/{len}  {elapsed} elapsed, {eta} left";
        self.styled(bar, style, label)
    }

    /// A bar of `len` bytes.
    pub fn byte_bar(&self, label: &str, len: u64) -> ProgressBar {
        let bar = ProgressBar::with_draw_target(Some(len), self.target());
        let style = "{msg:>12} [{bar:30}] {bytes}/{total_bytes}  {eta} left";
        self.styled(bar, style, label)
    }

    fn styled(&self, bar: ProgressBar, template: &str, label: &str) -> ProgressBar {
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_message(label.to_string());
        bar.enable_steady_tick(Duration::from_millis(500));
        bar
    }

    fn target(&self) -> ProgressDrawTarget {
        match self.quiet {
            true => ProgressDrawTarget::hidden(),
            false => ProgressDrawTarget::stderr(),
        }
    }

    /// A remark.
    pub fn note(&self, text: &str) {
        if !self.quiet {
            eprintln!("{text}");
        }
    }
}

/// Prints rows as a table: the first row is the header, the first column is left-aligned.
pub fn print_table(rows: &[Vec<String>]) {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns)
        .map(|c| rows.iter().filter_map(|r| r.get(c)).map(|s| s.chars().count()).max().unwrap_or(0))
        .collect();
    for row in rows {
        let cells = row.iter().zip(&widths).enumerate().map(|(c, (cell, width))| match c {
            0 => format!("{cell:<width$}"),
            _ => format!("{cell:>width$}"),
        });
        println!("{}", cells.collect::<Vec<_>>().join("  ").trim_end());
    }
}

/// Writes `value` as JSON to `path`, or to standard output for `-`.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|e| anybit::Error::Usage(format!("the result is no JSON: {e}")))?;
    if path == Path::new("-") {
        println!("{text}");
        return Ok(());
    }
    Ok(write_bytes(path, format!("{text}\n").as_bytes())?)
}

/// Writes a report where `--json` asks for it; whether that was standard output, where nothing else
/// belongs then.
pub fn written(path: Option<&Path>, report: &impl Serialize) -> Result<bool> {
    let Some(path) = path else { return Ok(false) };
    write_json(path, report)?;
    Ok(path == Path::new("-"))
}

/// "12.3 MB": decimal units, as disks and other tools count.
pub fn bytes_text(bytes: u64) -> String {
    match bytes as f64 {
        b if b >= 1e9 => format!("{:.2} GB", b / 1e9),
        b if b >= 1e6 => format!("{:.1} MB", b / 1e6),
        b if b >= 1e3 => format!("{:.1} kB", b / 1e3),
        b => format!("{b} B"),
    }
}

/// A number for a table, or a dash.
pub fn or_dash(value: Option<f64>, digits: usize) -> String {
    value.map_or("-".into(), |v| format!("{v:.digits$}"))
}
