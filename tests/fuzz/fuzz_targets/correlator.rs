//! The correlator against a model of it, under any order of calls, answers and ends.
#![no_main]

use std::collections::BTreeMap;

use warren_fuzz::Input;
use warren_proto::{
    correlator::{Correlator, Kind, classify},
    vpn::Rpc,
};

warren_fuzz::target!(check);

fn check(data: &[u8]) {
    let mut input = Input::new(data);
    let (mut correlator, mut waiting, mut last) = (Correlator::default(), BTreeMap::new(), 0);
    while !input.is_empty() {
        match input.byte() % 6 {
            0 => {
                let id = correlator.next_id();
                last += 1;
                assert_eq!(id, last, "ids count up");
                correlator.register(id, id);
                waiting.insert(id, id);
            }
            1 => last = correlator.next_id(),
            2 => {
                let id = u64::from(input.byte());
                assert_eq!(correlator.cancel(id), waiting.remove(&id));
            }
            3 => {
                let left: Vec<_> = correlator.drain().collect();
                assert_eq!(left, std::mem::take(&mut waiting).into_values().collect::<Vec<_>>());
            }
            _ => hear(&mut input, &mut correlator, &mut waiting),
        }
        assert_eq!((correlator.len(), correlator.is_empty()), (waiting.len(), waiting.is_empty()));
    }
}

/// A message comes, with any ids.
fn hear(input: &mut Input<'_>, correlator: &mut Correlator<u64>, waiting: &mut BTreeMap<u64, u64>) {
    let flags = input.byte();
    let mut id = |is_wide| {
        if is_wide {
            (0..8).fold(0, |id, _| id << 8 | u64::from(input.byte()))
        } else {
            u64::from(input.byte())
        }
    };
    let rpc = (flags & 1 == 0).then(|| Rpc { msg_id: id(flags & 2 != 0), response_to: id(flags & 4 != 0) });
    match classify(&rpc) {
        Kind::Notification => assert_eq!(rpc, None),
        Kind::Stray => assert_eq!(rpc, Some(Rpc { msg_id: 0, response_to: 0 })),
        Kind::Request(id) => assert_eq!(rpc, Some(Rpc { msg_id: id, response_to: 0 })),
        Kind::Response(id) => {
            assert_eq!(rpc.map(|rpc| rpc.response_to), Some(id));
            assert_eq!(correlator.resolve(id), waiting.remove(&id), "each waiter is given out once");
            assert_eq!(correlator.resolve(id), None);
        }
    }
}
