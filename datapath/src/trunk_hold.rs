//! Messages from other nodes that wait for room in the ring of their receiver, one queue for each node.
//!
//! Their senders have long gone on, so the switch keeps them here and not in the sender's ring. While anything of a node waits, all
//! that comes after it from there waits behind it: the order of each sender is kept (D11), and gaps stand where they belong (D12).

use std::collections::VecDeque;
use std::os::fd::OwnedFd;

use crate::endpoint::{Charge, Gap, Ref, RefMap};
use crate::trunk_in::Credit;

/// Bytes of multicasts that wait in one queue before they become gaps.
const CAST_BYTES: u64 = 256 << 10;

/// What waits.
pub enum Item {
    /// A finished record.
    Record {
        /// Its bytes.
        bytes: Vec<u8>,
        /// What it costs.
        charge: Charge,
        /// What its sender gets back when it is in the ring.
        credit: Option<Credit>,
        /// Its body, if that is not inside.
        body: Option<OwnedFd>,
    },
    /// Messages that are missing.
    Gap {
        /// Their sender.
        of: Ref,
        /// Which.
        gap: Gap,
    },
}

/// What waits of one node.
struct Queue {
    trunk: Ref,
    items: VecDeque<Item>,
    popped: u64,
    gap_of: RefMap<u64>,
    cast_bytes: u64,
}

/// What waits for one endpoint.
#[derive(Default)]
pub struct Holds {
    queues: Vec<Queue>,
    bytes: u64,
}

impl Holds {
    /// Bytes of the records that wait.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// How much waits.
    #[must_use]
    pub fn len(&self) -> usize {
        self.queues.iter().map(|q| q.items.len()).sum()
    }

    /// Whether nothing waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.queues.is_empty()
    }

    /// Whether something of this node waits.
    #[must_use]
    pub fn has(&self, trunk: Ref) -> bool {
        self.queues.iter().any(|q| q.trunk == trunk)
    }

    fn queue(&mut self, trunk: Ref) -> &mut Queue {
        let at = self.queues.iter().position(|q| q.trunk == trunk);
        let at = at.unwrap_or_else(|| {
            self.queues.push(Queue {
                trunk,
                items: VecDeque::new(),
                popped: 0,
                gap_of: RefMap::default(),
                cast_bytes: 0,
            });
            self.queues.len() - 1
        });
        &mut self.queues[at]
    }

    /// Puts a record behind what waits of this node.
    pub fn push(
        &mut self,
        trunk: Ref,
        bytes: Vec<u8>,
        charge: Charge,
        credit: Option<Credit>,
        body: Option<OwnedFd>,
    ) {
        let len = bytes.len() as u64;
        self.bytes += len;
        let queue = self.queue(trunk);
        // What its sender says from now on comes after this record, and so does the gap if some of it is missed.
        queue.gap_of.remove(&charge.sender);
        if !charge.told {
            queue.cast_bytes += len;
        }
        queue.items.push_back(Item::Record {
            bytes,
            charge,
            credit,
            body,
        });
    }

    /// Whether one more multicast of so many bytes may wait.
    #[must_use]
    pub fn takes_cast(&self, trunk: Ref, bytes: u64) -> bool {
        let queue = self.queues.iter().find(|q| q.trunk == trunk);
        queue.map_or(0, |q| q.cast_bytes) + bytes <= CAST_BYTES
    }

    /// Notes that messages are missing behind what waits of this node.
    pub fn miss(&mut self, trunk: Ref, of: Ref, gap: Gap) {
        let queue = self.queue(trunk);
        if let Some(at) = queue.gap_of.get(&of)
            && let Some(Item::Gap { gap: known, .. }) =
                queue.items.get_mut((at - queue.popped) as usize)
        {
            known.extend(&gap);
            return;
        }
        queue
            .gap_of
            .insert(of, queue.popped + queue.items.len() as u64);
        queue.items.push_back(Item::Gap { of, gap });
    }

    /// How many nodes something waits of.
    #[must_use]
    pub fn queue_count(&self) -> usize {
        self.queues.len()
    }

    /// What is next of one of these nodes.
    #[must_use]
    pub fn front(&self, at: usize) -> Option<(Ref, &Item)> {
        let queue = self.queues.get(at)?;
        queue.items.front().map(|item| (queue.trunk, item))
    }

    /// Takes what is next of one of these nodes; with nothing left, the node is forgotten, and another may have its place.
    pub fn pop(&mut self, at: usize) -> Option<(Ref, Item)> {
        let queue = self.queues.get_mut(at)?;
        let item = queue.items.pop_front()?;
        match &item {
            Item::Record { bytes, charge, .. } => {
                self.bytes -= bytes.len() as u64;
                if !charge.told {
                    queue.cast_bytes -= bytes.len() as u64;
                }
            }
            Item::Gap { of, .. } => {
                if queue.gap_of.get(of) == Some(&queue.popped) {
                    queue.gap_of.remove(of);
                }
            }
        }
        queue.popped += 1;
        let trunk = queue.trunk;
        if queue.items.is_empty() {
            self.queues.swap_remove(at);
        }
        Some((trunk, item))
    }

    /// Messages whose senders are told that nobody read them.
    pub fn told(&self) -> impl Iterator<Item = &Charge> {
        let items = self.queues.iter().flat_map(|q| &q.items);
        items.filter_map(|item| match item {
            Item::Record { charge, .. } if charge.told => Some(charge),
            _ => None,
        })
    }
}
