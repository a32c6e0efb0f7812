//! Several processes that train one model: each takes its part of the batch, gradients are summed.
//!
//! [`Communicator`] is what the trainer needs of them: [`Alone`] for one process, [`ThreadRank`]
//! for threads of one (tests), `Mpi` for processes that an MPI launcher started (feature `mpi`).
//! A sum gathers every rank's values and adds them in the order of the ranks, in f64, so that every
//! rank has the same bits and a fixed number of ranks always gives the same; the cost is that each
//! rank receives the values of all.

mod alone;
#[cfg(feature = "mpi")]
mod mpi;
mod threads;

pub use alone::Alone;
#[cfg(feature = "mpi")]
pub use mpi::Mpi;
pub use threads::{ThreadGroup, ThreadRank};

/// Values of a gradient that are summed at a time (4 MiB).
const BUCKET: usize = 1 << 20;

/// What can go wrong between processes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CommunicationError {
    /// A rank ended while others waited for it.
    #[error("rank {rank} ended before the others; see its own message, then go on with --resume")]
    RankLost {
        /// The rank.
        rank: usize,
    },
    /// Ranks do not have the same input.
    #[error("{what} differs on ranks {ranks:?} from that of rank 0: give all ranks the same files")]
    Differs {
        /// What was compared.
        what: String,
        /// The ranks that differ.
        ranks: Vec<usize>,
    },
    /// MPI could not be started.
    #[error("MPI does not start: {0}")]
    Start(String),
}

/// A result of communication.
pub type Result<T> = std::result::Result<T, CommunicationError>;

/// One process of several that do the same at the same time. Every method is called by all ranks in
/// the same order.
pub trait Communicator {
    /// Which one this is, from 0.
    fn rank(&self) -> usize;

    /// How many there are.
    fn size(&self) -> usize;

    /// What every rank gave, in the order of the ranks, one after another.
    ///
    /// # Errors
    /// [`CommunicationError::RankLost`].
    fn gather(&mut self, bytes: &[u8]) -> Result<Vec<u8>>;

    /// Ends all ranks after an error of this one that the others cannot know of.
    fn abort(&mut self, message: &str);

    /// Waits for all.
    ///
    /// # Errors
    /// [`CommunicationError::RankLost`].
    fn barrier(&mut self) -> Result<()> {
        self.gather(&[0]).map(|_| ())
    }
}

/// Replaces `values` by their sums over the ranks.
///
/// # Errors
/// [`CommunicationError::RankLost`].
pub fn sum_f64(comm: &mut dyn Communicator, values: &mut [f64]) -> Result<()> {
    let all = comm.gather(bytemuck::cast_slice(values))?;
    assert_eq!(
        all.len(),
        comm.size() * size_of_val(values),
        "ranks sum different numbers of values"
    );
    let mut sums = vec![0f64; values.len()];
    for (i, bytes) in all.chunks_exact(8).enumerate() {
        sums[i % values.len()] += bytemuck::pod_read_unaligned::<f64>(bytes);
    }
    values.copy_from_slice(&sums);
    Ok(())
}

/// Replaces the gradients by their sums over the ranks.
///
/// # Errors
/// [`CommunicationError::RankLost`].
pub fn sum_gradients(comm: &mut dyn Communicator, grads: &mut [Vec<f32>]) -> Result<()> {
    if comm.size() == 1 {
        return Ok(());
    }
    let mut bucket = Vec::with_capacity(BUCKET);
    let total: usize = grads.iter().map(Vec::len).sum();
    let (mut read, mut written) = ((0, 0), (0, 0));
    let mut done = 0;
    while done < total {
        bucket.clear();
        walk(grads, &mut read, BUCKET.min(total - done), |part| bucket.extend_from_slice(part));
        let all = comm.gather(bytemuck::cast_slice(&bucket))?;
        let own = bucket.len();
        assert_eq!(all.len(), comm.size() * own * 4, "ranks have gradients of different sizes");
        let mut sums = vec![0f64; own];
        for (i, bytes) in all.chunks_exact(4).enumerate() {
            sums[i % own] += f64::from(bytemuck::pod_read_unaligned::<f32>(bytes));
        }
        let mut rest = sums.iter();
        walk(grads, &mut written, own, |part| {
            part.iter_mut().zip(&mut rest).for_each(|(value, sum)| *value = *sum as f32);
        });
        done += own;
    }
    Ok(())
}

/// Hands out the next `count` values of `grads` from `at` on, in pieces, and moves `at`.
fn walk(
    grads: &mut [Vec<f32>],
    at: &mut (usize, usize),
    mut count: usize,
    mut piece: impl FnMut(&mut [f32]),
) {
    while count > 0 {
        let grad = &mut grads[at.0];
        let len = count.min(grad.len() - at.1);
        piece(&mut grad[at.1..at.1 + len]);
        count -= len;
        at.1 += len;
        if at.1 == grad.len() {
            *at = (at.0 + 1, 0);
        }
    }
}

/// Checks that all ranks have the same `hash` of `what`.
///
/// # Errors
/// [`CommunicationError::Differs`] on every rank; [`CommunicationError::RankLost`].
pub fn same_everywhere(comm: &mut dyn Communicator, what: &str, hash: [u8; 32]) -> Result<()> {
    let all = comm.gather(&hash)?;
    let hashes: Vec<&[u8]> = all.chunks_exact(32).collect();
    let differ = |rank: &usize| hashes[*rank] != hashes[0];
    let ranks: Vec<usize> = (0..hashes.len()).filter(differ).collect();
    match ranks.is_empty() {
        true => Ok(()),
        false => Err(CommunicationError::Differs { what: what.into(), ranks }),
    }
}

/// Whether an MPI launcher started this process.
pub fn launched() -> bool {
    ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"].iter().any(|name| std::env::var_os(name).is_some())
}
