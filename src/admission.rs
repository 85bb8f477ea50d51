//! Who may come in: the exact cap, and the count that everything else looks at.
//!
//! A [`Permit`] lives from accept to close, so that connections still being dialled count. Counting
//! is dropping; publishing is one watch, which feeds the idle timer and `STATUS=`.

#![forbid(unsafe_code)]

use std::num::NonZeroU32;

use tokio::sync::watch;

/// Connections now and so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Open or being dialled.
    pub open: u32,
    /// Over.
    pub served: u64,
    /// Closed at the cap.
    pub refused: u64,
}

/// The cap on connections.
#[derive(Clone, Debug)]
pub struct Admission {
    max: NonZeroU32,
    load: watch::Sender<Load>,
}

/// One connection's place under the cap.
#[derive(Debug)]
pub struct Permit(watch::Sender<Load>);

impl Admission {
    /// Admits at most `max` connections at a time.
    pub fn new(max: NonZeroU32) -> Self {
        Self { max, load: watch::Sender::default() }
    }

    /// A place for a newcomer, or `None` at the cap.
    pub fn admit(&self) -> Option<Permit> {
        let mut admitted = false;
        self.load.send_modify(|load| {
            admitted = load.open < self.max.get();
            if admitted {
                load.open += 1;
            } else {
                load.refused += 1;
            }
        });
        admitted.then(|| Permit(self.load.clone()))
    }

    /// The cap.
    pub fn max(&self) -> NonZeroU32 {
        self.max
    }

    /// To see the load and wait for it to change.
    pub fn watch(&self) -> watch::Receiver<Load> {
        self.load.subscribe()
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.send_modify(|load| {
            load.open -= 1;
            load.served += 1;
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cap_is_exact() {
        let admission = Admission::new(NonZeroU32::new(2).unwrap());
        let first = admission.admit().unwrap();
        let _second = admission.admit().unwrap();
        assert!(admission.admit().is_none());
        drop(first);
        let _third = admission.admit().unwrap();
        assert!(admission.admit().is_none());
        let load = *admission.watch().borrow();
        assert_eq!((load.open, load.served, load.refused), (2, 1, 2));
    }
}
