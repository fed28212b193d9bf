//! The protocol's bytes, written a second time from the specification (vpn-protocol 2 to 4), and as strict as the
//! strictest deployed reader.

use std::{
    io::{self, Read, Write},
    sync::mpsc::{self, Receiver, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use prost::Message;

use crate::support::LIMIT;

const MAX_LINE: usize = 255;
/// Messages that wait for the test; beyond that the other end waits.
const QUEUE: usize = 4096;
const MAX_FRAME: u32 = 0x0100_0000;

/// Who speaks first. Neither may have to wait for the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Greeting {
    /// The double writes, and then reads.
    Speaks,
    /// The double reads, and then writes.
    Listens,
}

/// Exchanges the lines. Returns the other's.
pub(crate) fn greet(
    read: &mut impl Read,
    write: &mut impl Write,
    own: &str,
    greeting: Greeting,
) -> io::Result<String> {
    if greeting == Greeting::Speaks {
        write.write_all(own.as_bytes())?;
    }
    let theirs = line(read)?;
    if greeting == Greeting::Listens {
        write.write_all(own.as_bytes())?;
    }
    Ok(theirs)
}

/// One byte at a time: what follows the line is not to be touched.
fn line(read: &mut impl Read) -> io::Result<String> {
    let mut line = Vec::new();
    let mut byte = [0];
    loop {
        read.read_exact(&mut byte)?;
        if byte == *b"\n" {
            return String::from_utf8(line).map_err(io::Error::other);
        }
        line.push(byte[0]);
        if line.len() > MAX_LINE {
            return Err(io::Error::other("a line without an end"));
        }
    }
}

/// Length and payload in two writes, as deployed writers do.
pub(crate) fn put(write: &mut impl Write, message: &impl Message) -> io::Result<()> {
    let payload = message.encode_to_vec();
    write.write_all(&u32::try_from(payload.len()).map_err(io::Error::other)?.to_be_bytes())?;
    write.write_all(&payload)
}

/// The payload of the next frame; `None` at an end between two frames.
pub(crate) fn take(read: &mut impl Read) -> io::Result<Option<Vec<u8>>> {
    let mut prefix = [0; 4];
    if read.read(&mut prefix[..1])? == 0 {
        return Ok(None);
    }
    read.read_exact(&mut prefix[1..])?;
    let length = u32::from_be_bytes(prefix);
    if length == 0 || length > MAX_FRAME {
        return Err(io::Error::other(format!("Received message size {length}")));
    }
    let mut payload = vec![0; length as usize];
    read.read_exact(&mut payload)?;
    Ok(Some(payload))
}

/// What a message is, by its first field: `msg_id` and `response_to`.
pub(crate) type Ids = Option<(u64, u64)>;

/// Reads a payload as the strictest reader does: one kind of content, and ids that make sense.
pub(crate) fn judge(payload: &[u8]) -> Result<Ids, String> {
    let (mut ids, mut contents) = (None, 0);
    for (number, value) in fields(payload)? {
        match number {
            1 if ids.is_some() => return Err("two rpc fields".to_owned()),
            1 => ids = Some(ids_of(value)?),
            _ => contents += 1,
        }
    }
    if contents != 1 {
        return Err(format!("a message with {contents} contents"));
    }
    match ids {
        Some((0, 0)) => Err("an rpc without an id".to_owned()),
        Some((1.., 1..)) => Err("both ids".to_owned()),
        ids => Ok(ids),
    }
}

/// Whether a payload is a message as it must be.
pub(crate) fn is_sound(payload: &[u8]) -> bool {
    judge(payload).is_ok()
}

fn ids_of(rpc: &[u8]) -> Result<(u64, u64), String> {
    let (mut message, mut answered, mut rest) = (0, 0, rpc);
    while !rest.is_empty() {
        let key = varint(&mut rest)?;
        let value = varint(&mut rest)?;
        match key {
            8 => message = value,
            16 => answered = value,
            _ => return Err(format!("key {key} in an rpc")),
        }
    }
    Ok((message, answered))
}

/// The top-level fields; all of them are of a length of their own.
fn fields(payload: &[u8]) -> Result<Vec<(u64, &[u8])>, String> {
    let (mut fields, mut rest) = (Vec::new(), payload);
    while !rest.is_empty() {
        let key = varint(&mut rest)?;
        if key & 7 != 2 {
            return Err(format!("a field of wire type {}", key & 7));
        }
        let length = varint(&mut rest)? as usize;
        let (value, after) = rest.split_at_checked(length).ok_or("a field that is cut off")?;
        fields.push((key >> 3, value));
        rest = after;
    }
    Ok(fields)
}

fn varint(rest: &mut &[u8]) -> Result<u64, String> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (byte, after) = rest.split_first().ok_or("a number that is cut off")?;
        *rest = after;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err("a number without an end".to_owned())
}

