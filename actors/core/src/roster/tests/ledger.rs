//! Names and updates against a ledger: a deployment whose workspaces and agents come, go and are renamed says
//! so as deployments do; streams break and begin anew; managers look whenever they like. What each was sent
//! must add up to what the ledger, which knows nothing of the table's code, says is there.

use std::sync::Arc;

use super::*;

/// Workspaces and agents as somebody made them.
#[derive(Debug, Clone, Default)]
struct Deployment {
    user: String,
    suffix: String,
    workspaces: BTreeMap<u128, Place>,
}

#[derive(Debug, Clone, Default)]
struct Place {
    name: String,
    status: i32,
    agents: BTreeMap<u128, String>,
}

/// What somebody does to a deployment.
#[derive(Debug, Clone)]
enum Change {
    /// A workspace is made or renamed.
    Workspace(u128, String, i32),
    Status(u128, i32),
    WorkspaceGone(u128),
    /// An agent appears or is renamed.
    Agent(u128, u128, String),
    AgentGone(u128, u128),
    /// A build replaces an agent by one of another id.
    Replaced(u128, u128, u128),
}

#[derive(Debug, Clone)]
enum Turn {
    Change(Change),
    /// The stream breaks; what changes is not heard of until the next begins.
    Broken,
    Reconnected,
    /// The stream says something that cannot be.
    Nonsense(u128),
    /// The names of the user and of the suffix, as the next connection learns them.
    Names(String, String),
    Handshake(u128, u64),
    Ping(u128, u64),
    /// The table's owner crashed.
    Successor,
    /// A manager is told the difference.
    Look(usize),
    /// A manager asks for everything, and may apply what it hears.
    Ask(usize, bool),
}

/// What a manager shows.
#[derive(Clone, Default, Debug, PartialEq)]
struct Sheet {
    workspaces: BTreeMap<Bytes, vpn::Workspace>,
    agents: BTreeMap<Bytes, vpn::Agent>,
}

/// Managers differ in the order in which they apply one message.
#[derive(Default)]
struct Manager {
    sent: Sent,
    deletes_first: Sheet,
    upserts_first: Sheet,
}

/// What was found out about an agent since it is shown.
#[derive(Debug, Clone, Default)]
struct Known {
    handshake: Option<u64>,
    ping: Option<u64>,
}

/// The truth, and how much of it was heard.
#[derive(Default)]
struct Ledger {
    truth: Deployment,
    heard: Deployment,
    is_connected: bool,
    known: BTreeMap<u128, Known>,
}

impl Deployment {
    /// Changes it, and gives what a deployment says of that; nothing if it cannot be done.
    fn change(&mut self, change: &Change) -> Option<tailnet::WorkspaceUpdate> {
        let mut told = tailnet::WorkspaceUpdate::default();
        match change {
            Change::Workspace(id, name, status) => {
                let place = self.workspaces.entry(*id).or_default();
                (place.name, place.status) = (name.clone(), *status);
                told.upserted_workspaces = vec![workspace(*id, name, *status)];
            }
            Change::Status(id, status) => {
                let place = self.workspaces.get_mut(id)?;
                place.status = *status;
                told.upserted_workspaces = vec![workspace(*id, &place.name, *status)];
            }
            Change::WorkspaceGone(id) => {
                let place = self.workspaces.remove(id)?;
                told.deleted_workspaces = vec![workspace(*id, &place.name, place.status)];
                told.deleted_agents = place.agents.iter().map(|(it, name)| agent(*it, name, *id)).collect();
            }
            Change::Agent(home, id, name) => {
                if self.home_of(*id).is_some_and(|other| other != *home) {
                    return None;
                }
                self.workspaces.get_mut(home)?.agents.insert(*id, name.clone());
                told.upserted_agents = vec![agent(*id, name, *home)];
            }
            Change::AgentGone(home, id) => {
                let name = self.workspaces.get_mut(home)?.agents.remove(id)?;
                told.deleted_agents = vec![agent(*id, &name, *home)];
            }
            Change::Replaced(home, old, new) => {
                if self.home_of(*new).is_some() {
                    return None;
                }
                let agents = &mut self.workspaces.get_mut(home)?.agents;
                let name = agents.remove(old)?;
                agents.insert(*new, name.clone());
                told.deleted_agents = vec![agent(*old, &name, *home)];
                told.upserted_agents = vec![agent(*new, &name, *home)];
            }
        }
        Some(told)
    }

