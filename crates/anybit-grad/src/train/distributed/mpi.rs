//! Processes that an MPI launcher started (`mpirun -n N`). When one of them dies, the launcher ends
//! the others; one that meets an error of its own says so and ends all with `MPI_Abort`, and so
//! does one that panics.
//!
//! MPI's own errors end the job, which is its default: rsmpi drops the return codes of collective
//! calls, so that a handler that returns errors would leave garbage in a sum unnoticed.

use mpi::environment::Universe;
use mpi::traits::{Communicator as _, CommunicatorCollectives as _};

use super::{CommunicationError, Communicator, Result};

/// One of them. MPI ends when it is dropped.
pub struct Mpi {
    universe: Universe,
}

impl Mpi {
    /// Starts MPI.
    ///
    /// # Errors
    /// It was started before in this process, or has no support for programs with threads.
    pub fn start() -> Result<Self> {
        // Only the thread that trains communicates.
        let started = mpi::initialize_with_threading(mpi::Threading::Funneled);
        let (universe, provided) =
            started.ok_or_else(|| CommunicationError::Start("it runs already".into()))?;
        if provided < mpi::Threading::Funneled {
            let what = "it was built without support for threads; use another MPI library";
            return Err(CommunicationError::Start(what.into()));
        }
        Ok(Self { universe })
    }
}

impl Drop for Mpi {
    fn drop(&mut self) {
        // Dropping the universe finalizes MPI, which waits for ranks that wait for this one.
        if std::thread::panicking() {
            self.abort("it panicked; see the message above");
        }
    }
}

impl Communicator for Mpi {
    fn rank(&self) -> usize {
        self.universe.world().rank() as usize
    }

    fn size(&self) -> usize {
        self.universe.world().size() as usize
    }

    fn gather(&mut self, bytes: &[u8]) -> Result<Vec<u8>> {
        let world = self.universe.world();
        let mut all = vec![0u8; bytes.len() * world.size() as usize];
        world.all_gather_into(bytes, &mut all[..]);
        Ok(all)
    }

    fn abort(&mut self, message: &str) {
        eprintln!("error on rank {}: {message}", self.rank());
        self.universe.world().abort(1);
    }
}
