use std::collections::HashMap;

use bytes::Bytes;
use proptest::prelude::*;
use warren_proto::{tailnet, vpn};

use super::{update::tests::difference, *};
use crate::{coordination::Coordination, relay_map::ConnectionInfo};

mod ledger;

/// The conformance lines of tailnet-control 12.5 as far as they are rules.
mod workspace_updates {
    use super::*;

    /// Conforms: control:W2
    #[test]
    fn a_snapshot_tells_all_there_is_with_the_short_name_for_single_agents() {
        let table = Table::after(&snapshot(
            &[(1, "Dev", RUNNING), (2, "pair", RUNNING)],
            &[(11, "Main", 1), (21, "a", 2), (22, "b", 2)],
        ));
        assert_eq!(table.workspaces.agent_ids(), [id(11), id(21), id(22)].into());
        let names = |agent: u128| table.roster.snapshot().agents[&id(agent)].fqdn.join(" ");
        assert_eq!(names(11), "dev.coder. main.dev.me.coder. main.dev.alice.coder.");
        assert_eq!(names(21), "a.pair.me.coder. a.pair.alice.coder.");
        assert_eq!(names(22), "b.pair.me.coder. b.pair.alice.coder.");
        let main = &table.roster.snapshot().agents[&id(11)];
        assert_eq!((main.name.as_str(), main.workspace_id), ("Main", id(1)), "in the original case");
        assert_eq!(main.addresses, [address::coder_address(&id(11))]);
        assert_eq!(table.roster.snapshot().workspaces[&id(1)].name, "Dev");
    }

    /// Conforms: control:W1
    #[test]
    fn a_snapshot_leads_to_a_tunnel_and_names_for_each_agent_and_is_told_whole() {
        let mut table = Table::default();
        let first =
            snapshot(&[(1, "dev", RUNNING), (2, "pair", 4)], &[(11, "main", 1), (21, "a", 2), (22, "b", 2)]);
        table.apply(&first, Update::Snapshot).unwrap();
        let mut tunnels = Tunnels::connected();
        assert_eq!(tunnels.follow(&table, Update::Snapshot), ["+11", "+21", "+22"]);
        let hosts = [
            ("a.pair.alice.coder.", "fd60:627a:a42b::15"),
            ("a.pair.me.coder.", "fd60:627a:a42b::15"),
            ("b.pair.alice.coder.", "fd60:627a:a42b::16"),
            ("b.pair.me.coder.", "fd60:627a:a42b::16"),
            ("dev.coder.", "fd60:627a:a42b::b"),
            ("is.coder--connect--enabled--right--now.coder.", "fd60:627a:a42b::53"),
            ("main.dev.alice.coder.", "fd60:627a:a42b::b"),
            ("main.dev.me.coder.", "fd60:627a:a42b::b"),
        ];
        assert_eq!(
            table.hosts(),
            hosts.map(|(name, address)| (name.to_owned(), address.parse().unwrap())).into()
        );
        let told = difference(&Snapshot::default(), table.roster.snapshot()).unwrap();
        assert_eq!(told, complete(table.roster.snapshot()), "whoever asks is told the same");
        assert_eq!(
            (told.upserted_workspaces.len(), ids(&told.upserted_agents)),
            (2, vec![id(11), id(21), id(22)])
        );
        assert!(told.deleted_workspaces.is_empty() && told.deleted_agents.is_empty());
    }

    #[test]
    fn the_snapshot_of_somebody_without_workspaces_is_empty_and_known() {
        let mut table = Table::default();
        assert!(!table.workspaces.known);
        table.apply(&tailnet::WorkspaceUpdate::default(), Update::Snapshot).unwrap();
        assert!(table.workspaces.known);
        assert_eq!(table.roster.snapshot(), &Snapshot::default());
    }

    /// Conforms: control:W3
    #[test]
    fn a_replaced_agent_is_upserted_and_the_old_one_deleted_with_all_that_was_known_of_it() {
        let mut table = Table::after(&snapshot(&[(1, "dev", RUNNING)], &[(11, "main", 1)]));
        table.roster.set_handshakes(|_| Some(at(100)));
        table.roster.set_ping(&id(11), ping(5));
        let mut reader = table.reader();
        let old = table.roster.snapshot().agents[&id(11)].clone();
        let diff = tailnet::WorkspaceUpdate {
            upserted_agents: vec![agent(12, "main", 1)],
            deleted_agents: vec![agent(11, "main", 1)],
            ..tailnet::WorkspaceUpdate::default()
        };
        let mut tunnels = Tunnels::connected();
        tunnels.follow(&table, Update::Snapshot);
        table.apply(&diff, Update::Diff).unwrap();
        assert_eq!(tunnels.follow(&table, Update::Diff), ["+12", "-11"]);
        let addresses: BTreeSet<_> = table.hosts().into_values().collect();
        assert_eq!(
            addresses,
            [address::CODER_DNS, address::coder_address(&id(12))].into(),
            "names lead to it alone"
        );
        let message = reader.read(&table).unwrap();
        assert_eq!(ids(&message.upserted_agents), [id(12)]);
        assert_eq!(message.upserted_agents[0].fqdn[0], "dev.coder.");
        let deleted = vpn::Agent {
            id: raw(11),
            name: "main".to_owned(),
            workspace_id: raw(1),
            fqdn: old.fqdn,
            ip_addrs: vec![address::coder_address(&id(11)).to_string()],
            last_handshake: None,
            last_ping: None,
        };
        assert_eq!(message.deleted_agents, [deleted]);
        assert!(message.upserted_workspaces.is_empty() && message.deleted_workspaces.is_empty());
    }

