//! The Go program as a process: orders go in and events come out, one JSON object a line.

use std::{
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Output, Stdio},
    sync::{
        Arc, Mutex, OnceLock,
        mpsc::{self, Receiver, RecvTimeoutError},
    },
    thread,
    time::Instant,
};

use serde_json::Value;

use crate::support::{LIMIT, skipped};

/// Our schema, which the program compiles itself.
pub(crate) const SCHEMA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/proto/schema/tailnet.proto");

const SOURCE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/foreign/peer");

/// Events that wait for the test; beyond that the program waits.
const QUEUE: usize = 4096;

/// Whether the program can be had; says so loudly where it cannot.
pub(crate) fn has_program(what: &str) -> bool {
    match build() {
        Ok(_) => true,
        Err(why) => {
            skipped(what, why);
            false
        }
    }
}

/// Builds the program, once. The error is why that is not possible here; a program that does not compile is
/// a failure instead.
fn build() -> Result<&'static Path, &'static str> {
    static BUILT: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let build = || {
        // What cannot be fetched is a matter of this machine, what does not compile afterwards is ours.
        let fetched = go(&["mod", "download"]).map_err(|error| format!("go is missing: {error}"))?;
        if !fetched.status.success() {
            let why = String::from_utf8_lossy(&fetched.stderr).trim().replace('\n', "; ");
            return Err(format!("the Go modules cannot be had: {why}"));
        }
        let program = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("foreign").join("peer");
        // The tag lets its client reach relays by websocket, which otherwise only browsers do.
        let built =
            go(&["build", "-tags", "ts_debug_websockets", "-o", program.to_str().unwrap(), "."]).unwrap();
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        Ok(program)
    };
    BUILT.get_or_init(build).as_ref().map(PathBuf::as_path).map_err(String::as_str)
}

fn go(arguments: &[&str]) -> std::io::Result<Output> {
    Command::new("go").args(arguments).current_dir(SOURCE).output()
}

/// Where orders go in.
#[derive(Clone)]
pub(crate) struct Orders(Arc<Mutex<ChildStdin>>);

impl Orders {
    /// Gives an order. The error is that there is nobody any more.
    pub(crate) fn give(&self, order: &Value) -> std::io::Result<()> {
        writeln!(self.0.lock().unwrap(), "{order}")
    }
}

/// One role of the program.
pub(crate) struct Program {
    child: Child,
    orders: Orders,
    heard: Receiver<Value>,
    /// What was heard and not asked for yet.
    unseen: Vec<Value>,
    /// What it said first: its addresses and keys, or why it failed.
    pub(crate) ready: Value,
}

impl Program {
    /// Starts a role and waits until it is ready.
    pub(crate) fn start(role: &str, arguments: &[&str]) -> Self {
        Self::start_overheard(role, arguments, |_| {})
    }

    /// Starts a role whose events somebody else hears too, at once, and waits until it is ready.
    pub(crate) fn start_overheard(
        role: &str,
        arguments: &[&str],
        hear: impl FnMut(&Value) + Send + 'static,
    ) -> Self {
        let program = Self::begin(role, arguments, hear);
        assert_eq!(program.ready["event"], "ready", "{role}: {}", program.ready);
        program
    }

    /// Starts a role that cannot become ready. Returns why.
    pub(crate) fn refused(role: &str, arguments: &[&str]) -> String {
        let program = Self::begin(role, arguments, |_| {});
        assert_eq!(program.ready["event"], "failed", "{role}: {}", program.ready);
        program.ready["error"].as_str().unwrap().to_owned()
    }

    fn begin(role: &str, arguments: &[&str], mut hear: impl FnMut(&Value) + Send + 'static) -> Self {
        let mut child = Command::new(build().unwrap())
            .arg(role)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let orders = Orders(Arc::new(Mutex::new(child.stdin.take().unwrap())));
        let output = child.stdout.take().unwrap();
        let (tell, heard) = mpsc::sync_channel(QUEUE);
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                let event = serde_json::from_str(&line).unwrap_or(Value::String(line));
                hear(&event);
                if tell.send(event).is_err() {
                    return;
                }
            }
        });
        let mut program = Self { child, orders, heard, unseen: Vec::new(), ready: Value::Null };
        program.ready = program.wait(|event| event["event"] == "ready" || event["event"] == "failed");
        program
    }

    /// A text that it was ready with.
    pub(crate) fn said(&self, key: &str) -> &str {
        self.ready[key].as_str().unwrap()
    }

    /// Gives an order.
    pub(crate) fn order(&mut self, order: Value) {
        self.orders.give(&order).unwrap_or_else(|error| panic!("{error}: {order}: {:#?}", self.unseen));
    }

    /// For somebody else who gives orders, too.
    pub(crate) fn orders(&self) -> Orders {
        self.orders.clone()
    }

    /// Waits for an event that nobody has waited for yet; others stay for later.
    pub(crate) fn wait(&mut self, accept: impl Fn(&Value) -> bool) -> Value {
        if let Some(at) = self.unseen.iter().position(&accept) {
            return self.unseen.remove(at);
        }
        let deadline = Instant::now() + LIMIT;
        loop {
            match self.heard.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(event) if accept(&event) => return event,
                Ok(event) => self.unseen.push(event),
                Err(RecvTimeoutError::Timeout) => panic!("waited in vain; it said: {:#?}", self.unseen),
                Err(RecvTimeoutError::Disconnected) => panic!("it has ended; it said: {:#?}", self.unseen),
            }
        }
    }

    /// Waits for an event of a kind.
    pub(crate) fn event(&mut self, kind: &str) -> Value {
        self.wait(|event| event["event"] == kind)
    }

    /// Waits for a message of a call that holds something, given as a JSON pointer. Returns the message.
    pub(crate) fn message(&mut self, rpc: &str, pointer: &str) -> Value {
        let mut event = self.wait(|event| {
            let is_of = event["event"] == "message" && event["rpc"] == rpc;
            is_of && event["message"].pointer(pointer).is_some()
        });
        event["message"].take()
    }

    /// The events of a kind that were heard so far and not asked for yet.
    pub(crate) fn unseen(&mut self, kind: &str) -> Vec<Value> {
        self.unseen.extend(self.heard.try_iter());
        self.unseen.iter().filter(|event| event["event"] == kind).cloned().collect()
    }

    /// Forgets what was heard so far.
    pub(crate) fn forget(&mut self) {
        self.unseen.clear();
        while self.heard.try_recv().is_ok() {}
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