    fn home_of(&self, agent: u128) -> Option<u128> {
        let is_home = |(_, place): &(&u128, &Place)| place.agents.contains_key(&agent);
        self.workspaces.iter().find(is_home).map(|(home, _)| *home)
    }

    /// The first message of a stream.
    fn everything(&self) -> tailnet::WorkspaceUpdate {
        let mut told = tailnet::WorkspaceUpdate::default();
        for (home, place) in &self.workspaces {
            told.upserted_workspaces.push(workspace(*home, &place.name, place.status));
            told.upserted_agents.extend(place.agents.iter().map(|(id, name)| agent(*id, name, *home)));
        }
        told
    }

    /// What vpn-protocol 7.3 says; `None` where one of the names cannot be.
    fn names(&self, place: &Place, agent: &str) -> Option<Vec<String>> {
        let (home, user, suffix) = (&place.name, &self.user, &self.suffix);
        let mut names =
            vec![format!("{agent}.{home}.me.{suffix}."), format!("{agent}.{home}.{user}.{suffix}.")];
        if place.agents.len() == 1 {
            names.push(format!("{home}.{suffix}."));
        }
        names.iter_mut().for_each(|name| *name = name.to_lowercase());
        let fits = |name: &String| {
            let labels: Vec<&str> = name.split('.').collect();
            let (root, labels) = labels.split_last().unwrap();
            root.is_empty() && name.len() <= 254 && labels.iter().all(|it| (1..64).contains(&it.len()))
        };
        names.sort_by(|a, b| a.len().cmp(&b.len()).then(a.cmp(b)));
        names.dedup();
        names.iter().all(fits).then_some(names)
    }

    /// The agents that can be named, and what is told of them but for times.
    fn shown(&self) -> BTreeMap<u128, vpn::Agent> {
        let mut shown = BTreeMap::new();
        for (home, place) in &self.workspaces {
            for (id, name) in &place.agents {
                let Some(fqdn) = self.names(place, name) else { continue };
                let (name, ip_addrs) = (name.clone(), vec![address_of(*id)]);
                let (last_handshake, last_ping) = (None, None);
                let (number, id, workspace_id) = (*id, raw(*id), raw(*home));
                let told = vpn::Agent { id, name, workspace_id, fqdn, ip_addrs, last_handshake, last_ping };
                shown.insert(number, told);
            }
        }
        shown
    }
}

/// The prefix in place of the first six bytes.
fn address_of(number: u128) -> String {
    let mut bytes = number.to_be_bytes();
    bytes[..6].copy_from_slice(&[0xfd, 0x60, 0x62, 0x7a, 0xa4, 0x2b]);
    Ipv6Addr::from(bytes).to_string()
}

impl Ledger {
    /// What is known of those who are no longer shown is forgotten.
    fn hear(&mut self) {
        self.heard = self.truth.clone();
        let shown = self.heard.shown();
        self.known.retain(|id, _| shown.contains_key(id));
        for id in shown.into_keys() {
            self.known.entry(id).or_default();
        }
    }

    /// What every manager must show.
    fn sheet(&self) -> Sheet {
        let mut sheet = Sheet::default();
        for (id, place) in &self.heard.workspaces {
            let told = vpn::Workspace { id: raw(*id), name: place.name.clone(), status: place.status };
            sheet.workspaces.insert(raw(*id), told);
        }
        for (id, mut told) in self.heard.shown() {
            let known = &self.known[&id];
            let millis = |millis| prost_types::Duration { seconds: 0, nanos: millis * 1_000_000 };
            told.last_handshake =
                known.handshake.map(|at| prost_types::Timestamp { seconds: at as i64, nanos: 0 });
            told.last_ping = known.ping.map(|took| vpn::LastPing {
                latency: Some(millis(took as i32)),
                did_p2p: false,
                preferred_derp: "Coder Embedded Relay".to_owned(),
                preferred_derp_latency: Some(millis(7)),
            });
            sheet.agents.insert(told.id.clone(), told);
        }
        sheet
    }
}