    /// Conforms: vpn:K4 control:W5
    #[test]
    fn what_cannot_be_applied_says_what_is_wrong_and_changes_nothing() {
        type Change = fn(&mut tailnet::WorkspaceUpdate);
        let [known, unknown] = [id(1), id(9)];
        let rows: [(Change, String); 11] = [
            (|it| it.upserted_workspaces[0].id = short(), malformed("workspace")),
            (|it| it.upserted_agents[0].id = short(), malformed("agent")),
            (|it| it.upserted_agents[0].workspace_id = short(), malformed("workspace")),
            (
                |it| it.deleted_workspaces = vec![tailnet::Workspace { id: short(), ..workspace(1, "", 0) }],
                malformed("workspace"),
            ),
            (
                |it| it.deleted_agents = vec![tailnet::Agent { id: short(), ..agent(11, "", 1) }],
                malformed("agent"),
            ),
            (
                |it| it.deleted_agents = vec![tailnet::Agent { workspace_id: short(), ..agent(11, "", 1) }],
                malformed("workspace"),
            ),
            (|it| it.upserted_agents[0].workspace_id = raw(9), format!("workspace {unknown} not found")),
            (|it| it.deleted_agents = vec![agent(11, "", 9)], format!("workspace {unknown} not found")),
            (
                |it| it.deleted_workspaces = vec![workspace(9, "", 0)],
                format!("workspace {unknown} not found"),
            ),
            (
                |it| it.deleted_agents = vec![agent(9, "", 1)],
                format!("agent {unknown} not found in workspace {known}"),
            ),
            (
                |it| it.upserted_agents[0].workspace_id = Bytes::new(),
                "parse workspace ID: invalid UUID (got 0 bytes)".to_owned(),
            ),
        ];
        for (number, (change, error)) in rows.into_iter().enumerate() {
            let mut table = Table::after(&snapshot(&[(1, "dev", RUNNING)], &[(11, "main", 1)]));
            let before = table.workspaces.clone();
            let mut diff = snapshot(&[(2, "new", RUNNING)], &[(21, "a", 2)]);
            change(&mut diff);
            let failed = table.apply(&diff, Update::Diff).unwrap_err();
            assert_eq!(failed.to_string(), error, "row {number}");
            assert_eq!(table.workspaces, before, "row {number}");
        }
    }

    #[test]
    fn more_than_can_be_handled_is_refused_whole_and_room_that_is_given_back_is_room() {
        let mut table = Table::after(&snapshot(&[(1, "dev", RUNNING)], &[(11, "main", 1)]));
        let before = table.workspaces.clone();
        let crowd = |count: usize| tailnet::WorkspaceUpdate {
            upserted_agents: (0..count as u128).map(|number| agent(100 + number, "a", 1)).collect(),
            ..tailnet::WorkspaceUpdate::default()
        };
        let failed = table.apply(&crowd(MAX_ENTRIES - 1), Update::Diff);
        assert_eq!(failed, Err(UpdateError::TooMany(MAX_ENTRIES + 1)));
        assert_eq!(table.workspaces, before);
        table.apply(&crowd(MAX_ENTRIES - 2), Update::Diff).unwrap();
        table.apply(&snapshot(&[(1, "dev", RUNNING)], &[]), Update::Snapshot).unwrap();
        let long = "x".repeat(MAX_NAME + 1);
        let failed = table.apply(&snapshot(&[(2, &long, RUNNING)], &[]), Update::Diff);
        assert_eq!(failed, Err(UpdateError::LongName { what: "workspace", id: id(2), length: MAX_NAME + 1 }));
        let failed = table.apply(&snapshot(&[], &[(12, &long, 1)]), Update::Diff);
        assert_eq!(failed, Err(UpdateError::LongName { what: "agent", id: id(12), length: MAX_NAME + 1 }));
    }

    /// The rules' part of W6: until the snapshot comes, the workspaces and names stay.
    #[test]
    fn a_stream_that_has_said_nothing_yet_changes_nothing() {
        let mut table = Table::after(&snapshot(&[(1, "dev", RUNNING)], &[(11, "main", 1)]));
        let before = table.roster.snapshot().clone();
        assert_eq!(table.roster.set_workspaces(&table.workspaces), []);
        assert_eq!(
            table.roster.set_workspaces(&Workspaces::default()),
            [],
            "a successor that knows none yet"
        );
        assert_eq!(table.roster.snapshot(), &before);
    }

    /// Conforms: vpn:K6 control:W7
    #[test]
    fn a_snapshot_drops_what_it_does_not_list_and_a_reader_hears_of_the_rest_only() {
        let mut table =
            Table::after(&snapshot(&[(1, "dev", RUNNING), (2, "old", 5)], &[(11, "main", 1), (21, "a", 2)]));
        let mut reader = table.reader();
        let mut tunnels = Tunnels::connected();
        tunnels.follow(&table, Update::Snapshot);
        table
            .apply(
                &snapshot(&[(1, "dev", RUNNING), (3, "new", RUNNING)], &[(11, "main", 1), (31, "a", 3)]),
                Update::Snapshot,
            )
            .unwrap();
        assert_eq!(tunnels.follow(&table, Update::Snapshot), ["+31", "-21"]);
        assert!(!table.hosts().keys().any(|name| name.contains("old")), "{:?}", table.hosts());
        let message = reader.read(&table).unwrap();
        assert_eq!(
            message.upserted_workspaces,
            [vpn::Workspace { id: raw(3), name: "new".to_owned(), status: RUNNING }]
        );
        assert_eq!(ids(&message.upserted_agents), [id(31)]);
        assert_eq!(
            message.deleted_workspaces,
            [vpn::Workspace { id: raw(2), name: "old".to_owned(), status: 5 }]
        );
        assert_eq!(ids(&message.deleted_agents), [id(21)]);
    }

