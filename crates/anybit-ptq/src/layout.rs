//! [`MatrixLayout`]: how a matrix will be stored, known to the byte before any weight is rounded.

use anybit_core::{CoreError, GridSpec, Plane, QuantizedMatrix};
use anybit_io::native::{PlaneRecord, QuantizedRecord};
use anybit_io::safetensors_file::PlannedTensor;
use half::f16;

/// Grids and parts of a packed matrix `[rows, cols]`.
#[derive(Debug, Clone, PartialEq)]
pub struct MatrixLayout {
    /// Grid and rows of each row group, in the order of storage.
    pub planes: Vec<(GridSpec, usize)>,
    /// Row group of each row, when there are several.
    pub row_groups: Option<Vec<u8>>,
    /// Grid and columns of a second column tier, the last columns; for one row group alone.
    pub high: Option<(GridSpec, usize)>,
    /// Whether a factor per column is stored.
    pub column_scale: bool,
    /// Entries of the sparse part, if there is one.
    pub sparse: Option<usize>,
}

impl MatrixLayout {
    /// One grid for all rows.
    pub fn single(grid: GridSpec, rows: usize) -> Self {
        Self {
            planes: vec![(grid, rows)],
            row_groups: None,
            high: None,
            column_scale: false,
            sparse: None,
        }
    }

    /// A grid for each tier of columns, at most two.
    pub fn tiered(tiers: &[(GridSpec, usize)], rows: usize) -> Self {
        let mut layout = Self::single(tiers[0].0, rows);
        layout.high = tiers.get(1).copied();
        layout
    }

    /// A grid of each row's own: `choice` holds indices into `options`. Grids without rows are
    /// left out.
    pub fn by_row(options: &[GridSpec], choice: &[u8]) -> Self {
        let mut planes = Vec::new();
        let mut group_of = [0u8; 256];
        for (option, grid) in options.iter().enumerate() {
            let rows = choice.iter().filter(|c| **c as usize == option).count();
            if rows > 0 {
                group_of[option] = planes.len() as u8;
                planes.push((*grid, rows));
            }
        }
        let row_groups = (planes.len() > 1)
            .then(|| choice.iter().map(|option| group_of[*option as usize]).collect());
        Self { planes, row_groups, high: None, column_scale: false, sparse: None }
    }

    /// The rows of row group `group`, in order.
    pub fn rows_of(&self, group: usize) -> Vec<usize> {
        match &self.row_groups {
            None => (0..self.planes[group].1).collect(),
            Some(groups) => {
                let own = groups.iter().enumerate().filter(|(_, g)| **g as usize == group);
                own.map(|(row, _)| row).collect()
            }
        }
    }

    /// Puts filled planes together as the layout says.
    ///
    /// # Errors
    /// As [`QuantizedMatrix::from_row_groups`].
    pub fn assemble(
        &self,
        shape: (usize, usize),
        planes: Vec<Plane>,
        column_scale: Option<Vec<f16>>,
    ) -> Result<QuantizedMatrix, CoreError> {
        match &self.row_groups {
            Some(groups) => QuantizedMatrix::from_row_groups(shape, planes, groups, column_scale),
            None => QuantizedMatrix::from_planes(shape, planes, 1, column_scale, None),
        }
    }

    /// Width of each row's codes.
    pub fn row_bits(&self, rows: usize) -> Vec<u8> {
        match &self.row_groups {
            None => vec![self.planes.first().map_or(0, |p| p.0.bits()); rows],
            Some(groups) => groups.iter().map(|g| self.planes[*g as usize].0.bits()).collect(),
        }
    }

    /// Bits of all codes of `cols` columns.
    pub fn code_bits(&self, cols: usize) -> u64 {
        let high = self.high.map_or(0, |h| h.1);
        let low = |(grid, rows): &(GridSpec, usize)| {
            let top = self.high.map_or(0, |(grid, cols)| cols as u64 * grid.bits() as u64);
            *rows as u64 * ((cols - high) as u64 * grid.bits() as u64 + top)
        };
        self.planes.iter().map(low).sum()
    }

    /// The tensors that will hold the matrix `tensor`.
    pub fn parts(&self, tensor: &str, rows: usize, cols: usize) -> Vec<PlannedTensor> {
        let low = cols - self.high.map_or(0, |h| h.1);
        let tiers = |(grid, rows): &(GridSpec, usize)| {
            let plane = |(grid, cols)| PlaneRecord { rows: *rows, cols, grid };
            std::iter::once((*grid, low)).chain(self.high).map(plane).collect::<Vec<_>>()
        };
        let record = QuantizedRecord {
            rows,
            cols,
            method: String::new(),
            planes: self.planes.iter().flat_map(tiers).collect(),
            column_groups: 1 + usize::from(self.high.is_some()),
            column_scale: self.column_scale,
            row_perm: false,
            row_groups: self.row_groups.is_some(),
            sparse: self.sparse,
            code_bits: 0,
            bytes: 0,
            relative_error: 0.0,
            output_error: None,
            decoded_norm: 0.0,
            blake3: String::new(),
        };
        record.parts(tensor)
    }

    /// Bytes of everything stored.
    pub fn bytes(&self, rows: usize, cols: usize) -> u64 {
        self.parts("", rows, cols).iter().map(PlannedTensor::bytes).sum()
    }
}
