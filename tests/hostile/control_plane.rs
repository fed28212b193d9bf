//! What a deployment, or whoever stands before it, can do to a tunnel.

use std::{io::Write, net::TcpStream, time::Duration};

use uuid::Uuid;
use warren_lab::{Endpoint, HttpFault, Times};
use warren_proto::tailnet::{CoordinateResponse, coordinate_response::PeerUpdate};

use super::{
    Scene,
    crook::{self, Prey},
    support::{LIMIT, eventually, within},
};

/// The crook spoils the control connection, the fault is named, agents are pinged all the while, and once the
/// crook repents all is well again.
#[track_caller]
fn spoilt(words: &[&str], deed: impl Fn(&mut TcpStream, &mut TcpStream) + Send + Sync + 'static) {
    let scene = Scene::up(1);
    scene.crook.spoil(Prey::Control, deed);
    scene.deployment.control().drop_connections();
    scene.control_error(words);
    scene.is_pinged_again();
    scene.crook.repent();
    scene.is_whole_again();
}

/// A WebSocket message of these bytes, as a server sends it.
fn message(payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(payload.len()).unwrap().to_be_bytes();
    [&[0x82, 126], &length[..], payload].concat()
}

/// A yamux frame: version, type, flags, stream, length.
fn yamux(version: u8, kind: u8, flags: u16, stream: u32, length: u32) -> Vec<u8> {
    let head = [&[version, kind][..], &flags.to_be_bytes(), &stream.to_be_bytes(), &length.to_be_bytes()];
    head.concat()
}

#[test]
fn garbage_after_the_upgrade_is_named_and_survived() {
    spoilt(&["websocket", "protocol"], |client, _| crook::flood(client, &[0xff, 0x7f, 0x13], 1));
}

#[test]
fn a_message_without_end_is_refused_and_costs_no_memory() {
    let endless = [&[0x82, 127][..], &(1_u64 << 40).to_be_bytes()].concat();
    spoilt(&["too l", "Space"], move |client, _| {
        let _ = client.write_all(&endless);
        crook::flood(client, &[0], 256);
    });
}

#[test]
fn fragments_without_end_are_refused_and_cost_no_memory() {
    // Not the last fragment of a binary message, then continuations that never are the last.
    let fragment = |first: u8| [&[first, 126, 0x40, 0x00][..], &[0; 0x4000]].concat();
    let (begin, more) = (fragment(0x02), fragment(0x00));
    spoilt(&["too l", "Space"], move |client, _| {
        let _ = client.write_all(&begin);
        crook::flood(client, &more, 256);
    });
}

#[test]
fn a_stream_that_is_cut_in_the_middle_of_a_message_is_dialled_again() {
    spoilt(&[], |client, server| crook::pass_only(server, client, 40));
}

#[test]
fn yamux_of_another_version_is_named() {
    spoilt(&["yamux"], |client, _| {
        let _ = client.write_all(&message(&yamux(7, 9, 0xffff, 1, 1 << 30)));
        crook::hold();
    });
}

#[test]
fn a_stream_that_gets_more_than_its_window_ends_the_connection() {
    spoilt(&[], |client, _| {
        let _ = client.write_all(&message(&yamux(0, 0, 0, 1, u32::MAX)));
        crook::flood(client, &message(&[0; 0x4000]), 256);
    });
}

#[test]
fn pings_without_end_from_who_never_reads_cost_no_memory() {
    let pings: Vec<u8> = (0..1000).flat_map(|value| yamux(0, 2, 1, 0, value)).collect();
    let pings = message(&pings);
    spoilt(&[], move |client, _| crook::flood(client, &pings, 64));
}

#[test]
fn streams_that_the_deployment_opens_are_not_served_and_cost_no_memory() {
    let opens: Vec<u8> = (1..1000).flat_map(|stream| yamux(0, 1, 1, stream * 2, 0)).collect();
    let opens = message(&opens);
    spoilt(&[], move |client, _| crook::flood(client, &opens, 64));
}

#[test]
fn drpc_without_sense_ends_the_connection() {
    // Data on our first stream that is no frame: a length that needs more than ten bytes.
    spoilt(&[], |client, _| {
        let garbage = [0xff; 64];
        let _ = client.write_all(&message(&[&yamux(0, 0, 0, 1, 64)[..], &garbage].concat()));
        crook::hold();
    });
}

#[test]
fn a_deployment_that_drips_is_given_up() {
    spoilt(&[], |client, server| crook::drip(server, client, Duration::from_secs(2)));
}

#[test]
fn a_deployment_that_stays_silent_after_the_upgrade_is_given_up() {
    spoilt(&["does not answer any more"], |_, _| crook::hold());
}

#[test]
fn what_is_said_twice_ends_the_connection() {
    spoilt(&[], |client, server| crook::repeat(server, client));
}