    #[test]
    fn a_snapshot_deletes_nothing_it_has_not_upserted() {
        let mut table = Table::after(&snapshot(&[(1, "dev", RUNNING)], &[(11, "main", 1)]));
        let deletes = tailnet::WorkspaceUpdate {
            deleted_agents: vec![agent(11, "main", 1)],
            ..tailnet::WorkspaceUpdate::default()
        };
        assert_eq!(table.apply(&deletes, Update::Snapshot), Err(UpdateError::UnknownWorkspace(id(1))));
    }

    /// tailnet-control 8: upsert workspaces, delete agents, delete workspaces, upsert agents.
    #[test]
    fn one_message_is_applied_in_the_fixed_order() {
        let mut table = Table::after(&snapshot(&[(1, "dev", RUNNING)], &[(11, "main", 1)]));
        let moved = tailnet::WorkspaceUpdate {
            upserted_workspaces: vec![workspace(2, "new", RUNNING)],
            upserted_agents: vec![agent(11, "main", 2)],
            deleted_workspaces: vec![workspace(1, "dev", RUNNING)],
            deleted_agents: vec![agent(11, "main", 1)],
        };
        let mut reader = table.reader();
        table.apply(&moved, Update::Diff).unwrap();
        let message = reader.read(&table).unwrap();
        assert_eq!(ids(&message.upserted_agents), [id(11)], "it is not deleted, it has moved");
        assert_eq!(message.upserted_agents[0].workspace_id, raw(2));
        assert!(message.deleted_agents.is_empty());
        let gone = tailnet::WorkspaceUpdate {
            upserted_workspaces: vec![workspace(3, "short", RUNNING)],
            deleted_workspaces: vec![workspace(3, "short", RUNNING)],
            ..tailnet::WorkspaceUpdate::default()
        };
        table.apply(&gone, Update::Diff).unwrap();
        assert!(!table.workspaces.workspaces.contains_key(&id(3)));
    }

    #[test]
    fn an_upserted_workspace_keeps_its_agents_and_a_deleted_one_takes_them_along() {
        let mut table = Table::after(&snapshot(&[(1, "dev", RUNNING)], &[(11, "main", 1)]));
        table.apply(&snapshot(&[(1, "dev", 4)], &[]), Update::Diff).unwrap();
        assert_eq!(table.workspaces.agent_ids(), [id(11)].into());
        let gone = tailnet::WorkspaceUpdate {
            deleted_workspaces: vec![workspace(1, "", 0)],
            ..tailnet::WorkspaceUpdate::default()
        };
        table.apply(&gone, Update::Diff).unwrap();
        assert_eq!(table.workspaces.agent_ids().len(), 0);
    }

    fn malformed(what: &str) -> String {
        format!("parse {what} ID: invalid UUID (got 3 bytes)")
    }

    fn short() -> Bytes {
        Bytes::from_static(&[1, 2, 3])
    }
}

/// vpn-protocol 7.3.
mod names {
    use super::*;

    /// Conforms: vpn:15.10
    #[test]
    fn the_other_agent_is_told_again_when_a_workspace_gains_or_loses_its_second() {
        let mut table = Table::after(&snapshot(&[(1, "dev", RUNNING)], &[(11, "main", 1)]));
        let mut reader = table.reader();
        table.apply(&snapshot(&[], &[(12, "sub", 1)]), Update::Diff).unwrap();
        let message = reader.read(&table).unwrap();
        assert_eq!(ids(&message.upserted_agents), [id(11), id(12)]);
        assert_eq!(message.upserted_agents[0].fqdn, ["main.dev.me.coder.", "main.dev.alice.coder."]);
        let lost = tailnet::WorkspaceUpdate {
            deleted_agents: vec![agent(12, "sub", 1)],
            ..tailnet::WorkspaceUpdate::default()
        };
        table.apply(&lost, Update::Diff).unwrap();
        let message = reader.read(&table).unwrap();
        assert_eq!(ids(&message.upserted_agents), [id(11)]);
        assert_eq!(message.upserted_agents[0].fqdn[0], "dev.coder.");
    }

    /// Conforms: vpn:15.10
    #[test]
    fn a_renamed_workspace_is_told_with_all_its_agents_and_no_other() {
        let mut table = Table::after(&snapshot(
            &[(1, "dev", RUNNING), (2, "other", RUNNING)],
            &[(11, "a", 1), (12, "b", 1), (21, "c", 2)],
        ));
        table.roster.set_ping(&id(11), ping(5));
        let mut reader = table.reader();
        table.apply(&snapshot(&[(1, "prod", RUNNING)], &[]), Update::Diff).unwrap();
        let message = reader.read(&table).unwrap();
        assert_eq!(message.upserted_workspaces.len(), 1);
        assert_eq!(ids(&message.upserted_agents), [id(11), id(12)]);
        assert_eq!(message.upserted_agents[0].fqdn, ["a.prod.me.coder.", "a.prod.alice.coder."]);
        assert!(message.upserted_agents[0].last_ping.is_some(), "what is known of it is kept");
    }

    #[test]
    fn a_change_of_status_or_of_case_alone_is_told_without_what_it_does_not_change() {
        let mut table = Table::after(&snapshot(&[(1, "dev", RUNNING)], &[(11, "main", 1)]));
        let mut reader = table.reader();
        table.apply(&snapshot(&[(1, "Dev", 77)], &[]), Update::Diff).unwrap();
        let message = reader.read(&table).unwrap();
        let expected = vpn::Workspace { id: raw(1), name: "Dev".to_owned(), status: 77 };
        assert_eq!(message.upserted_workspaces, [expected], "also a status this schema has no name for");
        assert!(message.upserted_agents.is_empty(), "names are lower case");
    }

