//! Documents of a parquet file: a string column, row group by row group.

use std::fs::File;
use std::path::{Path, PathBuf};

use anybit_io::IoError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use parquet::record::reader::RowIter;
use parquet::schema::types::Type;

use super::{DataError, Result};

/// Rows of a file.
pub(super) struct Rows {
    reader: SerializedFileReader<File>,
    path: PathBuf,
    /// The column alone, as a schema.
    projection: Type,
    group: usize,
    texts: std::vec::IntoIter<String>,
    bytes: u64,
}

impl Rows {
    /// Opens a file and finds its column.
    ///
    /// # Errors
    /// A file that is none, or has no such column of strings.
    pub fn open(path: &Path, column: &str) -> Result<Self> {
        let file = File::open(path).map_err(|e| IoError::file("read", path, e))?;
        let bytes = file.metadata().map_or(0, |m| m.len());
        let fail = |what: String| DataError::Parquet { path: path.to_owned(), what };
        let reader = SerializedFileReader::new(file).map_err(|e| fail(e.to_string()))?;
        let schema = reader.metadata().file_metadata().schema();
        let field = schema.get_fields().iter().find(|f| f.name() == column);
        let Some(field) = field else {
            let names: Vec<&str> = schema.get_fields().iter().map(|f| f.name()).collect();
            let names = names.join(", ");
            return Err(fail(format!("has no column {column}, but {names}: set data.text_key")));
        };
        let projection = Type::group_type_builder(schema.name()).with_fields(vec![field.clone()]);
        let projection = projection.build().map_err(|e| fail(e.to_string()))?;
        let texts = Vec::new().into_iter();
        Ok(Self { reader, path: path.to_owned(), projection, group: 0, texts, bytes })
    }

    fn next_group(&mut self) -> Result<bool> {
        if self.group == self.reader.num_row_groups() {
            return Ok(false);
        }
        let fail = |what: String| DataError::Parquet { path: self.path.clone(), what };
        let group = self.reader.get_row_group(self.group).map_err(|e| fail(e.to_string()))?;
        let rows = RowIter::from_row_group(Some(self.projection.clone()), &*group);
        let mut texts = Vec::new();
        for row in rows.map_err(|e| fail(e.to_string()))? {
            let row = row.map_err(|e| fail(e.to_string()))?;
            match row.get_column_iter().next() {
                Some((_, Field::Str(text))) => texts.push(text.clone()),
                Some((_, Field::Null)) | None => texts.push(String::new()),
                Some((name, _)) => return Err(fail(format!("column {name} holds no strings"))),
            }
        }
        (self.texts, self.group) = (texts.into_iter(), self.group + 1);
        Ok(true)
    }
}

impl Iterator for Rows {
    type Item = Result<(String, bool, u64)>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(text) = self.texts.next() {
                let groups = self.reader.num_row_groups().max(1) as u64;
                return Some(Ok((text, true, self.bytes * self.group as u64 / groups)));
            }
            match self.next_group() {
                Ok(true) => {}
                Ok(false) => return None,
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use parquet::data_type::{ByteArray, ByteArrayType};
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;

    use super::*;

    #[test]
    fn rows_are_documents() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.parquet");
        let schema = "message s { required binary text (UTF8); }";
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let properties = Arc::new(WriterProperties::builder().build());
        let file = File::create(&path).unwrap();
        let mut writer = SerializedFileWriter::new(file, schema, properties).unwrap();
        for group in [["one", "two"], ["three", ""]] {
            let mut rows = writer.next_row_group().unwrap();
            let mut column = rows.next_column().unwrap().unwrap();
            let values = group.map(ByteArray::from);
            column.typed::<ByteArrayType>().write_batch(&values, None, None).unwrap();
            column.close().unwrap();
            rows.close().unwrap();
        }
        writer.close().unwrap();
        let texts: Vec<String> =
            Rows::open(&path, "text").unwrap().map(|row| row.unwrap().0).collect();
        assert_eq!(texts, ["one", "two", "three", ""]);
        let error = Rows::open(&path, "body").err().unwrap().to_string();
        assert!(error.contains("but text"), "{error}");
    }
}
