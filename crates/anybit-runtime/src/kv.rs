//! The key and value cache, `[layers][kv_heads, capacity, head_dim]` in f32.

use anybit_io::ModelConfig;

/// Keys and values of one layer.
#[derive(Debug, Clone)]
pub struct LayerKv {
    /// Keys after rotation, `[kv_heads, capacity, head_dim]`.
    pub keys: Vec<f32>,
    /// Values, likewise.
    pub values: Vec<f32>,
    /// Positions allocated.
    pub capacity: usize,
    head_dim: usize,
}

impl LayerKv {
    /// Room for `capacity` positions.
    pub fn new(config: &ModelConfig, capacity: usize) -> Self {
        let len = config.kv_size() * capacity;
        let (keys, values) = (vec![0.0; len], vec![0.0; len]);
        Self { keys, values, capacity, head_dim: config.head_dim }
    }

    /// Stores one token's keys and values, each `[kv_heads, head_dim]`.
    pub fn store(&mut self, position: usize, key: &[f32], value: &[f32]) {
        let d = self.head_dim;
        for (head, (k, v)) in key.chunks_exact(d).zip(value.chunks_exact(d)).enumerate() {
            let at = (head * self.capacity + position) * d;
            self.keys[at..at + d].copy_from_slice(k);
            self.values[at..at + d].copy_from_slice(v);
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
    /// Room for `capacity` positions in every layer.
    pub fn new(config: &ModelConfig, capacity: usize) -> Self {
        let layers = (0..config.num_layers).map(|_| LayerKv::new(config, capacity)).collect();
        Self { layers, len: 0, capacity }
    }

    /// Forgets everything; keeps the memory.
    pub fn clear(&mut self) {
        self.len = 0;
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(|l| (l.keys.len() + l.values.len()) * 4).sum()
    }
}