    #[test]
    fn another_suffix_or_user_name_is_told_of_all_agents() {
        let mut table = Table::after(&snapshot(&[(1, "dev", RUNNING)], &[(11, "main", 1)]));
        let mut reader = table.reader();
        table.workspaces.suffix = "Dev.Example".to_owned();
        table.workspaces.username = "Bob".to_owned();
        table.roster.set_workspaces(&table.workspaces);
        let message = reader.read(&table).unwrap();
        let names = ["dev.dev.example.", "main.dev.me.dev.example.", "main.dev.bob.dev.example."];
        assert_eq!(message.upserted_agents[0].fqdn, names);
        assert!(message.upserted_workspaces.is_empty());
    }

    /// The suffix comes with the connection information, the user's name with the user.
    /// Conforms: vpn:C4 control:H3
    #[test]
    fn names_stand_under_the_suffix_of_the_deployment_or_under_the_usual_one() {
        for (information, suffix) in [("{}", "coder"), (r#"{"hostname_suffix":"float"}"#, "float")] {
            let suffix_told = ConnectionInfo::from_json(information.as_bytes()).unwrap().hostname_suffix;
            let mut table = Table::default();
            table.workspaces.username = "rootbeer".to_owned();
            table.workspaces.suffix = suffix_told;
            table.apply(&snapshot(&[(1, "wrk", RUNNING)], &[(11, "agnt", 1)]), Update::Snapshot).unwrap();
            let told = &complete(table.roster.snapshot()).upserted_agents[0];
            let names = ["wrk", "agnt.wrk.me", "agnt.wrk.rootbeer"].map(|name| format!("{name}.{suffix}."));
            assert_eq!(told.fqdn, names);
            assert_eq!(told.ip_addrs, ["fd60:627a:a42b::b"]);
        }
    }

    /// Nobody's names depend on anybody else's: which of two that meet a resolver answers is its affair.
    #[test]
    fn names_that_meet_are_told_of_each_agent_that_has_them() {
        let table = Table::after(&snapshot(
            &[(1, "dev", RUNNING), (2, "DEV", RUNNING), (3, "main.dev.me", RUNNING), (4, "me", RUNNING)],
            &[(11, "main", 1), (21, "Main", 2), (31, "me", 3), (41, "dev", 4)],
        ));
        let agent = |number| &table.roster.snapshot().agents[&id(number)];
        assert_eq!(agent(11).fqdn, agent(21).fqdn);
        assert_ne!(agent(11).addresses, agent(21).addresses);
        assert!(agent(11).fqdn.contains(&agent(31).fqdn[0]), "{:?}", agent(31).fqdn);
        assert_eq!(agent(41).fqdn, ["me.coder.", "dev.me.me.coder.", "dev.me.alice.coder."]);
    }

    #[test]
    fn agents_that_differ_only_in_case_are_two_and_neither_is_the_only_one() {
        let table = Table::after(&snapshot(&[(1, "dev", RUNNING)], &[(11, "main", 1), (12, "MAIN", 1)]));
        for agent in table.roster.snapshot().agents.values() {
            assert_eq!(agent.fqdn, ["main.dev.me.coder.", "main.dev.alice.coder."]);
        }
    }

    #[test]
    fn while_the_user_has_no_name_nobody_has() {
        let mut table = Table::default();
        table.workspaces.username.clear();
        table.apply(&snapshot(&[(1, "dev", RUNNING)], &[(11, "main", 1)]), Update::Snapshot).unwrap();
        assert!(table.roster.snapshot().agents.is_empty());
        table.workspaces.username = "alice".to_owned();
        assert_eq!(table.roster.set_workspaces(&table.workspaces), []);
        assert_eq!(table.roster.snapshot().agents[&id(11)].fqdn.len(), 3);
    }

    #[test]
    fn names_of_one_length_come_in_alphabetical_order() {
        let mut table = Table::default();
        table.workspaces.username = "ab".to_owned();
        table.apply(&snapshot(&[(1, "w", RUNNING)], &[(11, "a", 1)]), Update::Snapshot).unwrap();
        let fqdn = &table.roster.snapshot().agents[&id(11)].fqdn;
        assert_eq!(fqdn, &["w.coder.", "a.w.ab.coder.", "a.w.me.coder."]);
    }

    /// Managers choke on an agent without a name (vpn-protocol 12).
    /// Conforms: vpn:15.32
    #[test]
    fn an_agent_that_cannot_have_a_name_is_left_out_and_reported_each_time_it_begins() {
        let long = "x".repeat(64);
        let mut table = Table::default();
        let all = snapshot(&[(1, "dev", RUNNING)], &[(11, "main", 1), (12, &long, 1)]);
        table.workspaces.apply(&all, Update::Snapshot).unwrap();
        let reported = table.roster.set_workspaces(&table.workspaces);
        assert_eq!(reported.iter().map(|it| it.agent).collect::<Vec<_>>(), [id(12)]);
        assert!(reported[0].error.to_string().contains("is longer than 63 bytes"), "{}", reported[0].error);
        assert!(table.roster.snapshot().agents.keys().eq([&id(11)]));
        assert_eq!(table.roster.set_workspaces(&table.workspaces), [], "once");
        assert_eq!(table.workspaces.agent_ids().len(), 2, "a tunnel to it is wanted all the same");
        table.apply(&snapshot(&[], &[(12, "short", 1)]), Update::Diff).unwrap();
        assert!(table.roster.snapshot().agents.contains_key(&id(12)));
        table.workspaces.apply(&all, Update::Snapshot).unwrap();
        assert_eq!(table.roster.set_workspaces(&table.workspaces).len(), 1, "it begins again");
    }

    #[test]
    fn an_agent_that_loses_its_names_is_deleted_for_readers() {
        let mut table = Table::after(&snapshot(&[(1, "dev", RUNNING)], &[(11, "main", 1)]));
        let mut reader = table.reader();
        table.apply(&snapshot(&[(1, "", RUNNING)], &[]), Update::Diff).unwrap();
        let message = reader.read(&table).unwrap();
        assert_eq!(ids(&message.deleted_agents), [id(11)]);
        assert_eq!(message.deleted_agents[0].fqdn[0], "dev.coder.", "as last known");
    }
}

/// vpn-protocol 7.4 to 7.6.
mod messages {
    use super::*;

