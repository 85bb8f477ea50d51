//! `--connections-max-per-source=`: how many of the connections one client may have.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex};

use crate::runtime::lock;
use crate::socket::address::{Address, Source};

/// The open connections of each source: an IPv4 address or an IPv6 /64. Other threads decrement the
/// counts.
#[derive(Debug)]
pub struct SourceLimit {
    max: NonZeroU32,
    open: Mutex<HashMap<Source, u32>>,
}

impl SourceLimit {
    pub fn new(max: NonZeroU32) -> Arc<Self> {
        Arc::new(Self { max, open: Mutex::default() })
    }

    /// Whether the source of `client` has as many connections as it may have.
    pub fn is_reached(&self, client: &Address) -> bool {
        let open = client.source().and_then(|source| lock(&self.open).get(&source).copied());
        open.is_some_and(|open| open >= self.max.get())
    }

    /// Counts a connection of `client`. Returns `None` if its source has as many as it may have.
    /// Unix and vsock clients have no source, and no limit.
    pub fn try_acquire(self: &Arc<Self>, client: &Address) -> Option<SourcePermit> {
        self.acquire(client, self.max.get())
    }

    /// Counts a connection that exists, however many its source has.
    pub fn acquire_unchecked(self: &Arc<Self>, client: &Address) -> Option<SourcePermit> {
        self.acquire(client, u32::MAX)
    }

    fn acquire(self: &Arc<Self>, client: &Address, max: u32) -> Option<SourcePermit> {
        let source = client.source();
        if let Some(source) = source {
            let mut open = lock(&self.open);
            let count = open.entry(source).or_insert(0);
            if *count >= max {
                return None;
            }
            *count += 1;
        }
        Some(SourcePermit { limit: Arc::clone(self), source })
    }
}

/// One connection of a source, counted until this is dropped.
#[derive(Debug)]
pub struct SourcePermit {
    limit: Arc<SourceLimit>,
    source: Option<Source>,
}

impl Drop for SourcePermit {
    fn drop(&mut self) {
        let Some(source) = self.source else { return };
        let mut open = lock(&self.limit.open);
        let Some(count) = open.get_mut(&source) else { return };
        *count -= 1;
        if *count == 0 {
            open.remove(&source);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;

    #[test]
    fn sources_are_addresses_and_networks() {
        let limit = SourceLimit::new(NonZeroU32::new(2).unwrap());
        let client = |text: &str| Address::Inet(text.parse::<SocketAddr>().unwrap());
        // Each pair is of one source, and no two pairs are.
        let pairs = [
            ["10.0.0.1:1", "10.0.0.1:2"],
            ["10.0.0.2:1", "[::ffff:10.0.0.2]:1"],
            ["[2001:db8:0:1::1]:1", "[2001:db8:0:1:ffff::2]:1"],
            ["[2001:db8:0:2::1]:1", "[2001:db8:0:2::1]:1"],
            ["[fe80::1%1]:1", "[fe80::1%1]:2"],
            ["[fe80::1%2]:1", "[fe80::1%2]:2"],
            ["[fe80::2%2]:1", "[fe80::2%2]:2"],
        ];
        let open: Vec<_> =
            pairs.iter().flatten().map(|it| limit.try_acquire(&client(it)).unwrap()).collect();
        for pair in pairs {
            assert!(limit.try_acquire(&client(pair[0])).is_none(), "{pair:?}");
        }
        for _ in 0..5 {
            let exempt = [Address::Unnamed, Address::Vsock { cid: 3, port: 1 }];
            assert!(exempt.iter().all(|client| limit.try_acquire(client).is_some()));
        }
        drop(open);
        assert!(lock(&limit.open).is_empty());
    }
}
