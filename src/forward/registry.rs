//! The connections of one event loop. Each is registered for as long as it lives, with a value for whoever
//! visits them all.

use std::cell::{Cell, RefCell};
use std::ops::Deref;
use std::rc::Rc;

/// Who is there. Joining and leaving move nobody but the last.
#[derive(Debug)]
pub struct Registry<T>(RefCell<Vec<Rc<Place<T>>>>);

/// A place in a roster, until this is dropped.
#[derive(Debug)]
pub struct Registration<T> {
    place: Rc<Place<T>>,
    roster: Rc<Registry<T>>,
}

#[derive(Debug)]
struct Place<T> {
    /// Where it stands among all.
    index: Cell<usize>,
    kept: T,
}

impl<T> Default for Registry<T> {
    fn default() -> Self {
        Self(RefCell::default())
    }
}

impl<T> Registry<T> {
    /// One more, who keeps this there.
    pub fn join(self: &Rc<Self>, kept: T) -> Registration<T> {
        let mut places = self.0.borrow_mut();
        let place = Rc::new(Place { index: Cell::new(places.len()), kept });
        places.push(Rc::clone(&place));
        Registration { place, roster: Rc::clone(self) }
    }

    /// Whether nobody is there.
    pub fn is_empty(&self) -> bool {
        self.0.borrow().is_empty()
    }

    /// Goes through what they keep; meanwhile nobody may join or leave.
    pub fn for_each(&self, run: impl FnMut(&T)) {
        self.0.borrow().iter().map(|place| &place.kept).for_each(run);
    }
}

impl<T> Deref for Registration<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.place.kept
    }
}

impl<T> Drop for Registration<T> {
    fn drop(&mut self) {
        let index = self.place.index.get();
        let mut places = self.roster.0.borrow_mut();
        places.swap_remove(index);
        if let Some(moved) = places.get(index) {
            moved.index.set(index);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_leaves_takes_nobody_along() {
        let roster = Rc::new(Registry::default());
        let mut all: Vec<_> = (0..10).map(|number| roster.join(number)).collect();
        let mut left: Vec<_> = (0..10).collect();
        for index in [4, 0, 7, 0, 3] {
            drop(all.remove(index));
            left.remove(index);
            let mut there = Vec::new();
            roster.for_each(|number| there.push(*number));
            there.sort_unstable();
            assert_eq!(there, left);
        }
        drop(all);
        assert!(roster.is_empty());
    }
}
