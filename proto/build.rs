//! Compiles the schemas with protox: no system `protoc` is needed.

use std::{env, path::PathBuf};

const SCHEMAS: &[&str] = &["schema/vpn.proto", "schema/tailnet.proto", "schema/link.proto"];

/// Messages that hold secrets: their `Debug` is written by hand, without the secret.
const SECRET_BEARERS: &[&str] =
    &[".vpn.StartRequest", ".vpn.StartRequest.Header", ".coder.tailnet.v2.RefreshResumeTokenResponse"];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=schema");
    let descriptors = protox::compile(SCHEMAS, ["schema"])?;
    let mut config = prost_build::Config::new();
    config.bytes(["."]).skip_debug(SECRET_BEARERS).btree_map(["."]);
    config.out_dir(PathBuf::from(env::var("OUT_DIR")?));
    config.compile_fds(descriptors)?;
    Ok(())
}