    /// Conforms: vpn:T15
    #[test]
    fn a_snapshot_with_another_agent_in_the_workspace_is_one_upsert_and_one_deleted_agent() {
        let told = between(
            &snapshot(&[(1, "dev", RUNNING)], &[(11, "main", 1)]),
            &snapshot(&[(1, "dev", RUNNING)], &[(12, "main", 1)]),
        );
        let told = told.unwrap();
        assert_eq!((ids(&told.upserted_agents), ids(&told.deleted_agents)), (vec![id(12)], vec![id(11)]));
        assert!(told.upserted_workspaces.is_empty() && told.deleted_workspaces.is_empty());
    }

    /// Conforms: vpn:T16
    #[test]
    fn a_snapshot_with_another_workspace_is_one_upsert_and_one_delete_of_each_kind() {
        let told = between(
            &snapshot(&[(1, "dev", RUNNING)], &[(11, "main", 1)]),
            &snapshot(&[(2, "new", RUNNING)], &[(21, "main", 2)]),
        );
        let told = told.unwrap();
        assert_eq!((ids(&told.upserted_agents), ids(&told.deleted_agents)), (vec![id(21)], vec![id(11)]));
        let numbers = |them: &[vpn::Workspace]| them.iter().map(|it| it.id.clone()).collect::<Vec<_>>();
        assert_eq!(numbers(&told.upserted_workspaces), [raw(2)]);
        assert_eq!(numbers(&told.deleted_workspaces), [raw(1)]);
    }

    /// Conforms: vpn:T19
    #[test]
    fn a_snapshot_is_compared_with_what_was_there() {
        let both =
            snapshot(&[(1, "a", RUNNING), (2, "b", RUNNING)], &[(11, "x", 1), (21, "y", 2), (22, "z", 2)]);
        let less_one = snapshot(&[(1, "a", RUNNING), (2, "b", RUNNING)], &[(11, "x", 1), (21, "y", 2)]);
        let only_first = snapshot(&[(1, "a", RUNNING)], &[(11, "x", 1)]);
        let nothing = tailnet::WorkspaceUpdate::default();
        let bare = snapshot(&[(1, "a", RUNNING), (3, "c", RUNNING)], &[(11, "x", 1)]);
        // Workspaces and agents upserted, then deleted.
        let rows = [
            ("no change", &both, &both, "[] [] [] []"),
            ("an agent more, and its sibling's other names", &less_one, &both, "[] [21, 22] [] []"),
            ("an agent and its workspace less", &both, &only_first, "[] [] [2] [21, 22]"),
            ("an agent less, its workspace stays", &both, &less_one, "[] [21] [] [22]"),
            ("nothing before", &nothing, &only_first, "[1] [11] [] []"),
            ("nothing after", &both, &nothing, "[] [] [1, 2] [11, 21, 22]"),
            ("a workspace without agents less", &bare, &only_first, "[] [] [3] []"),
        ];
        for (row, before, after, expected) in rows {
            let told = between(before, after).unwrap_or_default();
            let number = |id: &Bytes| Uuid::from_slice(id).unwrap().as_u128();
            let workspaces =
                |them: &[vpn::Workspace]| them.iter().map(|it| number(&it.id)).collect::<Vec<_>>();
            let agents = |them: &[vpn::Agent]| them.iter().map(|it| number(&it.id)).collect::<Vec<_>>();
            let found = format!(
                "{:?} {:?} {:?} {:?}",
                workspaces(&told.upserted_workspaces),
                agents(&told.upserted_agents),
                workspaces(&told.deleted_workspaces),
                agents(&told.deleted_agents),
            );
            assert_eq!(found, expected, "{row}");
        }
    }

    /// What one who has seen the first snapshot is told of the second.
    fn between(
        before: &tailnet::WorkspaceUpdate,
        after: &tailnet::WorkspaceUpdate,
    ) -> Option<vpn::PeerUpdate> {
        let mut table = Table::after(before);
        let mut reader = table.reader();
        table.apply(after, Update::Snapshot).unwrap();
        reader.read(&table)
    }

    #[test]
    fn nothing_new_is_no_message() {
        let table = Table::after(&snapshot(&[(1, "dev", RUNNING)], &[(11, "main", 1)]));
        assert_eq!(difference(table.roster.snapshot(), table.roster.snapshot()), None);
        assert_eq!(difference(&Snapshot::default(), &Snapshot::default()), None);
    }

    #[test]
    fn a_reader_that_has_seen_nothing_is_told_everything() {
        let table = Table::after(&snapshot(&[(1, "dev", RUNNING)], &[(11, "main", 1)]));
        let everything = complete(table.roster.snapshot());
        assert_eq!(difference(&Snapshot::default(), table.roster.snapshot()), Some(everything.clone()));
        assert!(everything.deleted_agents.is_empty() && everything.deleted_workspaces.is_empty());
        assert_eq!((everything.upserted_workspaces.len(), everything.upserted_agents.len()), (1, 1));
    }

