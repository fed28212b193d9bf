//! The `decoded` form of the vectors: field names of the schema, bytes as hex, enum names where the schema
//! has one, a field that is absent is absent, a message that is present but empty is `{}`.

use serde_json::{Value, json};
use warren_proto::vpn::{
    self, Agent, LastPing, Log, NetworkSettingsRequest, PeerUpdate, StartRequest, Status, Workspace,
    client_message, manager_message,
    network_settings_request::{
        DnsSettings, IPv4Settings, IPv6Settings, i_pv4_settings::IPv4Route, i_pv6_settings::IPv6Route,
    },
    service_message, tunnel_message,
};

use crate::json::fields;

fn empty<T>(_: &T) -> Value {
    json!({})
}

fn rpc(rpc: &vpn::Rpc) -> Value {
    fields().number("msg_id", rpc.msg_id).number("response_to", rpc.response_to).done()
}

pub(crate) fn manager(message: &vpn::ManagerMessage) -> Value {
    use manager_message::Msg;
    let fields = fields().optional("rpc", &message.rpc, rpc);
    let Some(msg) = &message.msg else { return fields.done() };
    let (name, value) = match msg {
        Msg::GetPeerUpdate(it) => ("get_peer_update", empty(it)),
        Msg::NetworkSettings(it) => ("network_settings", outcome(it.success, &it.error_message)),
        Msg::Start(it) => ("start", start(it)),
        Msg::Stop(it) => ("stop", empty(it)),
        Msg::Wake(it) => ("wake", empty(it)),
    };
    fields.set(name, value).done()
}

pub(crate) fn tunnel(message: &vpn::TunnelMessage) -> Value {
    use tunnel_message::Msg;
    let fields = fields().optional("rpc", &message.rpc, rpc);
    let Some(msg) = &message.msg else { return fields.done() };
    let (name, value) = match msg {
        Msg::Log(it) => ("log", log(it)),
        Msg::PeerUpdate(it) => ("peer_update", peer_update(it)),
        Msg::NetworkSettings(it) => ("network_settings", network_settings(it)),
        Msg::Start(it) => ("start", outcome(it.success, &it.error_message)),
        Msg::Stop(it) => ("stop", outcome(it.success, &it.error_message)),
        Msg::Wake(it) => ("wake", empty(it)),
    };
    fields.set(name, value).done()
}

pub(crate) fn client(message: &vpn::ClientMessage) -> Value {
    use client_message::Msg;
    let fields = fields().optional("rpc", &message.rpc, rpc);
    let Some(msg) = &message.msg else { return fields.done() };
    let (name, value) = match msg {
        Msg::Start(it) => ("start", start(it)),
        Msg::Stop(it) => ("stop", empty(it)),
        Msg::Status(it) => ("status", empty(it)),
    };
    fields.set(name, value).done()
}

pub(crate) fn service(message: &vpn::ServiceMessage) -> Value {
    use service_message::Msg;
    let fields = fields().optional("rpc", &message.rpc, rpc);
    let Some(msg) = &message.msg else { return fields.done() };
    let (name, value) = match msg {
        Msg::Start(it) => ("start", outcome(it.success, &it.error_message)),
        Msg::Stop(it) => ("stop", outcome(it.success, &it.error_message)),
        Msg::Status(it) => ("status", status(it)),
        Msg::StartProgress(it) => ("start_progress", start_progress(it)),
    };
    fields.set(name, value).done()
}

fn outcome(success: bool, error: &str) -> Value {
    fields().flag("success", success).text("error_message", error).done()
}

fn start(start: &StartRequest) -> Value {
    let header =
        |it: &vpn::start_request::Header| fields().text("name", &it.name).text("value", &it.value).done();
    fields()
        .number("tunnel_file_descriptor", start.tunnel_file_descriptor)
        .text("coder_url", &start.coder_url)
        .text("api_token", &start.api_token)
        .list("headers", &start.headers, header)
        .text("device_id", &start.device_id)
        .text("device_os", &start.device_os)
        .text("coder_desktop_version", &start.coder_desktop_version)
        .done()
}

fn status(status: &Status) -> Value {
    let known = vpn::status::Lifecycle::try_from(status.lifecycle).ok().map(|it| it.as_str_name());
    fields()
        .named("lifecycle", status.lifecycle, known)
        .text("error_message", &status.error_message)
        .optional("peer_update", &status.peer_update, peer_update)
        .done()
}

