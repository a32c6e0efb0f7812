//! Event files that TensorBoard reads: a sequence of framed protocol-buffer messages.
//!
//! ```text
//! frame    length: u64 | masked crc of it: u32 | data | masked crc of the data: u32
//! masked   ((crc >> 15) | (crc << 17)) + 0xa282ead8,  crc = CRC-32C
//! Event    1 wall_time: double   2 step: int64   3 file_version: string
//!          5 summary { 1 value { 1 tag: string   2 simple_value: float } }
//!          7 session_log { 1 status: START = 1 }
//! ```
//!
//! A start event makes TensorBoard forget what other files have at its step and after: a run that
//! goes on from step `N` says `N + 1`.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use anybit_io::{IoError, Result};

use super::{Kind, Record};

/// An open event file.
#[derive(Debug)]
pub struct TensorBoard {
    file: File,
    path: PathBuf,
}

impl TensorBoard {
    /// A new event file in `folder`, named after `wall_time`, seconds since 1970; `resumed` is the
    /// step that an earlier file's run goes on from.
    ///
    /// # Errors
    /// What the operating system refuses.
    pub fn create(folder: &Path, wall_time: f64, resumed: Option<u64>) -> Result<Self> {
        let path = folder.join(format!("events.out.tfevents.{:010.0}.anybit", wall_time.floor()));
        let file = File::create(&path).map_err(|e| IoError::file("create", &path, e))?;
        let mut board = Self { file, path };
        let mut version = Message::default();
        version.double(1, wall_time);
        version.bytes(3, b"brain.Event:2");
        board.frame(&version.0)?;
        if let Some(step) = resumed {
            let (mut start, mut event) = (Message::default(), Message::default());
            start.varint(1, 1);
            event.double(1, wall_time);
            // TensorBoard keeps steps below the event's; `step` itself is not written again.
            event.varint(2, step + 1);
            event.bytes(7, &start.0);
            board.frame(&event.0)?;
        }
        Ok(board)
    }

    /// Adds a value.
    ///
    /// # Errors
    /// What the operating system refuses.
    pub fn scalar(&mut self, tag: &str, step: u64, value: f64, wall_time: f64) -> Result<()> {
        let (mut item, mut summary) = (Message::default(), Message::default());
        item.bytes(1, tag.as_bytes());
        item.float(2, value as f32);
        summary.bytes(1, &item.0);
        let mut event = Message::default();
        event.double(1, wall_time);
        event.varint(2, step);
        event.bytes(5, &summary.0);
        self.frame(&event.0)
    }

    /// Adds the values of a record.
    ///
    /// # Errors
    /// What the operating system refuses.
    pub fn record(&mut self, record: &Record, wall_time: f64) -> Result<()> {
        let part = match record.kind {
            Kind::Step => "train",
            Kind::Validation => "validation",
        };
        let own = [
            ("loss", Some(record.loss)),
            ("lr", record.lr),
            ("grad_norm", record.grad_norm),
            ("tokens_per_s", record.tokens_per_s),
        ];
        for (name, value) in own {
            if let Some(value) = value {
                self.scalar(&format!("{part}/{name}"), record.step, value, wall_time)?;
            }
        }
        for (group, values) in [("trusted", &record.trusted), ("extra", &record.extra)] {
            for (name, value) in values {
                self.scalar(&format!("{group}/{name}"), record.step, *value, wall_time)?;
            }
        }
        Ok(())
    }

    fn frame(&mut self, data: &[u8]) -> Result<()> {
        let length = (data.len() as u64).to_le_bytes();
        let mut bytes = Vec::with_capacity(data.len() + 16);
        bytes.extend_from_slice(&length);
        bytes.extend_from_slice(&masked_crc(&length).to_le_bytes());
        bytes.extend_from_slice(data);
        bytes.extend_from_slice(&masked_crc(data).to_le_bytes());
        self.file.write_all(&bytes).map_err(|e| IoError::file("write", &self.path, e))
    }
}