impl Sheet {
    fn upsert(&mut self, message: &vpn::PeerUpdate) {
        self.workspaces.extend(message.upserted_workspaces.iter().map(|it| (it.id.clone(), it.clone())));
        self.agents.extend(message.upserted_agents.iter().map(|it| (it.id.clone(), it.clone())));
    }

    fn delete(&mut self, message: &vpn::PeerUpdate) {
        message.deleted_agents.iter().for_each(|it| drop(self.agents.remove(&it.id)));
        message.deleted_workspaces.iter().for_each(|it| drop(self.workspaces.remove(&it.id)));
    }
}

impl Manager {
    fn look(&mut self, roster: &Roster) {
        if let Some(message) = self.sent.difference(roster.snapshot()) {
            assert_no_id_twice(&message);
            self.deletes_first.delete(&message);
            self.deletes_first.upsert(&message);
            self.upserts_first.upsert(&message);
            self.upserts_first.delete(&message);
        }
        self.sent.note_difference(Arc::new(roster.snapshot().clone()));
        assert_eq!(self.sent.difference(roster.snapshot()), None, "all was told");
    }

    /// The answer only adds, and it may come too late for the one who asked.
    fn ask(&mut self, roster: &Roster, is_applied: bool) {
        let everything = complete(roster.snapshot());
        assert!(everything.deleted_agents.is_empty() && everything.deleted_workspaces.is_empty());
        self.sent.note_answer(roster.snapshot());
        if is_applied {
            self.deletes_first.upsert(&everything);
            self.upserts_first.upsert(&everything);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    /// Conforms: vpn:15.10 vpn:15.32
    #[test]
    fn at_any_pace_a_manager_is_sent_what_adds_up_to_what_is_there(
        turns in proptest::collection::vec(any_turn(), 1..80),
    ) {
        let (mut ledger, mut table) = (Ledger::default(), Table::default());
        ledger.truth.user.clone_from(&table.workspaces.username);
        ledger.truth.suffix.clone_from(&table.workspaces.suffix);
        let mut managers = [Manager::default(), Manager::default(), Manager::default()];
        for turn in turns {
            play(&turn, &mut ledger, &mut table, &mut managers);
            prop_assert_eq!(shown_by(&table.roster), ledger.sheet(), "after {:?}", turn);
        }
        for manager in &mut managers {
            manager.look(&table.roster);
            prop_assert_eq!(&manager.deletes_first, &ledger.sheet());
            prop_assert_eq!(&manager.upserts_first, &ledger.sheet());
        }
    }
}

fn play(turn: &Turn, ledger: &mut Ledger, table: &mut Table, managers: &mut [Manager; 3]) {
    match turn {
        Turn::Change(change) => {
            let told = ledger.truth.change(change);
            if let (Some(told), true) = (told, ledger.is_connected) {
                table.apply(&told, Update::Diff).unwrap();
                ledger.hear();
            }
        }
        Turn::Broken => ledger.is_connected = false,
        Turn::Reconnected => {
            ledger.is_connected = true;
            table.workspaces.username.clone_from(&ledger.truth.user);
            table.workspaces.suffix.clone_from(&ledger.truth.suffix);
            table.apply(&ledger.truth.everything(), Update::Snapshot).unwrap();
            ledger.hear();
        }
        Turn::Nonsense(number) => {
            // An agent of a workspace that nobody has, beside a workspace that would be new.
            let mut told = snapshot(&[(77, "new", RUNNING)], &[]);
            told.upserted_agents = vec![agent(*number, "a", 99)];
            table.apply(&told, Update::Diff).unwrap_err();
            ledger.is_connected = false;
        }
        Turn::Names(user, suffix) => {
            (ledger.truth.user, ledger.truth.suffix) = (user.clone(), suffix.clone());
            ledger.is_connected = false;
        }
        Turn::Handshake(number, seconds) => {
            table.roster.set_handshakes(|id| (id.as_u128() % 3 == *number).then(|| at(*seconds)));
            for (id, known) in &mut ledger.known {
                known.handshake = (id % 3 == *number).then_some(*seconds);
            }
        }
        Turn::Ping(number, millis) => {
            let is_there = table.roster.set_ping(&id(*number), ping(*millis));
            assert_eq!(is_there, ledger.known.contains_key(number));
            if let Some(known) = ledger.known.get_mut(number) {
                known.ping = Some(*millis);
            }
        }
        Turn::Successor => {
            table.roster = Roster::restore(table.roster.snapshot().clone());
            table.roster.set_workspaces(&table.workspaces);
        }
        Turn::Look(manager) => managers[*manager].look(&table.roster),
        Turn::Ask(manager, is_applied) => managers[*manager].ask(&table.roster, *is_applied),
    }
}

/// What one who asks for everything shows.
fn shown_by(roster: &Roster) -> Sheet {
    let mut sheet = Sheet::default();
    sheet.upsert(&complete(roster.snapshot()));
    sheet
}

fn any_turn() -> impl Strategy<Value = Turn> {
    prop_oneof![
        12 => any_change().prop_map(Turn::Change),
        1 => Just(Turn::Broken),
        3 => Just(Turn::Reconnected),
        1 => agent_number().prop_map(Turn::Nonsense),
        1 => (user(), suffix()).prop_map(|(user, suffix)| Turn::Names(user, suffix)),
        2 => (0_u128..3, 1_u64..4).prop_map(|(number, seconds)| Turn::Handshake(number, seconds)),
        2 => (agent_number(), 1_u64..4).prop_map(|(number, millis)| Turn::Ping(number, millis)),
        1 => Just(Turn::Successor),
        4 => (0_usize..3).prop_map(Turn::Look),
        2 => (0_usize..3, any::<bool>()).prop_map(|(manager, is_applied)| Turn::Ask(manager, is_applied)),
    ]
}

/// Few numbers, so that they meet.
fn any_change() -> impl Strategy<Value = Change> {
    let home = || 1_u128..5;
    let (agent, other) = (agent_number, agent_number);
    prop_oneof![
        4 => (home(), name(), 0_i32..12).prop_map(|(id, name, status)| Change::Workspace(id, name, status)),
        1 => (home(), -1_i32..99).prop_map(|(id, status)| Change::Status(id, status)),
        1 => home().prop_map(Change::WorkspaceGone),
        6 => (home(), agent(), name()).prop_map(|(home, id, name)| Change::Agent(home, id, name)),
        2 => (home(), agent()).prop_map(|(home, id)| Change::AgentGone(home, id)),
        1 => (home(), agent(), other()).prop_map(|(home, old, new)| Change::Replaced(home, old, new)),
    ]
}

/// Ids that differ in the bytes an address leaves out as well as in those it keeps.
fn agent_number() -> impl Strategy<Value = u128> {
    (0_u128..7).prop_map(|number| (number << 120) | (0xabcd_u128 << 64) | number)
}

/// Names that meet when they are lower case, that look like other forms, and that cannot be.
fn name() -> impl Strategy<Value = String> {
    let meeting = vec!["dev", "Dev", "DEV", "prod", "main", "me", "ME", "alice"];
    let odd = vec!["main.dev.me", "dev.me", "", ".", "a..b", ".dev", "\u{df}\u{130}", "a b", "-", "\n"];
    prop_oneof![
        6 => proptest::sample::select(meeting).prop_map(str::to_owned),
        1 => proptest::sample::select(odd).prop_map(str::to_owned),
        1 => (60_usize..66).prop_map(|length| "x".repeat(length)),
        1 => "[a-zA-Z0-9-]{1,12}",
    ]
}

fn user() -> impl Strategy<Value = String> {
    proptest::sample::select(vec!["alice", "Alice", "me", "bob", "", "b.o.b"]).prop_map(str::to_owned)
}

/// Also such that only some names under them are too long.
fn suffix() -> impl Strategy<Value = String> {
    let usual = proptest::sample::select(vec!["coder", "float", "Dev.Example", "", "me.coder"]);
    prop_oneof![
        5 => usual.prop_map(str::to_owned),
        1 => (105_usize..120).prop_map(|labels| vec!["s"; labels].join(".")),
    ]
}