fn start_progress(progress: &vpn::StartProgress) -> Value {
    let known = vpn::StartProgressStage::try_from(progress.stage).ok().map(|it| it.as_str_name());
    let download = |it: &vpn::StartProgressDownloadProgress| {
        fields()
            .number("bytes_written", it.bytes_written)
            .optional("bytes_total", &it.bytes_total, |total| json!(total))
            .done()
    };
    fields()
        .named("stage", progress.stage, known)
        .optional("download_progress", &progress.download_progress, download)
        .done()
}

fn log(log: &Log) -> Value {
    let known = vpn::log::Level::try_from(log.level).ok().map(|it| it.as_str_name());
    let field = |it: &vpn::log::Field| fields().text("name", &it.name).text("value", &it.value).done();
    fields()
        .named("level", log.level, known)
        .text("message", &log.message)
        .texts("logger_names", &log.logger_names)
        .list("fields", &log.fields, field)
        .done()
}

fn peer_update(update: &PeerUpdate) -> Value {
    fields()
        .list("upserted_workspaces", &update.upserted_workspaces, workspace)
        .list("upserted_agents", &update.upserted_agents, agent)
        .list("deleted_workspaces", &update.deleted_workspaces, workspace)
        .list("deleted_agents", &update.deleted_agents, agent)
        .done()
}

fn workspace(workspace: &Workspace) -> Value {
    let known = vpn::workspace::Status::try_from(workspace.status).ok().map(|it| it.as_str_name());
    fields()
        .bytes("id", &workspace.id)
        .text("name", &workspace.name)
        .named("status", workspace.status, known)
        .done()
}

fn agent(agent: &Agent) -> Value {
    fields()
        .bytes("id", &agent.id)
        .text("name", &agent.name)
        .bytes("workspace_id", &agent.workspace_id)
        .texts("fqdn", &agent.fqdn)
        .texts("ip_addrs", &agent.ip_addrs)
        .optional(
            "last_handshake",
            &agent.last_handshake,
            |it| json!({ "seconds": it.seconds, "nanos": it.nanos }),
        )
        .optional("last_ping", &agent.last_ping, last_ping)
        .done()
}

fn last_ping(ping: &LastPing) -> Value {
    let duration = |it: &prost_types::Duration| json!({ "seconds": it.seconds, "nanos": it.nanos });
    fields()
        .optional("latency", &ping.latency, duration)
        .flag("did_p2p", ping.did_p2p)
        .text("preferred_derp", &ping.preferred_derp)
        .optional("preferred_derp_latency", &ping.preferred_derp_latency, duration)
        .done()
}

fn network_settings(request: &NetworkSettingsRequest) -> Value {
    fields()
        .number("tunnel_overhead_bytes", request.tunnel_overhead_bytes)
        .number("mtu", request.mtu)
        .optional("dns_settings", &request.dns_settings, dns)
        .text("tunnel_remote_address", &request.tunnel_remote_address)
        .optional("ipv4_settings", &request.ipv4_settings, ipv4)
        .optional("ipv6_settings", &request.ipv6_settings, ipv6)
        .done()
}

fn dns(dns: &DnsSettings) -> Value {
    fields()
        .texts("servers", &dns.servers)
        .texts("search_domains", &dns.search_domains)
        .text("domain_name", &dns.domain_name)
        .texts("match_domains", &dns.match_domains)
        .flag("match_domains_no_search", dns.match_domains_no_search)
        .done()
}

fn ipv4(settings: &IPv4Settings) -> Value {
    let route = |it: &IPv4Route| {
        fields().text("destination", &it.destination).text("mask", &it.mask).text("router", &it.router).done()
    };
    fields()
        .texts("addrs", &settings.addrs)
        .texts("subnet_masks", &settings.subnet_masks)
        .text("router", &settings.router)
        .list("included_routes", &settings.included_routes, route)
        .list("excluded_routes", &settings.excluded_routes, route)
        .done()
}

fn ipv6(settings: &IPv6Settings) -> Value {
    let route = |it: &IPv6Route| {
        let destination = fields().text("destination", &it.destination);
        destination.number("prefix_length", it.prefix_length).text("router", &it.router).done()
    };
    fields()
        .texts("addrs", &settings.addrs)
        .list("prefix_lengths", &settings.prefix_lengths, |it| json!(it))
        .list("included_routes", &settings.included_routes, route)
        .list("excluded_routes", &settings.excluded_routes, route)
        .done()
}
