//! `seed VECTORS CORPUS` writes the first inputs of every fuzz target: what was recorded from real peers, in
//! the form that the target takes apart.

use std::{
    collections::BTreeMap,
    error::Error,
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;

/// Longer ones would make the corpora large and each execution slow.
const LONGEST: usize = 4096;

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

fn main() -> Outcome {
    let mut arguments = std::env::args_os().skip(1);
    let (Some(vectors), Some(corpus)) = (arguments.next(), arguments.next()) else {
        return Err("usage: seed VECTORS CORPUS".into());
    };
    let seeds = Seeds { vectors: vectors.into(), corpus: corpus.into() };
    seeds.leg_a()?;
    seeds.leg_b()?;
    seeds.control()?;
    seeds.data()?;
    seeds.by_hand()
}

struct Seeds {
    vectors: PathBuf,
    corpus: PathBuf,
}

impl Seeds {
    /// Frames and lines of all transcripts, by who sent them.
    fn leg_a(&self) -> Outcome {
        for file in
            ["header", "frames", "log", "network-settings", "peer-update", "ping", "rpc", "start", "leg-b"]
        {
            for (index, sent) in strings(&self.load("vpn", file)?, "hex").into_iter().enumerate() {
                let name = format!("{file}-{index}");
                if sent.starts_with(b"codervpn") {
                    self.write("header", &name, &[&[role(&sent)], sent.as_slice()].concat())?;
                    continue;
                }
                for kind in 0..4 {
                    self.write(
                        "frame",
                        &format!("{name}-{kind}"),
                        &[&[kind | 0x14], sent.as_slice()].concat(),
                    )?;
                }
            }
        }
        Ok(())
    }

    /// What clients send, as one conversation each.
    fn leg_b(&self) -> Outcome {
        for (index, sent) in strings(&self.load("vpn", "leg-b")?, "hex").into_iter().enumerate() {
            for who in 0..2 {
                let chunk = chunk(&sent);
                let input = [&[1, 0, who, 0, 0], chunk.as_slice(), &[4, 9, 3, 8]].concat();
                self.write("leg_b", &format!("recorded-{index}-{who}"), &input)?;
            }
        }
        Ok(())
    }

    /// What a deployment sends in a call: as bytes of a transport, and as a whole connection.
    fn control(&self) -> Outcome {
        for file in ["coordinate", "derpmap", "drpc", "errors", "resume-token", "workspace-updates", "yamux"]
        {
            let file_vectors = self.load("control", file)?;
            for entry in file_vectors["entries"].as_array().into_iter().flatten() {
                let name = format!("{file}-{}", entry["name"].as_str().unwrap_or_default());
                self.call(&name, entry)?;
            }
        }
        Ok(())
    }

    fn call(&self, name: &str, entry: &Value) -> Outcome {
        let (mut connection, mut streams) = (vec![0_u8], BTreeMap::<u32, Vec<u8>>::new());
        for step in entry["steps"].as_array().into_iter().flatten() {
            let Some(sent) = step["hex"].as_str().filter(|_| step["dir"] == "S").map(hex) else { continue };
            connection.push(1);
            connection.extend(chunk(&sent));
            let mut rest = sent.as_slice();
            while let Some((header, body)) = rest.split_first_chunk::<12>() {
                let [_, kind, _, _, stream @ .., a, b, c, d] = *header;
                let length = if kind == 0 { u32::from_be_bytes([a, b, c, d]) as usize } else { 0 };
                let (data, later) = body.split_at(length.min(body.len()));
                streams.entry(u32::from_be_bytes(stream)).or_default().extend(data);
                rest = later;
            }
        }
        self.write("yamux", name, &connection)?;
        for (stream, bytes) in streams.into_iter().filter(|(_, bytes)| !bytes.is_empty()) {
            self.write("drpc", &format!("{name}-{stream}"), &[&[2], bytes.as_slice()].concat())?;
            // A message behind its header: control byte, two ids, and a length of one or two bytes.
            for (header, kind) in (4..6).flat_map(|header| (0..4).map(move |kind| (header, kind))) {
                let said = chunk(bytes.get(header..).unwrap_or_default());
                let input = [&[kind], said.as_slice()].concat();
                self.write("tailnet", &format!("{name}-{stream}-{header}-{kind}"), &input)?;
            }
            for call in 0..4_u8 {
                let chunk = chunk(&bytes);
                let input = [&[0, 5 | call << 3], chunk.as_slice()].concat();
                self.write("yamux", &format!("{name}-{stream}-{call}"), &input)?;
            }
        }
        Ok(())
    }

    fn data(&self) -> Outcome {
        for vector in self.recorded("derp-frames")? {
            self.write("derp", &vector.name, &[&[2], vector.bytes.as_slice()].concat())?;
        }
        for vector in self.recorded("boxes")?.into_iter().filter(|it| !it.plaintext.is_empty()) {
            self.write("derp", &vector.name, &[&[0x80], vector.plaintext.as_slice()].concat())?;
        }
        for vector in self.recorded("disco")? {
            let is_plain = vector.name.starts_with("parse-");
            self.write("disco", &vector.name, &[&[u8::from(is_plain)], vector.bytes.as_slice()].concat())?;
            self.write(
                "disco",
                &format!("{}-plain", vector.name),
                &[&[1], vector.plaintext.as_slice()].concat(),
            )?;
        }
        for vector in self.recorded("stun")? {
            self.write("stun", &vector.name, &vector.bytes)?;
        }
        for vector in self.recorded("tsmp-icmp")? {
            self.write("tsmp", &vector.name, &[&[0], vector.bytes.as_slice()].concat())?;
            let payload = vector.bytes.get(40..).unwrap_or_default();
            for mode in 1..4 {
                self.write("tsmp", &format!("{}-{mode}", vector.name), &[&[mode], payload].concat())?;
            }
        }
        Ok(())
    }

    /// Where nothing was recorded.
    fn by_hand(&self) -> Outcome {
        self.write("correlator", "calls", &[0, 0, 0, 4, 0, 9, 1, 1, 4, 0, 0, 2, 2, 3, 3])?;
        self.write("drpc", "written", &[0x80, 1, 1, 65, 0, 9, 1, 66, 0x7f, 0xff, 5, 0, 0, 0])?;
        for (name, said) in [("peers", [0x0a, 0]), ("regions", [0x12, 0]), ("deleted", [0x22, 0])] {
            for kind in 0..4 {
                self.write("tailnet", &format!("{name}-{kind}"), &[kind | 62 << 2, 0, 2, said[0], said[1]])?;
            }
        }
        for (name, kind, said) in
            [("snapshot", 0, workspaces()), ("map", 2, relay_map()), ("node", 3, node())]
        {
            self.write("tailnet", name, &[&[kind], chunk(&said).as_slice()].concat())?;
        }
        let all = "metrics_listen = \"[::1]:1\"\nmetrics_per_agent = true\nallow_http_hosts = [\"Dev.Example\"]\n\
                   extra_socket = \"/x\"\nca_file = \"/ca.pem\"\ngroup = \"g\"\n[log]\nformat = \"json\"\nfilter = \"debug\"\n\
                   [tunnel]\nbinary = \"/t\"\nversion = \"2.31.1\"\n";
        self.write("config", "all", all.as_bytes())?;
        for line in all.lines().filter(|line| !line.starts_with('[')) {
            self.write("config", line.split(' ').next().unwrap_or_default(), line.as_bytes())?;
        }
        for (name, text) in [
            ("off", "metrics_listen = \"off\""),
            ("open", "metrics_listen = \"0.0.0.0:9420\""),
            ("xml", "log.format = 'xml'"),
            ("relative", "ca_file = \"ca.pem\""),
            ("host", "allow_http_hosts = [\"http://x/\"]"),
            ("version", "[tunnel]\nversion = \"2.31\""),
        ] {
            self.write("config", name, text.as_bytes())?;
        }
        for (name, url) in [
            ("https", "https://x.example"),
            ("http", "http://dev.example:80/"),
            ("loopback", "http://[::1]:3000"),
            ("clear", "http://x.example"),
            ("odd", "https://x\\@evil.example/"),
            ("other", "ftp://x"),
        ] {
            let start = [&[2, url.len() as u8], url.as_bytes(), &[1, b't', 1, b'n', 1, b'v']].concat();
            self.write("leg_b", name, &[&[0], start.as_slice()].concat())?;
            for who in 0..2 {
                let steps = [&[7, 5], start.as_slice(), &[3, 6, 4, 7, 2, 9]].concat();
                self.write("leg_b", &format!("{name}-{who}"), &[&[1, 0, who], steps.as_slice()].concat())?;
            }
        }
        for (name, stream) in [
            ("data", b"\x82\x05hello\x82\x00\x02\x02he\x80\x03llo".as_slice()),
            ("ping", b"\x89\x02hi\x8a\x00\x82\x01x"),
            ("close", b"\x82\x01x\x88\x02\x03\xe8"),
            ("error", b"\x88\x05\x03\xf3bad"),
            ("text", b"\x81\x02hi"),
            ("long", b"\x82\x7e\x00\x80"),
            ("masked", b"\x82\x81abcdx"),
        ] {
            self.write("websocket", name, &[&[4, 1], stream].concat())?;
        }
        for (name, answer) in [
            ("refusal", "HTTP/1.1 401 Unauthorized\r\nContent-Length: 17\r\n\r\n{\"message\":\"no\"}\n"),
            ("redirect", "HTTP/1.1 307 X\r\nLocation: https://y.example/\r\n\r\n"),
            ("chunked", "HTTP/1.1 500 X\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"),
            ("no-key", "HTTP/1.1 101 X\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n\u{2}\u{1}x"),
        ] {
            self.write("websocket", name, &[&[4, 0], answer.as_bytes()].concat())?;
        }
        Ok(())
    }

    fn load(&self, folder: &str, file: &str) -> Outcome<Value> {
        let path = self.vectors.join(folder).join(file).with_extension("json");
        let text = fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(serde_json::from_slice(&text)?)
    }

    fn recorded(&self, file: &str) -> Outcome<Vec<Recorded>> {
        let text = |value: &Value| value.as_str().map(hex).unwrap_or_default();
        let vectors = self.load("data", file)?;
        let vectors = vectors["vectors"].as_array().into_iter().flatten();
        Ok(vectors
            .map(|vector| Recorded {
                name: format!("{file}-{}", vector["name"].as_str().unwrap_or_default()),
                bytes: text(&vector["bytes"]),
                plaintext: text(&vector["inputs"]["plaintext"]),
            })
            .collect())
    }

    fn write(&self, target: &str, name: &str, input: &[u8]) -> Outcome {
        if input.len() > LONGEST {
            return Ok(());
        }
        let folder: &Path = &self.corpus.join(target);
        fs::create_dir_all(folder)?;
        Ok(fs::write(folder.join(name.replace(['/', ' '], "-")), input)?)
    }
}

struct Recorded {
    name: String,
    bytes: Vec<u8>,
    plaintext: Vec<u8>,
}

/// Every text under this key, wherever it stands.
fn strings(value: &Value, key: &str) -> Vec<Vec<u8>> {
    match value {
        Value::Object(members) => {
            let own = members.get(key).and_then(Value::as_str).map(hex);
            own.into_iter().chain(members.values().flat_map(|member| strings(member, key))).collect()
        }
        Value::Array(items) => items.iter().flat_map(|item| strings(item, key)).collect(),
        _ => Vec::new(),
    }
}

fn role(line: &[u8]) -> u8 {
    let roles = ["manager", "tunnel", "service", "client"];
    let role = line.split(|byte| *byte == b' ').nth(1).unwrap_or_default();
    roles.iter().position(|it| it.as_bytes() == role).unwrap_or(0) as u8
}

/// With the length in front that targets read.
/// A protobuf field of bytes, of a text or of a message; all are short.
fn field(number: u8, value: &[u8]) -> Vec<u8> {
    [&[number << 3 | 2, value.len() as u8], value].concat()
}

/// A workspace with an agent.
fn workspaces() -> Vec<u8> {
    let (workspace, agent) = ([1; 16], [2; 16]);
    let named = |id: &[u8], name: &str| [field(1, id), field(2, name.as_bytes())].concat();
    let agent = [named(&agent, "main"), field(3, &workspace)].concat();
    [field(1, &named(&workspace, "dev")), field(2, &agent)].concat()
}

/// A region with a relay and a STUN server.
fn relay_map() -> Vec<u8> {
    let relay =
        [field(1, b"1a"), field(3, b"relay.example"), field(5, b"192.0.2.1"), field(6, b"none")].concat();
    let stun =
        [field(1, b"1b"), field(3, b"stun.example"), vec![8 << 3, 1], field(12, b"2001:db8::1")].concat();
    let region =
        [vec![1 << 3, 1], field(3, b"one"), field(4, b"One"), field(6, &relay), field(6, &stun)].concat();
    field(2, &[vec![1 << 3, 1], field(2, &region)].concat())
}

/// A peer that says where it is.
fn node() -> Vec<u8> {
    let disco = format!("discokey:{}", "11".repeat(32));
    let address = b"fd60:627a:a42b::1/128";
    let node = [
        vec![1 << 3, 7],
        field(3, &[b"np".as_slice(), &[0x22; 32]].concat()),
        field(4, disco.as_bytes()),
        vec![5 << 3, 1],
        field(8, address),
        field(9, address),
        field(10, b"192.0.2.1:41641"),
        field(10, b"[2001:db8::1]:1"),
    ]
    .concat();
    // Longer than one byte tells.
    let node = [&[2 << 3 | 2, node.len() as u8 | 0x80, (node.len() >> 7) as u8], node.as_slice()].concat();
    let update = [field(1, &[3; 16]), node, vec![3 << 3, 1]].concat();
    [&[1 << 3 | 2, update.len() as u8 | 0x80, (update.len() >> 7) as u8], update.as_slice()].concat()
}

fn chunk(bytes: &[u8]) -> Vec<u8> {
    let length = u16::try_from(bytes.len()).unwrap_or(u16::MAX).to_be_bytes();
    [length.as_slice(), bytes].concat()
}

fn hex(digits: &str) -> Vec<u8> {
    let digit = |byte: u8| char::from(byte).to_digit(16).unwrap_or(0) as u8;
    digits
        .as_bytes()
        .chunks(2)
        .map(|pair| digit(pair[0]) << 4 | pair.get(1).map_or(0, |byte| digit(*byte)))
        .collect()
}
