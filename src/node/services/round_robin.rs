//! Handlers that take turns.

/// Items that are served in turn, in the order in which they were added.
#[derive(Debug)]
pub(crate) struct RoundRobin<T> {
    items: Vec<T>,
    next: usize,
}

impl<T: Clone> RoundRobin<T> {
    pub(crate) fn new(first: T) -> Self {
        Self {
            items: vec![first],
            next: 0,
        }
    }

    pub(crate) fn push(&mut self, item: T) {
        self.items.push(item);
    }

    /// Returns all items, starting with the one whose turn it is, and moves on to the next.
    pub(crate) fn turn(&mut self) -> Vec<T> {
        let (before, from) = self.items.split_at(self.next);
        let items = from.iter().chain(before).cloned().collect();
        self.next = (self.next + 1) % self.items.len().max(1);
        items
    }

    /// Removes the first item for which `found` returns true; returns whether there was one.
    pub(crate) fn remove(&mut self, found: impl Fn(&T) -> bool) -> bool {
        let Some(index) = self.items.iter().position(found) else {
            return false;
        };
        self.items.remove(index);
        if index < self.next {
            self.next -= 1;
        }
        if self.next >= self.items.len() {
            self.next = 0;
        }
        true
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.items.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_take_turns_in_the_order_in_which_they_were_added() {
        let mut items = RoundRobin::new(1);
        items.push(2);
        items.push(3);
        assert_eq!(items.turn(), [1, 2, 3]);
        assert_eq!(items.turn(), [2, 3, 1]);
        assert!(items.remove(|item| *item == 1));
        assert!(!items.remove(|item| *item == 1));
        assert_eq!(items.turn(), [3, 2]);
        assert_eq!(items.turn(), [2, 3]);
        assert!(items.remove(|item| *item == 3));
        assert_eq!(items.turn(), [2]);
        assert!(!items.is_empty());
        assert!(items.remove(|item| *item == 2));
        assert!(items.is_empty());
        assert!(items.turn().is_empty());
    }
}