#[test]
fn answers_of_a_gigabyte_are_cut_off_and_named() {
    let scene = Scene::new(1);
    let huge = "x".repeat(64 << 20);
    let fault = HttpFault::Answer(hyper::StatusCode::OK, "application/json".to_owned(), huge);
    scene.deployment.control().fail(Endpoint::UsersMe, fault, Times::Always);
    let output = scene.service.warren(&["up"]);
    let words = super::support::stderr(&output);
    assert!(!output.status.success() && words.contains("larger"), "{words}");
    scene.has_stood();
    scene.deployment.control().heal();
    assert!(scene.service.warren(&["up", "--wait"]).status.success());
    scene.has_stood();
}

/// An id that no agent of the lab has.
fn id(number: u128) -> Uuid {
    Uuid::from_u128((0xbad << 64) + number)
}

#[test]
fn a_hundred_thousand_agents_are_refused_by_number_and_the_others_stay() {
    let scene = Scene::up(1);
    let control = scene.deployment.control();
    // No message may be larger than 4 MiB: they come in four.
    for wave in 0..4 {
        control.change_workspaces(|workspaces| {
            let crowd = workspaces.0.values_mut().next().unwrap();
            let numbers = wave * 25_000..(wave + 1) * 25_000;
            crowd.agents.extend(numbers.map(|number| (id(number), format!("crowd{number}"))));
        });
    }
    scene.control_error_of_first(&["workspaces and agents: 20000 are handled at most"]);
    assert!(scene.agents() >= 1);
    scene.is_pinged_again();
    control.change_workspaces(|workspaces| {
        let crowd = workspaces.0.values_mut().next().unwrap();
        crowd.agents.retain(|_, name| !name.starts_with("crowd"));
    });
    scene.is_whole_again();
    assert_eq!(scene.agents(), 1);
}

#[test]
fn names_with_every_kind_of_bad_character_are_shown_harmlessly() {
    let scene = Scene::up(1);
    let (long, longer) = ("x".repeat(64), "y".repeat(300));
    let bad = [
        "",
        ".",
        "..",
        "-",
        "a b",
        "a\u{0}b",
        "\u{1b}[2J",
        "a\nb",
        "ä",
        "xn--",
        "A.B",
        "*",
        "\u{202e}gnp",
        "%s%n",
        &long,
        &longer,
        "me",
        "coder",
        "MAIN",
    ]
    .map(str::to_owned);
    scene.deployment.control().change_workspaces(|workspaces| {
        let crowd = workspaces.0.values_mut().next().unwrap();
        crowd.agents.extend(bad.iter().zip(0..).map(|(name, number)| (id(number), name.clone())));
        let first = crowd.clone();
        for (name, number) in bad.iter().zip(1000..) {
            let workspace = warren_lab::Workspace {
                name: name.clone(),
                agents: [(id(number), name.clone())].into(),
                ..first
            };
            workspaces.0.insert(id(number), workspace);
        }
    });
    eventually("all are told", || scene.agents() > bad.len());
    let shown = scene.service.warren(&["status"]);
    let text = super::support::stdout(&shown);
    assert!(!text.contains('\u{1b}') && !text.contains('\u{0}') && !text.contains('\u{202e}'), "{text:?}");
    scene.is_pinged_again();
    scene.has_stood();
}

#[test]
fn one_agent_twice_an_address_that_moves_and_answers_about_nobody_do_no_harm() {
    let scene = Scene::up(2);
    let control = scene.deployment.control();
    let agents = scene.deployment.lab.agents();
    for _ in 0..20 {
        control.repeat_node(agents[0].id);
        control.inject(&CoordinateResponse {
            error: String::new(),
            peer_updates: vec![PeerUpdate::default(); 500],
        });
        control.inject(&CoordinateResponse {
            error: String::new(),
            peer_updates: vec![PeerUpdate { id: vec![7; 3].into(), kind: 99, ..PeerUpdate::default() }],
        });
    }
    // The last ten bytes of an id make the address: another agent claims the first one's.
    let mut twin = *agents[0].id.as_bytes();
    twin[0] ^= 0xff;
    control.change_workspaces(|workspaces| {
        let workspace = workspaces.0.values_mut().next().unwrap();
        workspace.agents.insert(Uuid::from_bytes(twin), "twin".to_owned());
    });
    eventually("the twin is told", || scene.agents() == 3);
    control.change_workspaces(|workspaces| {
        workspaces.0.values_mut().next().unwrap().agents.retain(|_, name| name != "twin");
    });
    eventually("the twin is gone", || scene.agents() == 2);
    scene.is_whole_again();
}

#[test]
fn half_open_connections_to_the_deployment_do_not_keep_a_stop() {
    let scene = Scene::up(1);
    scene.crook.spoil(Prey::Control, |_, _| crook::hold());
    scene.deployment.control().drop_connections();
    scene.control_error(&[]);
    let took = within(LIMIT, "down", || scene.service.warren(&["down"]).status.success());
    assert!(took < Duration::from_secs(30), "{took:?}");
    scene.has_stood();
}
