//! How an input is taken apart. What is missing at its end is empty, or zero.

/// The rest of an input.
#[derive(Debug, Clone, Copy)]
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    /// The whole input.
    pub fn new(data: &'a [u8]) -> Self {
        Self(data)
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// One byte.
    pub fn byte(&mut self) -> u8 {
        self.0.split_off_first().copied().unwrap_or_default()
    }

    /// A number of two bytes.
    pub fn number(&mut self) -> usize {
        usize::from(u16::from_be_bytes([self.byte(), self.byte()]))
    }

    /// As many bytes, or as many as there are.
    pub fn bytes(&mut self, length: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(length.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// Bytes behind their length of two bytes.
    pub fn chunk(&mut self) -> &'a [u8] {
        let length = self.number();
        self.bytes(length)
    }

    /// Bytes behind their length of one byte, as a text.
    pub fn text(&mut self) -> String {
        let length = usize::from(self.byte());
        String::from_utf8_lossy(self.bytes(length)).into_owned()
    }

    /// All that is left.
    pub fn rest(self) -> &'a [u8] {
        self.0
    }
}

/// The lengths of the pieces in which a stream comes: always single bytes, or anything up to a limit.
pub fn lengths(seed: u8) -> impl FnMut() -> usize {
    let most = [1, 8, 64, 4096][usize::from(seed & 3)];
    let mut state = u32::from(seed) | 0x100;
    move || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        1 + state as usize % most
    }
}
