//! [`Sparse`]: single weights kept beside the codes, in rows (CSR).

use half::f16;

use crate::{CoreError, Result};

/// Weights stored one by one beside the codes, by row: what `dense-and-sparse` takes out of the
/// dense part. They are *added* to the decoded row.
#[derive(Debug, Clone, PartialEq)]
pub struct Sparse {
    /// First entry of each row, and the number of entries: `[rows + 1]`, ascending.
    pub rows: Vec<u32>,
    /// Column of each entry, ascending in its row.
    pub cols: Vec<u32>,
    /// What is added there.
    pub values: Vec<f16>,
}

impl Sparse {
    /// Bytes of a column: two where every column of the matrix fits, else four.
    pub fn col_bytes(cols: usize) -> usize {
        if cols <= 1 << 16 { 2 } else { 4 }
    }

    /// The entries of a dense row-major matrix `values` at ascending flat indices `at`.
    ///
    /// # Errors
    /// A value that an f16 cannot hold.
    pub fn from_entries(
        (rows, cols): (usize, usize),
        at: &[usize],
        values: &[f32],
    ) -> Result<Self> {
        let mut sparse = Self {
            rows: Vec::with_capacity(rows + 1),
            cols: at.iter().map(|at| (at % cols) as u32).collect(),
            values: values.iter().map(|v| f16::from_f32(*v)).collect(),
        };
        let start = |row: usize| at.partition_point(|at| *at < row * cols) as u32;
        sparse.rows.extend((0..=rows).map(start));
        sparse.check(rows, cols)?;
        Ok(sparse)
    }

    /// Bytes of `entries` entries of a matrix of this shape as they are stored.
    pub fn stored_bytes((rows, cols): (usize, usize), entries: usize) -> usize {
        (rows + 1) * 4 + entries * (2 + Self::col_bytes(cols))
    }

    /// Bytes as stored beside a matrix of `cols` columns.
    pub(crate) fn bytes(&self, cols: usize) -> usize {
        Self::stored_bytes((self.rows.len() - 1, cols), self.cols.len())
    }

    pub(crate) fn check(&self, rows: usize, cols: usize) -> Result<()> {
        let ascending = self.rows.is_sorted() && self.rows.first() == Some(&0);
        let whole = self.rows.len() == rows + 1
            && self.cols.len() == self.values.len()
            && self.rows.last().is_some_and(|n| *n as usize == self.cols.len());
        if !(ascending && whole) {
            return Err(CoreError::Shape {
                what: "row starts of the sparse part",
                expected: format!("{} ascending starts", rows + 1),
                found: format!("{} for {} entries", self.rows.len(), self.cols.len()),
            });
        }
        for (row, ends) in self.rows.windows(2).enumerate() {
            let own = &self.cols[ends[0] as usize..ends[1] as usize];
            let distinct = own.windows(2).all(|pair| pair[0] < pair[1]);
            if !distinct || own.last().is_some_and(|c| *c as usize >= cols) {
                return Err(CoreError::Shape {
                    what: "columns of the sparse part",
                    expected: format!("ascending columns below {cols}"),
                    found: format!("others in row {row}"),
                });
            }
        }
        match self.values.iter().position(|v| !v.is_finite()) {
            None => Ok(()),
            Some(at) => Err(CoreError::NotFinite {
                what: "sparse value",
                row: self.rows.partition_point(|start| *start as usize <= at) - 1,
                col: self.cols[at] as usize,
                value: self.values[at].to_string(),
            }),
        }
    }

    /// Adds the entries of `row` to `out`.
    pub fn add_row(&self, row: usize, out: &mut [f32]) {
        let own = self.rows[row] as usize..self.rows[row + 1] as usize;
        for (col, value) in self.cols[own.clone()].iter().zip(&self.values[own]) {
            out[*col as usize] += value.to_f32();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_lie_in_their_rows_and_are_checked() {
        let sparse = Sparse::from_entries((3, 4), &[1, 3, 8], &[0.5, -1.0, 2.0]).unwrap();
        assert_eq!((&sparse.rows[..], &sparse.cols[..]), (&[0, 2, 2, 3][..], &[1, 3, 0][..]));
        let mut row = [1.0; 4];
        sparse.add_row(0, &mut row);
        assert_eq!(row, [1.0, 1.5, 1.0, 0.0]);
        assert_eq!(sparse.bytes(4), 4 * 4 + 3 * 4);
        let error = Sparse::from_entries((3, 4), &[1, 9], &[0.5, 1e9]).unwrap_err();
        assert!(matches!(error, CoreError::NotFinite { row: 2, col: 1, .. }), "{error}");
        let bad = Sparse { cols: vec![3, 1, 0], ..sparse.clone() };
        assert!(bad.check(3, 4).is_err());
        assert!(sparse.check(2, 4).is_err() && sparse.check(3, 3).is_err());
    }
}