    #[test]
    fn a_handshake_is_told_with_its_time_and_never_is_unset() {
        let mut table = Table::after(&snapshot(&[(1, "dev", RUNNING)], &[(11, "main", 1)]));
        let told = |table: &Table| complete(table.roster.snapshot()).upserted_agents[0].last_handshake;
        assert_eq!(told(&table), None);
        for early in [SystemTime::UNIX_EPOCH, SystemTime::UNIX_EPOCH - Duration::from_secs(9)] {
            assert!(table.roster.set_handshakes(|_| Some(early)));
            assert_eq!(told(&table), None, "a manager would read 1970 as a real handshake");
        }
        assert!(table.roster.set_handshakes(|_| Some(at(1_000) + Duration::from_nanos(5))));
        assert_eq!(told(&table), Some(prost_types::Timestamp { seconds: 1_000, nanos: 5 }));
        assert!(table.roster.set_handshakes(|_| None));
        assert_eq!(told(&table), None);
    }

    #[test]
    fn one_handshake_read_twice_is_one_and_another_is_news_either_way() {
        let mut table = Table::after(&snapshot(&[(1, "dev", RUNNING)], &[(11, "main", 1)]));
        let ms = Duration::from_millis;
        assert!(table.roster.set_handshakes(|_| Some(at(100))));
        assert!(!table.roster.set_handshakes(|_| Some(at(100) + ms(999))));
        assert!(!table.roster.set_handshakes(|_| Some(at(100) - ms(999))));
        assert!(table.roster.set_handshakes(|_| Some(at(101))));
        assert!(table.roster.set_handshakes(|_| Some(at(50))), "the clock was set back");
    }

    /// vpn-protocol 8: a timeout clears nothing, only a deletion does.
    #[test]
    fn an_answered_ping_is_told_and_kept_until_the_agent_is_gone() {
        let mut table = Table::after(&snapshot(&[(1, "dev", RUNNING)], &[(11, "main", 1), (12, "b", 1)]));
        let mut reader = table.reader();
        assert!(table.roster.set_ping(&id(11), ping(1500)));
        assert!(!table.roster.set_ping(&id(99), ping(5)), "who has gone meanwhile");
        let message = reader.read(&table).unwrap();
        assert_eq!(ids(&message.upserted_agents), [id(11)]);
        let last_ping = vpn::LastPing {
            latency: Some(prost_types::Duration { seconds: 1, nanos: 500_000_000 }),
            did_p2p: false,
            preferred_derp: "Coder Embedded Relay".to_owned(),
            preferred_derp_latency: Some(prost_types::Duration { seconds: 0, nanos: 7_000_000 }),
        };
        assert_eq!(message.upserted_agents[0].last_ping, Some(last_ping));
        table.roster.set_workspaces(&table.workspaces);
        assert_eq!(reader.read(&table), None, "upserting it again keeps it");
        let gone = tailnet::WorkspaceUpdate {
            deleted_agents: vec![agent(11, "", 1)],
            ..tailnet::WorkspaceUpdate::default()
        };
        table.apply(&gone, Update::Diff).unwrap();
        table.apply(&snapshot(&[], &[(11, "main", 1)]), Update::Diff).unwrap();
        assert_eq!(table.roster.snapshot().agents[&id(11)].last_ping, None);
    }

    #[test]
    fn a_successor_that_restores_the_table_forgets_no_ping_and_no_handshake() {
        let mut table = Table::after(&snapshot(&[(1, "dev", RUNNING)], &[(11, "main", 1)]));
        table.roster.set_ping(&id(11), ping(5));
        table.roster.set_handshakes(|_| Some(at(100)));
        let mut reader = table.reader();
        table.roster = Roster::restore(table.roster.snapshot().clone());
        table.roster.set_workspaces(&table.workspaces);
        assert_eq!(reader.read(&table), None);
    }