/// One message as it came.
#[derive(Debug, Clone)]
pub(crate) struct Heard<In> {
    pub(crate) ids: Ids,
    pub(crate) message: In,
}

/// One end of a connection after its greeting. A thread reads, so that nobody is kept from writing.
pub(crate) struct Peer<In> {
    write: Option<Box<dyn Write + Send>>,
    heard: Receiver<Result<Heard<In>, String>>,
    last_id: u64,
    /// What came while an answer was waited for.
    pub(crate) told: Vec<Heard<In>>,
}

impl<In: Message + Default + std::fmt::Debug + Send + 'static> Peer<In> {
    /// Reads from now on.
    pub(crate) fn new(read: impl Read + Send + 'static, write: impl Write + Send + 'static) -> Self {
        let (tell, heard) = mpsc::sync_channel(QUEUE);
        thread::spawn(move || {
            let mut read = io::BufReader::new(read);
            loop {
                let next = match take(&mut read) {
                    Ok(Some(payload)) => judge(&payload).and_then(|ids| {
                        let message = In::decode(&payload[..]).map_err(|error| error.to_string())?;
                        Ok(Heard { ids, message })
                    }),
                    Ok(None) => return,
                    Err(error) => Err(error.to_string()),
                };
                if tell.send(next).is_err() {
                    return;
                }
            }
        });
        Self { write: Some(Box::new(write)), heard, last_id: 0, told: Vec::new() }
    }

    /// Writes bytes as they are. Returns whether that was possible.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> bool {
        self.write.as_mut().is_some_and(|write| write.write_all(bytes).and_then(|()| write.flush()).is_ok())
    }

    /// The next id of this end.
    pub(crate) fn next_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }

    /// Sends a message as it is.
    pub(crate) fn send(&mut self, message: &impl Message) {
        let mut bytes = Vec::new();
        put(&mut bytes, message).unwrap();
        assert!(self.write(&bytes), "the other end is gone");
    }

    /// The next message; `None` at the end of the connection. A message that breaks the protocol is a failure.
    pub(crate) fn next(&mut self) -> Option<Heard<In>> {
        match self.heard.recv_timeout(LIMIT) {
            Ok(heard) => {
                Some(heard.unwrap_or_else(|defect| panic!("the other end broke the protocol: {defect}")))
            }
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => panic!("nothing came for {LIMIT:?}; before: {:#?}", self.told),
        }
    }

    /// The answer to a request; what comes before it is kept in `told`.
    pub(crate) fn answer_to(&mut self, id: u64) -> In {
        loop {
            let heard =
                self.next().unwrap_or_else(|| panic!("the end, not an answer; before: {:#?}", self.told));
            if heard.ids == Some((0, id)) {
                return heard.message;
            }
            self.told.push(heard);
        }
    }

    /// Whether nothing comes for a while.
    pub(crate) fn is_silent_for(&mut self, span: Duration) -> bool {
        let until = Instant::now() + span;
        match self.heard.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(heard) => {
                self.told.extend(heard);
                false
            }
            Err(RecvTimeoutError::Timeout) => true,
            Err(RecvTimeoutError::Disconnected) => false,
        }
    }

    /// Closes what this end writes to.
    pub(crate) fn close(&mut self) {
        self.write = None;
    }
}
