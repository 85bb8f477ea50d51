//! Pseudo-random numbers, and streams of bytes of which each position can be checked.

/// Numbers that don't repeat soon, the same for the same seed.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(STEP);
        mix(self.0)
    }

    /// A number from 0 to `bound` - 1.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub fn is_one_of(&mut self, bound: u64) -> bool {
        self.below(bound) == 0
    }

    pub fn choose<T: Copy>(&mut self, among: &[T]) -> T {
        among[self.below(among.len() as u64) as usize]
    }
}

/// One direction of a connection. Each position has a byte of its own, so a byte that is lost, doubled
/// or of another stream is found at its place.
#[derive(Clone)]
pub struct Stream {
    seed: u64,
    position: u64,
}

impl Stream {
    pub fn new(seed: u64) -> Self {
        Self { seed: mix(seed), position: 0 }
    }

    pub fn position(&self) -> u64 {
        self.position
    }

    /// Goes on behind so many bytes.
    pub fn skip(&mut self, bytes: u64) {
        self.position += bytes;
    }

    /// Fills `bytes` with the next of the stream.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        let mut rest = bytes;
        while !rest.is_empty() {
            let word = mix(self.seed ^ (self.position / 8).wrapping_mul(STEP)).to_le_bytes();
            let word = &word[(self.position % 8) as usize..];
            let length = word.len().min(rest.len());
            let (now, later) = rest.split_at_mut(length);
            now.copy_from_slice(&word[..length]);
            self.position += length as u64;
            rest = later;
        }
    }

    /// Compares received bytes with the next of the stream.
    pub fn check(&mut self, received: &[u8]) -> Result<(), String> {
        let mut expected = vec![0; received.len()];
        let start = self.position;
        self.fill(&mut expected);
        if expected == received {
            return Ok(());
        }
        let same = expected.iter().zip(received).take_while(|(one, other)| one == other).count();
        let (expected, received) = (excerpt(&expected[same..]), excerpt(&received[same..]));
        Err(format!("byte {} is {received:x?}..., not {expected:x?}...", start + same as u64))
    }
}

/// A test of this module.
pub fn finds_what_is_wrong() {
    let mut sent = vec![0; 1000];
    Stream::new(1).fill(&mut sent);
    let check = |received: &[u8]| {
        let mut stream = Stream::new(1);
        received.chunks(7).try_for_each(|piece| stream.check(piece))
    };
    assert_eq!(check(&sent), Ok(()));
    let without_one = [&sent[..500], &sent[501..]].concat();
    let with_one_twice = [&sent[..501], &sent[500..]].concat();
    let mut with_another = sent.clone();
    Stream::new(2).fill(&mut with_another[500..510]);
    for received in [without_one, with_one_twice, with_another] {
        let failure = check(&received).unwrap_err();
        assert!(failure.starts_with("byte 50"), "{failure}");
    }
}

fn excerpt(bytes: &[u8]) -> &[u8] {
    &bytes[..bytes.len().min(8)]
}

/// The finalizer of SplitMix64.
pub fn mix(number: u64) -> u64 {
    let number = (number ^ (number >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    number ^ (number >> 31)
}

/// The increment of SplitMix64.
const STEP: u64 = 0x9E37_79B9_7F4A_7C15;
