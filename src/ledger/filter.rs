//! Which chunks certainly have no record: one byte per place, so that the free of a chunk that nobody follows is over
//! after one look.

/// Neighbouring chunks share a cache line of the filter, as they do one of the heap.
pub const PLACES: usize = 1 << 16;
/// No two chunks begin within this power of two: it is the size of the smallest with its header.
pub const GRAIN: u32 = 4;

/// How many followed chunks lie at each place, as far as a byte can count.
pub struct Filter(pub [u8; PLACES]);

impl Filter {
    pub const fn new() -> Self {
        Filter([0; PLACES])
    }

    #[inline]
    fn place(&mut self, address: u64) -> &mut u8 {
        &mut self.0[(address >> GRAIN) as usize % PLACES]
    }

    #[inline]
    pub fn add(&mut self, address: u64) {
        let place = self.place(address);
        *place = place.saturating_add(1);
    }

    /// A full byte has lost count and stays.
    #[inline]
    pub fn remove(&mut self, address: u64) {
        let place = self.place(address);
        *place -= (*place != u8::MAX) as u8;
    }

    /// What the hook's entries ask by themselves.
    #[cfg(test)]
    pub fn may_have(&self, address: u64) -> bool {
        self.0[(address >> GRAIN) as usize % PLACES] != 0
    }

    pub fn clear(&mut self) {
        self.0.fill(0);
    }
}
