//! A model that was trained on half-integer grids, rotated, runs in integers and computes what was
//! trained: the product of the values that the codes stand for.

use std::collections::BTreeMap;
use std::path::Path;

use anybit_core::rng::SplitMix64;
use anybit_core::rounding::half_integer;
use anybit_core::{
    ActivationQuantizer, Hadamard, Matrix, QuantizedMatrix, RowScale, Site, SiteState, Transform,
};
use anybit_io::native::{Measured, PackedModel, write_model};
use anybit_io::{Checkpoint, synth};
use anybit_kernels::linear;
use anybit_runtime::{DecoderLayer, LayerBuffers};

/// Columns of a block of the rotation.
const BLOCK: usize = 16;

/// A random model of the shape `tiny` as it comes out of training at `bits`.
fn trained(bits: u8) -> PackedModel {
    let config = synth::preset("tiny").unwrap();
    let mut rng = SplitMix64::new(5);
    let (mut quantized, mut dense) = (BTreeMap::new(), BTreeMap::new());
    for (name, shape) in config.tensors() {
        let len: usize = shape.iter().product();
        let values: Vec<f32> = (0..len).map(|_| 0.1 * rng.normal() as f32).collect();
        if !name.ends_with("_proj.weight") {
            dense.insert(name, (shape, values));
            continue;
        }
        let mut weight = Matrix::from_vec(shape[0], shape[1], values).unwrap();
        Hadamard::blocks(weight.cols, BLOCK).unwrap().apply(&mut weight.data);
        let plane = half_integer(&weight, bits, None, RowScale::Rms).unwrap();
        let matrix = QuantizedMatrix::single(plane);
        let measured = Measured::against(&weight, &matrix);
        quantized.insert(name, (matrix, measured));
    }
    let mut sites = BTreeMap::new();
    for site in Site::ALL.into_iter().filter(|s| !s.linears().is_empty()) {
        let size = config.site_size(site);
        let transform = Transform::Hadamard(Hadamard::blocks(size, BLOCK).unwrap());
        let quantizer = ActivationQuantizer::half_integer(size, bits, RowScale::Rms);
        let state = SiteState { transform: Some(transform.into()), quantizer: Some(quantizer) };
        for layer in 0..config.num_layers {
            sites.insert(site.full_name(layer), state.clone());
        }
    }
    PackedModel {
        config,
        base_model: "tiny".into(),
        method: "quest".into(),
        recipe: serde_json::json!({"bits": bits}),
        calibration: serde_json::Value::Null,
        transform: Some("block_hadamard".into()),
        quantized,
        dense,
        sites,
    }
}

#[test]
fn trained_models_multiply_in_integers() {
    const TOKENS: usize = 3;
    for bits in [1, 2, 4, 8] {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("trained-{bits}"));
        std::fs::create_dir_all(&folder).unwrap();
        write_model(&trained(bits), &folder).unwrap();
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let mut layer = DecoderLayer::load(&checkpoint, 1).unwrap();
        let mut plain = layer.clone();
        for name in Site::ALL.iter().flat_map(|s| s.linears()) {
            assert!(layer.linear_mut(name).unwrap().is_integer(), "{name}");
            plain.linear_mut(name).unwrap().without_integers();
        }
        let mut rng = SplitMix64::new(6);
        let mut buffers = LayerBuffers::default();
        let hidden = checkpoint.config.hidden_size;
        for (site, name) in
            [(Site::AttnOutput, "self_attn.o_proj"), (Site::DownInput, "mlp.down_proj")]
        {
            let size = checkpoint.config.site_size(site);
            let mut x: Vec<f32> = (0..TOKENS * size).map(|_| rng.normal() as f32).collect();
            let mut run = |layer: &DecoderLayer| {
                let mut y = vec![0.0; TOKENS * hidden];
                match site {
                    Site::DownInput => layer.mlp_output(&x, &mut buffers, &mut y),
                    _ => layer.attention_output(&x, &mut buffers, &mut y),
                }
                y
            };
            let (integer, values) = (run(&layer), run(&plain));
            layer.sites.quantizer(site).unwrap().fake(&mut x);
            let weight = checkpoint.weight(&format!("model.layers.1.{name}.weight")).unwrap();
            let mut want = vec![0.0; TOKENS * hidden];
            linear(&x, &weight, None, &mut want);
            assert_eq!(values, want);
            for (y, want) in integer.iter().zip(&want) {
                assert!((y - want).abs() < 1e-4 * (1.0 + want.abs()), "{bits} bits: {y} {want}");
            }
        }
    }
}
