//! Decoding: nothing is allocated per token, sequences that advance together are what each is by
//! itself, f16 caches are near f32 ones, and every instruction set agrees.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use anybit::runtime::{BatchSession, Decoder, PlainType, Session};
use common::{Lab, some_tokens};

/// The system's allocator, counting.
struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: the system's allocator, called with what came in.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: by the caller's contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: by the caller's contract.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const QUICK: &str = "--calib calib.txt --calib-tokens 128 --seqlen 32 --grad-tokens 64 \
                     --report-tokens 0";

/// What kernels have a way of their own for.
const MODELS: &[(&str, &str)] = &[
    ("rtn-3", "--method rtn --bits 3 --group-size -1 --embed-bits 8"),
    ("rtn-4", "--method rtn --bits 4 --group-size 32 --asym"),
    ("skim", "--method skim --bits 2.6 --set fold=false"),
    ("squeezellm", "--method squeezellm --bits 3 --set outliers=0.01"),
    ("kv", "--method rtn --bits 4 --group-size 32 --kv-bits 4"),
    ("w4a4kv4", "--transform quarot --method rtn --bits 4 --a-bits 4 --kv-bits 4"),
];

fn step(session: &mut Session<'_>, token: u32) -> Vec<f32> {
    session.step(&[token]).unwrap().to_vec()
}

// One test: the count is the process's.
#[test]
fn nothing_is_allocated_and_sequences_do_not_see_each_other() {
    let lab = Lab::with_tiny();
    for (name, options) in MODELS {
        lab.ok(&format!("quantize tiny {options} {QUICK} --out {name}"));
    }
    for name in MODELS.iter().map(|m| m.0).chain(["tiny"]) {
        let decoder = Decoder::load(&lab.open(name), 64).unwrap();
        let vocab = decoder.config.vocab_size;
        let tokens = some_tokens(40, vocab);
        // Sequences of different lengths, one after the other.
        let starts = [9, 3, 6];
        let mut alone = Vec::new();
        for start in starts {
            let mut session = Session::with_cache(&decoder, 64, PlainType::F16);
            session.step(&tokens[..start]).unwrap();
            let steps: Vec<Vec<f32>> =
                (0..12).map(|i| step(&mut session, tokens[start + i])).collect();
            let before = ALLOCATIONS.load(Ordering::Relaxed);
            for token in &tokens[start + 12..start + 24] {
                session.step(&[*token]).unwrap();
            }
            assert_eq!(ALLOCATIONS.load(Ordering::Relaxed), before, "{name}: one sequence");
            alone.push(steps);
        }
        let mut batch = BatchSession::new(&decoder, starts.len(), 64, PlainType::F16);
        for (index, start) in starts.iter().enumerate() {
            batch.read(index, &tokens[..*start]).unwrap();
        }
        for i in 0..12 {
            let next = starts.map(|start| tokens[start + i]);
            let logits = batch.step(&next).unwrap();
            for (logits, alone) in logits.chunks_exact(vocab).zip(&alone) {
                assert_eq!(logits, alone[i], "{name}: together and alone differ");
            }
        }
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        for i in 12..24 {
            batch.step(&starts.map(|start| tokens[start + i])).unwrap();
        }
        assert_eq!(ALLOCATIONS.load(Ordering::Relaxed), before, "{name}: sequences together");

        let mut exact = Session::new(&decoder, 64);
        exact.step(&tokens[..starts[0]]).unwrap();
        let largest = |v: &[f32]| v.iter().fold(0f32, |m, x| m.max(x.abs()));
        for (i, half) in alone[0].iter().enumerate() {
            let full = step(&mut exact, tokens[starts[0] + i]);
            let gap: Vec<f32> = full.iter().zip(half).map(|(a, b)| a - b).collect();
            assert!(largest(&gap) <= 5e-3 * largest(&full), "{name}: {}", largest(&gap));
        }
        // What kernels compute is what the decoded weights give.
        let mut plain = Decoder::load(&lab.open(name), 64).unwrap();
        for layer in &mut plain.layers {
            for linear in ["q", "k", "v", "o"].map(|l| format!("self_attn.{l}_proj")) {
                layer.linear_mut(&linear).unwrap().without_integers();
            }
            for linear in ["gate", "up", "down"].map(|l| format!("mlp.{l}_proj")) {
                layer.linear_mut(&linear).unwrap().without_integers();
            }
        }
        let (mut a, mut b) = (Session::new(&decoder, 64), Session::new(&plain, 64));
        for token in &tokens[..8] {
            let (a, b) = (step(&mut a, *token), step(&mut b, *token));
            let gap: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a - b).collect();
            // Kernels hold centroids in twelve bits of the largest; a code of an activation or of
            // the cache may fall on the other side of a step.
            let bound = match name {
                "skim" | "squeezellm" => 5e-3,
                "kv" | "w4a4kv4" => 3e-2,
                _ => 1e-3,
            };
            assert!(largest(&gap) <= bound * largest(&b), "{name}: {}", largest(&gap));
        }
    }
    for isa in ["scalar", "avx2"] {
        let run = |isa: &str| {
            let mut command = lab.command("generate rtn-4 --raw --prompt abc -n 8 --json -");
            command.env("ANYBIT_ISA", isa);
            let out = command.output().unwrap();
            assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
            let json: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
            json["tokens"].clone()
        };
        if anybit::kernels::isa::Isa::available().any(|own| own.name() == isa) {
            assert_eq!(run(isa), run("scalar"), "{isa}");
        }
    }
    let mut command = lab.command("generate tiny --raw --prompt abc");
    let out = command.env("ANYBIT_ISA", "mmx").output().unwrap();
    assert_eq!(out.status.code(), Some(2), "{out:?}");
}