    /// The cost of a message is that of what changed, and all that changed meanwhile is one entry an agent.
    ///
    /// Conforms: vpn:15.35
    #[test]
    fn a_message_has_one_entry_for_each_agent_that_changed_however_often() {
        let agents: Vec<_> = (0..1000).map(|number| (1000 + number, "main", number)).collect();
        let workspaces: Vec<_> = (0..1000).map(|number| (number, "dev", RUNNING)).collect();
        let mut table = Table::after(&snapshot(&workspaces, &agents));
        let mut reader = table.reader();
        for latency in 1..50 {
            table.roster.set_ping(&id(1007), ping(latency));
        }
        assert_eq!(entries(&reader.read(&table).unwrap()), 1);
        let reads = std::cell::Cell::new(0);
        table.roster.set_handshakes(|_| {
            reads.set(reads.get() + 1);
            Some(at(7))
        });
        assert_eq!(reads.get(), 1000);
        assert_eq!(entries(&reader.read(&table).unwrap()), 1000);
        assert_eq!(entries(&complete(table.roster.snapshot())), 2000);
    }
}

proptest! {
    /// For any sequence of events, and any pace of reading: what a reader was sent is the present.
    #[test]
    fn a_reader_that_applies_every_difference_has_the_present_table(
        events in proptest::collection::vec(any_event(), 0..60),
    ) {
        let mut table = Table::default();
        let mut readers = [Reader::default(), Reader::default(), Reader::default()];
        for event in events {
            match event {
                Event::Update(message, update) => {
                    let before = table.workspaces.clone();
                    if table.apply(&message, update).is_err() {
                        prop_assert_eq!(&table.workspaces, &before);
                    }
                }
                Event::Handshake(number, seconds) => {
                    let last = |agent: &Uuid| (agent.as_u128() % 3 == number).then(|| at(seconds));
                    let before = table.roster.snapshot().clone();
                    let changed = table.roster.set_handshakes(last);
                    prop_assert_eq!(changed, before != *table.roster.snapshot());
                }
                Event::Ping(number, latency) => {
                    let is_there = table.roster.snapshot().agents.contains_key(&id(number));
                    prop_assert_eq!(table.roster.set_ping(&id(number), ping(latency)), is_there);
                }
                Event::Suffix(suffix) => {
                    suffix.clone_into(&mut table.workspaces.suffix);
                    table.roster.set_workspaces(&table.workspaces);
                }
                Event::Restart => table.roster = Roster::restore(table.roster.snapshot().clone()),
                Event::Read(reader) => {
                    readers[reader].read(&table);
                }
            }
            prop_assert!(table.roster.snapshot().agents.values().all(|agent| !agent.fqdn.is_empty()));
        }
        for reader in &mut readers {
            reader.read(&table);
            prop_assert_eq!(reader.read(&table), None, "all was told");
        }
    }

    #[test]
    fn what_is_known_of_an_agent_stays_as_long_as_it_is_listed(
        updates in proptest::collection::vec(any_update(), 1..20),
    ) {
        let mut table = Table::default();
        for (message, update) in updates {
            let before = table.roster.snapshot().clone();
            let _ = table.apply(&message, update);
            for (agent, entry) in &table.roster.snapshot().agents {
                let known = before.agents.get(agent).and_then(|known| known.last_ping.clone());
                prop_assert_eq!(&entry.last_ping, &known);
            }
            let present: Vec<Uuid> = table.roster.snapshot().agents.keys().copied().collect();
            for (number, agent) in present.iter().enumerate() {
                table.roster.set_ping(agent, ping(number as u64));
            }
        }
    }
}

#[derive(Debug, Clone)]
enum Event {
    Update(tailnet::WorkspaceUpdate, Update),
    Handshake(u128, u64),
    Ping(u128, u64),
    Suffix(&'static str),
    Restart,
    Read(usize),
}

fn any_event() -> impl Strategy<Value = Event> {
    prop_oneof![
        8 => any_update().prop_map(|(message, update)| Event::Update(message, update)),
        2 => (0_u128..3, 0_u64..4).prop_map(|(number, seconds)| Event::Handshake(number, seconds)),
        2 => (0_u128..8, 0_u64..4).prop_map(|(number, latency)| Event::Ping(number, latency)),
        1 => prop_oneof![Just("coder"), Just("dev.example"), Just("not..a.name")].prop_map(Event::Suffix),
        1 => Just(Event::Restart),
        5 => (0_usize..3).prop_map(Event::Read),
    ]
}

/// Few ids and few names, so that they meet; some updates cannot be applied.
fn any_update() -> impl Strategy<Value = (tailnet::WorkspaceUpdate, Update)> {
    let name = || prop_oneof![6 => Just("dev"), 6 => Just("Prod"), 1 => Just("no..name"), 1 => Just("")];
    let workspaces = |most| {
        proptest::collection::vec((0_u128..4, name(), 0_i32..12), 0..most).prop_map(|rows| {
            rows.into_iter().map(|(number, name, status)| workspace(number, name, status)).collect::<Vec<_>>()
        })
    };
    let agents = |most| {
        proptest::collection::vec((0_u128..8, name(), 0_u128..4), 0..most).prop_map(|rows| {
            rows.into_iter().map(|(number, name, home)| agent(number, name, home)).collect::<Vec<_>>()
        })
    };
    let update = prop_oneof![1 => Just(Update::Snapshot), 3 => Just(Update::Diff)];
    (workspaces(4), agents(4), workspaces(2), agents(2), update).prop_map(
        |(upserted_workspaces, upserted_agents, deleted_workspaces, deleted_agents, update)| {
            (
                tailnet::WorkspaceUpdate {
                    upserted_workspaces,
                    upserted_agents,
                    deleted_workspaces,
                    deleted_agents,
                },
                update,
            )
        },
    )
}

/// The workspaces and the roster that follows them.
struct Table {
    workspaces: Workspaces,
    roster: Roster,
}

impl Default for Table {
    fn default() -> Self {
        let (username, suffix) = ("Alice".to_owned(), "coder".to_owned());
        let workspaces = Workspaces { username, suffix, ..Workspaces::default() };
        Self { workspaces, roster: Roster::default() }
    }
}

impl Table {
    fn after(snapshot: &tailnet::WorkspaceUpdate) -> Self {
        let mut table = Self::default();
        table.apply(snapshot, Update::Snapshot).unwrap();
        table
    }

    fn apply(&mut self, message: &tailnet::WorkspaceUpdate, update: Update) -> Result<(), UpdateError> {
        self.workspaces.apply(message, update)?;
        self.roster.set_workspaces(&self.workspaces);
        Ok(())
    }

    /// What a resolver is to answer: every name with its address, and that the tunnel's resolver is asked.
    fn hosts(&self) -> BTreeMap<String, Ipv6Addr> {
        let of = |agent: &AgentEntry| {
            agent.fqdn.iter().map(|name| (name.clone(), agent.addresses[0])).collect::<Vec<_>>()
        };
        let probe = (name::probe_name(&self.workspaces.suffix).unwrap(), address::CODER_DNS);
        self.roster.snapshot().agents.values().flat_map(of).chain([probe]).collect()
    }

    /// One that has read everything.
    fn reader(&self) -> Reader {
        let mut reader = Reader::default();
        reader.read(self);
        reader
    }
}

/// The tunnels that follow from the workspaces.
struct Tunnels {
    coordination: Coordination,
    now: std::time::Instant,
}

impl Tunnels {
    fn connected() -> Self {
        let (mut coordination, now) = (Coordination::default(), std::time::Instant::now());
        coordination.connected(now);
        Self { coordination, now }
    }

