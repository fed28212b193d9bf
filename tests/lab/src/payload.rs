//! The bytes that agents hand out and the checksum of the bytes they take in, so that both ends of a
//! transfer can check it without a cryptographic hash's cost.
//!
//! The stream is an endless sequence of 64-bit words, little endian; word *n* is SplitMix64's output for
//! state *n*. The checksum is 64-bit FNV-1a over words instead of bytes: a transfer's last word is filled
//! up with zeros. Neither is secret or strong; both notice lost, repeated and swapped pieces.

const WORD: usize = 8;
const FNV_BASIS: u64 = 0xcbf2_9ce4_8422_2325;
const FNV_PRIME: u64 = 0x0000_0100_0000_01b3;

/// Writes what stands at `offset` of the stream.
pub fn fill(offset: u64, buffer: &mut [u8]) {
    let mut index = offset / WORD as u64;
    let begun = (offset % WORD as u64) as usize;
    let head = if begun == 0 { 0 } else { (WORD - begun).min(buffer.len()) };
    let (head, rest) = buffer.split_at_mut(head);
    if !head.is_empty() {
        copy(head, word(index).iter().skip(begun));
        index += 1;
    }
    let (words, tail) = rest.as_chunks_mut::<WORD>();
    for to in words {
        *to = word(index);
        index += 1;
    }
    copy(tail, word(index).iter());
}

fn copy<'a>(to: &mut [u8], from: impl Iterator<Item = &'a u8>) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
}

/// The checksum of the stream's first `length` bytes.
#[must_use]
pub fn checksum(length: u64) -> u64 {
    let mut sum = Checksum::default();
    let (mut offset, mut buffer) = (0, vec![0; 64 * 1024]);
    while offset < length {
        let part = (length - offset).min(buffer.len() as u64);
        buffer.truncate(part as usize);
        fill(offset, &mut buffer);
        sum.update(&buffer);
        offset += part;
    }
    sum.finish()
}

const fn word(index: u64) -> [u8; WORD] {
    let mut z = index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z ^ (z >> 31)).to_le_bytes()
}

/// The checksum of bytes that come in pieces of any size.
#[derive(Clone, Debug)]
pub struct Checksum {
    state: u64,
    partial: [u8; WORD],
    filled: usize,
}

impl Default for Checksum {
    fn default() -> Self {
        Self { state: FNV_BASIS, partial: [0; WORD], filled: 0 }
    }
}

impl Checksum {
    /// Takes the next bytes.
    pub fn update(&mut self, mut bytes: &[u8]) {
        if self.filled > 0 {
            let (now, later) = bytes.split_at(bytes.len().min(WORD - self.filled));
            for (to, from) in self.partial.iter_mut().skip(self.filled).zip(now) {
                *to = *from;
            }
            self.filled += now.len();
            bytes = later;
            if self.filled < WORD {
                return;
            }
            self.mix(self.partial);
            self.filled = 0;
        }
        let (words, tail) = bytes.as_chunks::<WORD>();
        words.iter().for_each(|word| self.mix(*word));
        self.partial = [0; WORD];
        for (to, from) in self.partial.iter_mut().zip(tail) {
            *to = *from;
        }
        self.filled = tail.len();
    }

    /// The checksum of everything so far.
    #[must_use]
    pub fn finish(&self) -> u64 {
        let mut last = self.clone();
        if last.filled > 0 {
            last.partial.iter_mut().skip(last.filled).for_each(|byte| *byte = 0);
            last.mix(last.partial);
        }
        last.state
    }

    fn mix(&mut self, word: [u8; WORD]) {
        self.state = (self.state ^ u64::from_le_bytes(word)).wrapping_mul(FNV_PRIME);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stream_is_the_same_in_whatever_pieces_it_is_taken() {
        let mut whole = vec![0; 1000];
        fill(0, &mut whole);
        for start in [0, 1, 7, 8, 9, 100] {
            for length in [0, 1, 5, 8, 13, 64, 500] {
                let mut piece = vec![0; length];
                fill(start as u64, &mut piece);
                assert_eq!(piece, whole[start..start + length], "{start} {length}");
            }
        }
    }

    #[test]
    fn the_checksum_is_the_same_in_whatever_pieces_it_is_taken() {
        let mut whole = vec![0; 1003];
        fill(0, &mut whole);
        for step in [1, 3, 8, 11, 500, 1003] {
            let mut sum = Checksum::default();
            whole.chunks(step).for_each(|piece| sum.update(piece));
            assert_eq!(sum.finish(), checksum(1003), "{step}");
        }
    }

    #[test]
    fn the_checksum_notices_order_and_length() {
        let sum = |bytes: &[u8]| {
            let mut sum = Checksum::default();
            sum.update(bytes);
            sum.finish()
        };
        assert_ne!(sum(b"aaaaaaaabbbbbbbb"), sum(b"bbbbbbbbaaaaaaaa"));
        assert_ne!(checksum(1000), checksum(1001));
        assert_eq!(sum(b""), FNV_BASIS);
    }
}