/// A protocol-buffer message being written.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn raw_varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn key(&mut self, field: u64, wire: u64) {
        self.raw_varint(field << 3 | wire);
    }

    fn varint(&mut self, field: u64, value: u64) {
        self.key(field, 0);
        self.raw_varint(value);
    }

    fn double(&mut self, field: u64, value: f64) {
        self.key(field, 1);
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn float(&mut self, field: u64, value: f32) {
        self.key(field, 5);
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn bytes(&mut self, field: u64, bytes: &[u8]) {
        self.key(field, 2);
        self.raw_varint(bytes.len() as u64);
        self.0.extend_from_slice(bytes);
    }
}

/// The table of CRC-32C, polynomial 0x1edc6f41, reflected.
const CRC: [u32; 256] = {
    let mut table = [0u32; 256];
    let mut i = 0;
    while i < 256 {
        let (mut crc, mut bit) = (i as u32, 0);
        while bit < 8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 };
            bit += 1;
        }
        table[i] = crc;
        i += 1;
    }
    table
};

fn crc32c(bytes: &[u8]) -> u32 {
    !bytes
        .iter()
        .fold(!0u32, |crc, byte| (crc >> 8) ^ CRC[((crc ^ u32::from(*byte)) & 255) as usize])
}

fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The data of every frame, after checking both sums.
    fn frames(mut bytes: &[u8]) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        while !bytes.is_empty() {
            let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
            let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            assert_eq!(word(8), masked_crc(&bytes[..8]));
            assert_eq!(word(12 + len), masked_crc(&bytes[12..12 + len]));
            frames.push(bytes[12..12 + len].to_vec());
            bytes = &bytes[16 + len..];
        }
        frames
    }

    #[test]
    fn sums_are_castagnolis() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(b""), 0);
        // The first frame of a file begun at 256.5 s: its length, 24, and its data.
        assert_eq!(masked_crc(&24u64.to_le_bytes()), 0x224b_7fa3);
        let first = b"\x09\x00\x00\x00\x00\x00\x08\x70\x40\x1a\x0dbrain.Event:2";
        assert_eq!(masked_crc(first), 0x2b21_98bc);
    }

    #[test]
    fn records_have_the_documented_tags() {
        let folder = tempfile::tempdir().unwrap();
        let mut board = TensorBoard::create(folder.path(), 1e9, None).unwrap();
        let mut step = Record::new(Kind::Step, 1, 64, 3.0);
        (step.lr, step.grad_norm, step.tokens_per_s) = (Some(1e-3), Some(0.5), Some(900.0));
        step.extra.insert("kl".into(), 0.25);
        board.record(&step, 1e9).unwrap();
        let mut validation = Record::new(Kind::Validation, 1, 64, 2.9);
        validation.trusted.insert("layers.0.self_attn.q_proj.weight".into(), 0.98);
        board.record(&validation, 1e9).unwrap();
        let path = folder.path().join("events.out.tfevents.1000000000.anybit");
        let tags: Vec<String> = frames(&std::fs::read(path).unwrap())[1..]
            .iter()
            .map(|data| {
                // 9 bytes of time, 2 of step, then 2 each of the headers of summary, value and tag.
                let len = usize::from(data[16]);
                String::from_utf8(data[17..17 + len].to_vec()).unwrap()
            })
            .collect();
        let train = ["train/loss", "train/lr", "train/grad_norm", "train/tokens_per_s"];
        let rest = ["extra/kl", "validation/loss", "trusted/layers.0.self_attn.q_proj.weight"];
        assert_eq!(tags, [&train[..], &rest[..]].concat());
    }

    #[test]
    fn files_hold_what_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let mut board = TensorBoard::create(folder.path(), 1_700_000_000.5, Some(300)).unwrap();
        board.scalar("train/loss", 301, 2.5, 1.0).unwrap();
        let path = folder.path().join("events.out.tfevents.1700000000.anybit");
        let frames = frames(&std::fs::read(path).unwrap());
        assert_eq!(frames.len(), 3);
        assert!(frames[0].ends_with(b"brain.Event:2"));
        // Step 301.
        assert_eq!(frames[1][9..], [0x10, 0xad, 0x02, 0x3a, 2, 8, 1]);
        let mut want = vec![0x09];
        want.extend_from_slice(&1f64.to_le_bytes());
        want.extend_from_slice(&[0x10, 0xad, 0x02, 0x2a, 19, 0x0a, 17, 0x0a, 10]);
        want.extend_from_slice(b"train/loss");
        want.push(0x15);
        want.extend_from_slice(&2.5f32.to_le_bytes());
        assert_eq!(frames[2], want);
    }
}