    /// `+11` asks for a tunnel to the agent with number 11, `-11` gives it back.
    fn follow(&mut self, table: &Table, update: Update) -> Vec<String> {
        let text = |(sign, id): (char, &Bytes)| format!("{sign}{}", Uuid::from_slice(id).unwrap().as_u128());
        let outcome = self.coordination.set_destinations(self.now, &table.workspaces.agent_ids(), update);
        let of = |it: &tailnet::CoordinateRequest| {
            let (add, remove) = (it.add_tunnel.as_ref(), it.remove_tunnel.as_ref());
            add.map(|it| text(('+', &it.id))).or(remove.map(|it| text(('-', &it.id)))).expect("a tunnel")
        };
        outcome.requests.iter().map(of).collect()
    }
}

/// Managers, which differ in the order in which they apply one message.
#[derive(Default)]
struct Reader {
    seen: Snapshot,
    deletes_first: Shown,
    upserts_first: Shown,
}

/// What a manager shows.
#[derive(Default)]
struct Shown {
    workspaces: HashMap<Bytes, vpn::Workspace>,
    agents: HashMap<Bytes, vpn::Agent>,
}

impl Reader {
    /// Reads the difference to what was read before, and checks it and what it leads to.
    fn read(&mut self, table: &Table) -> Option<vpn::PeerUpdate> {
        let present = table.roster.snapshot();
        let message = difference(&self.seen, present);
        if let Some(message) = &message {
            assert_no_id_twice(message);
            self.deletes_first.delete(message);
            self.deletes_first.upsert(message);
            self.upserts_first.upsert(message);
            self.upserts_first.delete(message);
        }
        self.seen = present.clone();
        let everything = complete(present);
        self.deletes_first.assert_shows(&everything);
        self.upserts_first.assert_shows(&everything);
        message
    }
}

impl Shown {
    fn upsert(&mut self, message: &vpn::PeerUpdate) {
        self.workspaces.extend(message.upserted_workspaces.iter().map(|it| (it.id.clone(), it.clone())));
        self.agents.extend(message.upserted_agents.iter().map(|it| (it.id.clone(), it.clone())));
    }

    /// A deleted entry tells what was last known, without times.
    fn delete(&mut self, message: &vpn::PeerUpdate) {
        for gone in &message.deleted_agents {
            let known = self.agents.remove(&gone.id).expect("only what was told is deleted");
            assert_eq!(gone, &vpn::Agent { last_handshake: None, last_ping: None, ..known });
        }
        for gone in &message.deleted_workspaces {
            assert_eq!(self.workspaces.remove(&gone.id).as_ref(), Some(gone));
        }
    }

    fn assert_shows(&self, everything: &vpn::PeerUpdate) {
        assert_eq!(self.workspaces.len(), everything.upserted_workspaces.len());
        assert_eq!(self.agents.len(), everything.upserted_agents.len());
        assert!(everything.upserted_workspaces.iter().all(|it| self.workspaces.get(&it.id) == Some(it)));
        assert!(everything.upserted_agents.iter().all(|it| self.agents.get(&it.id) == Some(it)));
    }
}

fn assert_no_id_twice(message: &vpn::PeerUpdate) {
    let workspaces = message.upserted_workspaces.iter().chain(&message.deleted_workspaces).map(|it| &it.id);
    let agents = message.upserted_agents.iter().chain(&message.deleted_agents).map(|it| &it.id);
    let different =
        workspaces.clone().collect::<BTreeSet<_>>().len() + agents.clone().collect::<BTreeSet<_>>().len();
    assert_eq!(different, workspaces.count() + agents.count(), "{message:?}");
}

/// The number of running in the schema.
const RUNNING: i32 = 3;

fn id(number: u128) -> Uuid {
    Uuid::from_u128(number)
}

fn raw(number: u128) -> Bytes {
    Bytes::copy_from_slice(id(number).as_bytes())
}

fn ids(agents: &[vpn::Agent]) -> Vec<Uuid> {
    agents.iter().map(|agent| Uuid::from_slice(&agent.id).unwrap()).collect()
}

fn entries(message: &vpn::PeerUpdate) -> usize {
    let workspaces = message.upserted_workspaces.len() + message.deleted_workspaces.len();
    workspaces + message.upserted_agents.len() + message.deleted_agents.len()
}

fn workspace(number: u128, name: &str, status: i32) -> tailnet::Workspace {
    tailnet::Workspace { id: raw(number), name: name.to_owned(), status }
}

fn agent(number: u128, name: &str, workspace: u128) -> tailnet::Agent {
    tailnet::Agent { id: raw(number), name: name.to_owned(), workspace_id: raw(workspace) }
}

/// Upserts only: workspaces with name and status, agents with name and workspace.
fn snapshot(workspaces: &[(u128, &str, i32)], agents: &[(u128, &str, u128)]) -> tailnet::WorkspaceUpdate {
    tailnet::WorkspaceUpdate {
        upserted_workspaces: workspaces
            .iter()
            .map(|(it, name, status)| workspace(*it, name, *status))
            .collect(),
        upserted_agents: agents.iter().map(|(it, name, workspace)| agent(*it, name, *workspace)).collect(),
        ..tailnet::WorkspaceUpdate::default()
    }
}

fn at(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

fn ping(millis: u64) -> PingReport {
    PingReport {
        latency: Duration::from_millis(millis),
        direct: false,
        region_name: "Coder Embedded Relay".to_owned(),
        region_latency: Some(Duration::from_millis(7)),
    }
}
