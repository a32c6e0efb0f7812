//! The key and value cache, `[layers][kv_heads, capacity, head_dim]`: f32, f16, or packed as the
//! quantizers at the sites `key` and `value` say.

use anybit_core::{BlockSites, Site};
use anybit_io::ModelConfig;
use anybit_kernels::{KvRows, PlainType};

use crate::{Decoder, DecoderLayer};

/// Keys and values of one layer.
#[derive(Debug, Clone)]
pub struct LayerKv {
    /// Keys after rotation and transform, `[kv_heads, capacity, head_dim]`.
    pub keys: KvRows,
    /// Values, likewise.
    pub values: KvRows,
    /// Positions allocated.
    pub capacity: usize,
    kv_heads: usize,
    head_dim: usize,
    plain: PlainType,
}

impl LayerKv {
    /// Room for `capacity` positions of a block with these sites; what has no quantizer is stored
    /// as `plain`.
    pub fn new(
        config: &ModelConfig,
        capacity: usize,
        sites: &BlockSites,
        plain: PlainType,
    ) -> Self {
        let (kv_heads, head_dim) = (config.num_kv_heads, config.head_dim);
        let rows = |site| KvRows::new(kv_heads * capacity, head_dim, sites.quantizer(site), plain);
        let (keys, values) = (rows(Site::Key), rows(Site::Value));
        Self { keys, values, capacity, kv_heads, head_dim, plain }
    }

    /// Makes it hold what a block with these sites stores; what it held is lost where the packing
    /// differs.
    pub fn prepare(&mut self, sites: &BlockSites) {
        let rows = self.kv_heads * self.capacity;
        for (site, held) in [(Site::Key, &mut self.keys), (Site::Value, &mut self.values)] {
            let quantizer = sites.quantizer(site);
            if !held.fits(quantizer, self.plain) {
                *held = KvRows::new(rows, self.head_dim, quantizer, self.plain);
            }
            held.set_quantizer(quantizer);
        }
    }

    /// Stores one token's keys and values, each `[kv_heads, head_dim]`.
    pub fn store(&mut self, position: usize, key: &[f32], value: &[f32]) {
        let d = self.head_dim;
        for (head, (k, v)) in key.chunks_exact(d).zip(value.chunks_exact(d)).enumerate() {
            self.keys.store(head * self.capacity + position, k);
            self.values.store(head * self.capacity + position, v);
        }
    }
}

/// The cache of all layers.
#[derive(Debug, Clone)]
pub struct KvCache {
    /// One per layer.
    pub layers: Vec<LayerKv>,
    /// Positions filled.
    pub len: usize,
    /// Positions allocated.
    pub capacity: usize,
}

impl KvCache {
    /// Room for `capacity` positions in every layer; what has no quantizer is stored as `plain`.
    pub fn new(decoder: &Decoder, capacity: usize, plain: PlainType) -> Self {
        let layers = decoder.layers.iter();
        let layer = |l: &DecoderLayer| LayerKv::new(&decoder.config, capacity, &l.sites, plain);
        let layers = layers.map(layer).collect();
        Self { layers, len: 0, capacity }
    }

    /// Forgets everything; keeps the memory.
    pub fn clear(&mut self) {
        self.len = 0;
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(|l| l.keys.bytes() + l.values.bytes()).sum()
    }
}
